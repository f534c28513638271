import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.label_scores import label_log_probs
from tests.pallas_kernels.tpu import compile_for

N, V, D, L = 7, 21, 8, 4
log_probs = jax.jit(label_log_probs, static_argnames=("normalize_over", "block"))
both_ways = pytest.mark.parametrize("normalize_over", ["vocabulary", "labels"])


def draw(seed: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return (3 * random.standard_normal((N, D))).astype(dtype), random.standard_normal((V, D)).astype(dtype)


def reference(hidden, head, labels, normalize_over):
    """float64 [N, L]; -inf where there is no label."""
    logits = np.float64(hidden) @ np.float64(head).T
    labels = np.broadcast_to(labels, (len(hidden), labels.shape[-1]))
    label_logits = np.where(labels >= 0, np.take_along_axis(logits, np.maximum(labels, 0), -1), -np.inf)
    summed = logits if normalize_over == "vocabulary" else label_logits
    with np.errstate(divide="ignore", invalid="ignore"):
        result = label_logits - np.log(np.sum(np.exp(summed), -1, keepdims=True))
    return np.where(labels >= 0, result, -np.inf)


some_labels = st.lists(st.integers(0, V - 1), min_size=L, max_size=L, unique=True)
for_all = st.tuples(some_labels, st.integers(0, L)).map(lambda pair: pair[0][: pair[1]] + [-1] * (L - pair[1]))
labels = (for_all | st.lists(for_all, min_size=N, max_size=N)).map(np.array)


@both_ways
@pytest.mark.parametrize("block", [1, 8, 21, 64])
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), labels)
def test_log_softmax_at_the_labels(normalize_over, block, seed, labels):
    hidden, head = draw(seed)
    batched = hidden if labels.ndim == 1 else hidden[:, None]  # one list for all tokens, or one for each
    actual = log_probs(batched, head, labels, normalize_over=normalize_over, block=block).reshape(N, L)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, reference(hidden, head, labels, normalize_over), rtol=1e-5, atol=1e-5)


@both_ways
def test_bfloat16_inputs_are_taken_as_they_are(normalize_over):
    hidden, head = draw(1, jnp.bfloat16)
    labels = np.array([3, 20, 0])
    actual = log_probs(hidden, head, labels, normalize_over=normalize_over, block=8)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, reference(hidden, head, labels, normalize_over), rtol=1e-5, atol=1e-5)


@both_ways
def test_a_label_that_is_no_word_is_not_passed_over(normalize_over):
    hidden, head = draw(2)
    assert np.isnan(label_log_probs(hidden, head, np.array([3, V]), normalize_over)[:, 1]).all()


@both_ways
def test_rows_of_their_own_labels(normalize_over):
    """As a scorer calls it: questions [rows, N, D] and labels [rows, L]."""
    hidden, head = draw(3)
    labels = np.array([[3, 20, -1], [5, 6, 7]])
    rows = np.stack([hidden, hidden[::-1]])
    actual = log_probs(rows, head, labels, normalize_over=normalize_over, block=8)
    for row in range(2):
        expected = reference(rows[row], head, labels[row], normalize_over)
        np.testing.assert_allclose(actual[row], expected, rtol=1e-5, atol=1e-5)


def test_a_list_of_labels_is_of_a_batch_entry_not_of_a_token():
    hidden, head = draw(3)
    with pytest.raises(ValueError, match=r"labels \(7, 4\) are not one list for each batch entry of hidden \(7, 8\)"):
        label_log_probs(hidden, head, np.zeros((N, L), np.int32), "labels")


def test_items_that_bfloat16_would_put_in_another_order():
    """300 items whose scores of Yes lie close together, as those of the head of a ranking do."""
    random = np.random.default_rng(0)
    hidden = np.float32(random.standard_normal(64) + 1e-2 * random.standard_normal((300, 64)))
    head = random.standard_normal((2, 64)).astype(np.float32)
    yes_no = np.arange(2)
    exact = np.argsort(reference(hidden, head, yes_no, "labels")[:, 0])
    ours = label_log_probs(hidden, head, yes_no, "labels")[:, 0]
    np.testing.assert_array_equal(np.argsort(ours), exact)

    rounded = (np.float32(x.astype(jnp.bfloat16)) for x in (hidden, head))  # what one pass of a TPU multiplies
    one_pass = label_log_probs(*rounded, yes_no, "labels")[:, 0]
    moved = np.argsort(np.argsort(one_pass)) - np.argsort(np.argsort(ours))
    assert np.mean(moved != 0) > 0.5


def test_no_array_of_questions_by_words():
    N, V, block = 512, 4096, 256
    hidden, head = (jax.ShapeDtypeStruct((n, D), jnp.float32) for n in (N, V))
    labels = jax.ShapeDtypeStruct((L,), jnp.int32)
    compiled = log_probs.lower(hidden, head, labels, normalize_over="vocabulary", block=block).compile()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())]
    assert max(sizes) == N * block


# --- what a TPU makes of it, by its compiler


def products(compiled: jax.stages.Compiled) -> list[str]:
    """The operand precision of each matrix product; "" is the default."""
    lines = [line for line in compiled.as_text().splitlines() if re.search(r" = \S+ (convolution|dot)\(", line)]
    return [next(iter(re.findall(r"operand_precision=\{(.*?)\}", line)), "") for line in lines]


def cycles(compiled: jax.stages.Compiled) -> int:
    """The compiler's own estimate."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())))


def test_a_float32_product_is_one_pass_of_bfloat16_unless_asked_otherwise():
    def product(precision, dtype):
        multiply = functools.partial(jnp.einsum, "nd,vd->nv", precision=precision, preferred_element_type=jnp.float32)
        x = jax.ShapeDtypeStruct((512, 512), dtype)
        with jax.default_matmul_precision(None):  # JAX's own default, not that of the tests
            return compile_for("v5e", multiply, x, x)

    default, in_truth = product(None, jnp.float32), product("highest", jnp.float32)
    assert products(default) == [""]
    assert products(in_truth) == ["highest,highest"]
    of_bfloat16 = cycles(product(None, jnp.bfloat16))
    assert cycles(default) < 1.2 * of_bfloat16  # the same work, and twice the bytes
    assert cycles(in_truth) > 1.5 * cycles(default)
    # bfloat16 inputs take no more passes than they need: label scores can ask for the highest precision always.
    assert cycles(product("highest", jnp.bfloat16)) == of_bfloat16


@both_ways
def test_every_product_of_label_scores_is_float32_in_truth_on_a_tpu(normalize_over):
    hidden, head = (jax.ShapeDtypeStruct((n, 128), jnp.float32) for n in (64, 1024))
    score = functools.partial(label_log_probs, normalize_over=normalize_over, block=256)
    compiled = compile_for("v5e", score, hidden, head, jax.ShapeDtypeStruct((8,), jnp.int32))
    assert set(products(compiled)) == {"highest,highest"}
