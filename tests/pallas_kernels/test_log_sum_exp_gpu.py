"""The GPU's kernel of the log-sum over the vocabulary: against float64, in interpret mode, and lowered to Triton.

`benchmarks/heads_h100.py` compiles it further, to machine code; that takes CUDA's packages.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.label_scores import label_log_probs
from pallas_kernels.log_sum_exp_gpu import log_sum_exp
from tests.pallas_kernels.head_inputs import D, check_parts, draw, exact, ulps

interpreted = jax.jit(functools.partial(log_sum_exp, interpret=True), static_argnames="parts")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("N", "V"), [(1, 1), (1, 255), (130, 1025), (300, 2500), (5, 40_000)])
def test_any_shape_against_float64(N, V, dtype):
    hidden, head = draw(N, V, dtype)
    _, expected = exact(hidden, head)
    assert ulps(interpreted(hidden, head), expected).max() <= 64


def test_two_parts_are_off_by_a_few_units_of_the_last_place_and_one_by_thousands():
    """As on a TPU; true float32 products, which run without tensor cores, are no better than three parts."""
    check_parts(lambda hidden, head, parts: interpreted(hidden, head, parts=parts))


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits(shift):
    """All logits of a token near 10,000, where the unit of the last place is 2^-10."""
    hidden, head = draw(4, 1500)
    hidden[:, 0], head[:, 0] = shift, 1
    _, expected = exact(hidden, head)
    assert ulps(interpreted(hidden, head, parts=3), expected).max() <= 2


def test_a_word_ahead_of_all_others_by_more_than_float32_can_add():
    hidden, head = draw(2, 1100, size=1)
    head[1024] = 200 * np.sign(hidden[0])
    _, expected = exact(hidden, head)
    assert ulps(interpreted(hidden, head), expected).max() <= 64


def test_nan_stays_with_its_token():
    hidden, head = draw(200, 1030)
    clean = interpreted(hidden, head)
    hidden[7] = np.nan
    log_sums = np.asarray(interpreted(hidden, head))
    assert np.isnan(log_sums[7])
    np.testing.assert_array_equal(np.delete(log_sums, 7), np.delete(clean, 7))


def test_a_token_does_not_depend_on_the_others_and_equal_ones_tie():
    hidden, head = draw(300, 1030)
    hidden[150:] = hidden[:150]
    together = interpreted(hidden, head)
    np.testing.assert_array_equal(interpreted(hidden[:5], head), together[:5])
    np.testing.assert_array_equal(together[150:], together[:150])


def test_only_so_many_tokens():
    hidden, head = draw(400, 40)
    log_sums = interpreted(hidden, head, num_tokens=250)
    np.testing.assert_array_equal(log_sums[:250], interpreted(hidden, head)[:250])
    assert (log_sums[256:] == -np.inf).all()  # not computed


def test_scores_by_the_kernel_are_those_of_the_loop():
    hidden, head = draw(60, 1300)
    rows, labels = hidden.reshape(2, 30, D), np.array([[3, 3, -1], [1299, 7, 1300]])  # repeated, absent, beyond
    by = {
        name: label_log_probs(rows, head, labels, "vocabulary", implementation=name)
        for name in ("xla", "gpu-interpreted")
    }
    np.testing.assert_allclose(by["xla"], by["gpu-interpreted"], rtol=2e-6, atol=2e-6)
    assert np.isnan(by["gpu-interpreted"][1, :, 2]).all()
    assert (by["gpu-interpreted"][0, :, 2] == -np.inf).all()


def test_a_head_in_shards_gives_what_a_whole_one_gives():
    hidden, head = draw(8, 1200)
    labels = np.array([3, 3, -1, 1199, 700, 1200])
    score = functools.partial(label_log_probs, normalize_over="vocabulary", implementation="gpu-interpreted")
    in_shards = jax.vmap(functools.partial(score, vocabulary_over=("tensor",)), (None, 0, None), axis_name="tensor")
    shards = jax.jit(in_shards)(hidden, head.reshape(4, 300, D), labels)
    np.testing.assert_array_equal(shards[1:], shards[:-1])
    np.testing.assert_allclose(shards[0], score(hidden, head, labels), rtol=1e-6)


@pytest.mark.parametrize(("V", "D", "dtype"), [(300, 64, jnp.float32), (300, 96, jnp.bfloat16)])
def test_heads_that_it_does_not_take_are_refused(V, D, dtype):
    with pytest.raises(ValueError, match=rf"{jnp.dtype(dtype).name}\[300, {D}\]: the kernel takes bfloat16, and D in"):
        log_sum_exp(jnp.zeros((3, D)), jnp.zeros((V, D), dtype))


# --- lowered to Triton, without a GPU


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def sizes_of(text: str) -> list[int]:
    return [np.prod([int(n) for n in shape.split("x")]) for shape in re.findall(r"tensor<([\dx]+)x\w+>", text)]


@pytest.mark.parametrize(("N", "D", "dtype"), [(500, 3072, jnp.float32), (32, 576, jnp.bfloat16)], ids=str)
def test_serving_shapes_lower_without_logits_and_without_a_copy_of_the_head(N, D, dtype):
    V = 128_256
    shapes = jax.ShapeDtypeStruct((1, N, D), dtype), jax.ShapeDtypeStruct((V, D), jnp.bfloat16)
    score = functools.partial(label_log_probs, normalize_over="vocabulary", implementation="gpu")
    text = lowered(score, *shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert text.count("__gpu$xla.gpu.triton") == 1
    sizes = sizes_of(text)
    assert V * D in sizes  # the expression does find arrays
    assert max(size for size in sizes if size != V * D) < N * V / 8


def test_a_training_shape_lowers():
    N, D, V = 8192, 4096, 128_256
    step = jax.grad(lambda *x: linear_cross_entropy(*x, implementation="gpu")[0], (0, 1))
    shape = jax.ShapeDtypeStruct
    text = lowered(step, shape((N, D), jnp.bfloat16), shape((V, D), jnp.bfloat16), shape((N,), jnp.int32))
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert max(sizes_of(text)) == V * D
