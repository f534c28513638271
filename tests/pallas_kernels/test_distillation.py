import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.distillation import (
    forward_kl,
    jensen_shannon,
    linear_distillation,
    linear_top_k,
    reverse_kl,
    skewed_kl,
    top_k_distillation,
)

N, V, D, E, K = 13, 21, 8, 6, 4
SETTINGS = [(5, 8, 2.0), (512, 21, 0.5)]  # tokens and words at a time (no divisor, all), and a temperature
BETA = 0.3


def kl(p, q):
    return jnp.sum(p * jnp.log(p / q), -1)


def js(p, q):
    m = BETA * p + (1 - BETA) * q
    return BETA * kl(p, m) + (1 - BETA) * kl(q, m)


# What is offered, and its definition on probabilities of the teacher p and the student q.
DIVERGENCES = {
    "forward KL": (forward_kl, kl),
    "reverse KL": (reverse_kl, lambda p, q: kl(q, p)),
    "Jensen-Shannon": (jensen_shannon(BETA), js),
    "skewed KL": (skewed_kl(BETA), lambda p, q: kl(p, BETA * p + (1 - BETA) * q)),
}
divergences = pytest.mark.parametrize("name", DIVERGENCES)
in_pieces = pytest.mark.parametrize(("chunk", "block", "temperature"), SETTINGS)


def draw(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"hidden": (N, D), "head": (V, D), "teacher_hidden": (N, E), "teacher_head": (V, E)}
    spread = random.choice([0.3, 1, 1.3])  # from nearly even distributions to nearly one word only
    return {name: np.float32(spread * random.standard_normal(shape)) for name, shape in shapes.items()}


def teacher_probs(inputs: dict[str, np.ndarray], temperature: float) -> np.ndarray:
    """float64 [N, V]"""
    logits = np.float64(inputs["teacher_hidden"]) @ np.float64(inputs["teacher_head"]).T / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def top_k(inputs: dict[str, np.ndarray], temperature: float, k: int) -> dict[str, np.ndarray]:
    """What a cache holds of the teacher: ids and log-probabilities [N, k], likeliest first."""
    probs = teacher_probs(inputs, temperature)
    ids = np.argsort(-probs, -1)[:, :k]
    return {"ids": ids, "log_probs": np.float32(np.log(np.take_along_axis(probs, ids, -1)))}


@functools.cache
def run(loss, name, chunk, block, temperature):
    """Jitted (student's hidden and head, teacher, weights) -> ((sum, count), (d_hidden, d_head))."""
    static = {"divergence": DIVERGENCES[name][0], "chunk": chunk, "block": block, "temperature": temperature}
    return jax.jit(
        jax.value_and_grad(
            lambda hidden, head, teacher, weights: loss(hidden, head, **teacher, weights=weights, **static),
            argnums=(0, 1),
            has_aux=True,
        )
    )


@functools.cache
def dense(name, temperature):
    """The definition: jitted (hidden, head, p [N, buckets], ids or None, weights) -> (sum, gradients)."""

    def loss(hidden, head, p, ids, weights):
        q = jax.nn.softmax(hidden @ head.T / temperature)
        if ids is not None:
            words = jnp.take_along_axis(q, ids, -1)
            q = jnp.concatenate([words, jnp.sum(q, -1, keepdims=True) - words.sum(-1, keepdims=True)], -1)
        return temperature**2 * jnp.sum(weights * DIVERGENCES[name][1](p, q))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def assert_close(actual, expected, atol=5e-5):
    """(sum, gradients) to the precision of float32 logits of about 30, sums of which cancel in the gradients."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1, np.abs(b).max()))


def assert_is_the_definition(inputs, teacher, p, ids, weights, loss, name, chunk, block, temperature):
    student = inputs["hidden"], inputs["head"]
    (total, count), grads = run(loss, name, chunk, block, temperature)(*student, teacher, weights)
    assert count == weights.sum()
    with jax.enable_x64(True):
        expected = dense(name, temperature)(*map(np.float64, student), p, ids, np.float64(weights))
        # Logits are up to 60 at a low temperature, and factors in the reverse KL.
        atol = 3e-4 if name == "reverse KL" and temperature < 1 else 5e-5
        assert_close((total, grads), jax.tree.map(np.asarray, expected), atol)


seeds = st.integers(0, 2**32 - 1)
# Some tokens count, all do, none does.
weights = (
    st.lists(st.sampled_from([0, 0.25, 1, 3]), min_size=N, max_size=N) | st.just([1] * N) | st.just([0] * N)
).map(np.float32)


@divergences
@in_pieces
@settings(deadline=None, max_examples=10)
@given(seeds, weights)
def test_from_another_head(name, chunk, block, temperature, seed, weights):
    inputs = draw(seed)
    teacher = {key: inputs[key] for key in ("teacher_hidden", "teacher_head")}
    p = teacher_probs(inputs, temperature)
    assert_is_the_definition(inputs, teacher, p, None, weights, linear_distillation, name, chunk, block, temperature)


@divergences
@in_pieces
@settings(deadline=None, max_examples=10)
@given(seeds, weights)
def test_from_a_cache_of_few_words(name, chunk, block, temperature, seed, weights):
    inputs = draw(seed)
    inputs["teacher_head"] *= 0.3  # so that the tail's share is not lost in the rounding of the others
    teacher = top_k(inputs, temperature, K)
    words = np.exp(np.float64(teacher["log_probs"]))
    p = np.concatenate([words, 1 - words.sum(-1, keepdims=True)], -1)
    ids = teacher["ids"]
    none = {"ids": -1, "log_probs": -np.inf}  # two places of the cache stay empty
    teacher = {key: np.pad(x, ((0, 0), (0, 2)), constant_values=none[key]) for key, x in teacher.items()}
    assert_is_the_definition(inputs, teacher, p, ids, weights, top_k_distillation, name, chunk, block, temperature)


@divergences
def test_all_words_but_one_in_the_cache_are_the_whole_teacher(name):
    inputs = draw(1)
    inputs["teacher_head"] *= 0.3
    student, ones = (inputs["hidden"], inputs["head"]), np.ones(N, np.float32)
    teacher = {key: inputs[key] for key in ("teacher_hidden", "teacher_head")}
    (whole, _), whole_grads = run(linear_distillation, name, 5, 8, 1.0)(*student, teacher, ones)
    (cached, _), grads = run(top_k_distillation, name, 5, 8, 1.0)(*student, top_k(inputs, 1.0, V - 1), ones)
    assert_close((cached, grads), (whole, whole_grads))


@divergences
def test_a_student_who_is_the_teacher_has_nothing_to_learn(name):
    inputs = draw(3)
    student, ones = (inputs["hidden"], inputs["head"]), np.ones(N, np.float32)
    teacher = {"teacher_hidden": inputs["hidden"], "teacher_head": inputs["head"]}
    (total, _), grads = run(linear_distillation, name, 5, 8, 1.0)(*student, teacher, ones)
    assert_close((total, grads), (0, [np.zeros_like(x) for x in student]))


@divergences
def test_a_tail_far_below_the_words_keeps_its_value(name):
    """The student gives the tail e^-40: one less the probabilities of its words would be zero, and its log infinite."""
    teacher = {"ids": np.array([[2]]), "log_probs": np.log(np.float32([[0.75]]))}
    head = np.float32([[0], [0], [40]])
    (total, _), grads = run(top_k_distillation, name, 1, 2, 1.0)(
        np.ones((1, 1), np.float32), head, teacher, np.ones(1, np.float32)
    )
    q = np.exp(np.float64([0, np.log(2) - 40])) / (1 + 2 * np.exp(-40.0))
    np.testing.assert_allclose(total, DIVERGENCES[name][1](np.float64([0.75, 0.25]), q), rtol=1e-5)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_nothing_flows_to_the_teacher():
    inputs = draw(4)
    grads = jax.jit(jax.grad(lambda inputs: linear_distillation(**inputs, weights=jnp.ones(N))[0]))(inputs)
    assert np.any(grads["hidden"])
    assert np.any(grads["head"])
    assert not np.any(grads["teacher_hidden"])
    assert not np.any(grads["teacher_head"])


@settings(deadline=None, max_examples=10)
@given(seeds, st.lists(st.booleans(), min_size=N, max_size=N))
def test_what_a_teacher_leaves_in_a_cache(seed, counts):
    inputs, counts = draw(seed), np.array(counts)
    ids, log_probs = linear_top_k(inputs["teacher_hidden"], inputs["teacher_head"], counts, K, 2.0, chunk=5)
    expected = top_k(inputs, 2.0, K)
    np.testing.assert_allclose(log_probs[counts], expected["log_probs"][counts], rtol=1e-5, atol=1e-5)
    actual = np.take_along_axis(np.log(teacher_probs(inputs, 2.0)), np.maximum(ids, 0), -1)[counts]
    np.testing.assert_allclose(actual, log_probs[counts], rtol=1e-5, atol=1e-5)  # ties may change places
    assert (np.sort(ids, -1)[counts, 1:] != np.sort(ids, -1)[counts, :-1]).all()
    assert (ids[~counts] == -1).all()
    assert (log_probs[~counts] == -np.inf).all()


def test_what_makes_no_sense_is_refused():
    inputs, ones = draw(5), np.ones(N, np.float32)
    with pytest.raises(ValueError, match=r"alpha of the skewed KL is 0; it must lie between 0 and 1"):
        skewed_kl(0)
    with pytest.raises(ValueError, match=r"beta of the Jensen-Shannon divergence is 1; it must lie between 0 and 1"):
        jensen_shannon(1)
    with pytest.raises(ValueError, match="the student's head has 21 words, the teacher's 20"):
        linear_distillation(**inputs | {"teacher_head": inputs["teacher_head"][1:]}, weights=ones)
    with pytest.raises(ValueError, match="the teacher's 21 words leave no tail in a vocabulary of 21"):
        top_k_distillation(inputs["hidden"], inputs["head"], **top_k(inputs, 1.0, V), weights=ones)
