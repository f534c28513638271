"""The TPU's kernel of the log-sum over the vocabulary: against float64, in interpret mode, and through the compiler."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.label_scores import label_log_probs
from pallas_kernels.log_sum_exp_tpu import log_sum_exp, split
from tests.pallas_kernels.head_inputs import D, check_parts, draw, exact, ulps
from tests.pallas_kernels.tpu import compile_for, devices

interpreted = jax.jit(functools.partial(log_sum_exp, interpret=True), static_argnames="parts")
BFLOAT16_OR_FLOAT32 = [(jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16), (jnp.float32, jnp.float32)]


@pytest.mark.parametrize("dtypes", BFLOAT16_OR_FLOAT32, ids=str)
@pytest.mark.parametrize(("N", "V"), [(1, 1), (130, 1025), (300, 2500)])
def test_any_shape_against_float64(N, V, dtypes):
    hidden, head = draw(N, V, *dtypes)
    targets = np.random.default_rng(1).integers(-1, V, N)
    logits, expected = exact(hidden, head)
    lse, picked = interpreted(hidden, head, targets)
    assert ulps(lse, expected).max() <= 64
    target_logits = np.where(targets >= 0, logits[np.arange(N), np.maximum(targets, 0)], 0)
    np.testing.assert_allclose(picked, target_logits, atol=2e-4)


def test_two_parts_are_off_by_a_few_units_of_the_last_place_and_one_by_thousands():
    """The unit of the last place of a log-sum; a TPU's default precision is one part."""
    check_parts(lambda hidden, head, parts: interpreted(hidden, head, parts=parts)[0])


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits(shift):
    """All logits of a token near 10,000, where the unit of the last place is 2^-10."""
    hidden, head = draw(4, 1500, jnp.float32, jnp.float32)
    hidden[:, 0], head[:, 0] = shift, 1
    _, expected = exact(hidden, head)
    assert ulps(interpreted(hidden, head, parts=3)[0], expected).max() <= 2


def test_a_word_ahead_of_all_others_by_more_than_float32_can_add():
    hidden, head = draw(2, 1100, size=1)
    head[1024] = 200 * np.sign(hidden[0])
    _, expected = exact(hidden, head)
    assert ulps(interpreted(hidden, head)[0], expected).max() <= 64


def test_nan_stays_with_its_token_and_padding_reaches_none():
    hidden, head = draw(200, 1030)
    clean, _ = interpreted(hidden, head)
    hidden[7] = np.nan
    lse = np.asarray(interpreted(hidden, head)[0])
    assert np.isnan(lse[7])
    np.testing.assert_array_equal(np.delete(lse, 7), np.delete(clean, 7))


def test_a_token_does_not_depend_on_the_others():
    hidden, head = draw(300, 1030)
    alone, _ = interpreted(hidden[:5], head)
    np.testing.assert_array_equal(alone, interpreted(hidden, head)[0][:5])


def test_equal_tokens_tie():
    hidden, head = draw(128, 1030)
    hidden[64:] = hidden[:64]
    lse, _ = interpreted(hidden, head)
    np.testing.assert_array_equal(lse[64:], lse[:64])


def test_only_so_many_tokens():
    hidden, head = draw(1100, 40)
    lse, _ = interpreted(hidden, head, num_tokens=500)
    np.testing.assert_array_equal(lse[:500], interpreted(hidden, head)[0][:500])


def test_parts_add_up():
    x = np.float32(np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-20, 30).repeat(20))
    parts = [np.float64(part) for part in jax.jit(lambda x: split(x, 3))(x)]
    np.testing.assert_array_equal(sum(parts), x)
    assert (np.abs(parts[0] + parts[1] - x) <= 2.0**-16 * np.abs(x)).all()


def test_scores_by_the_kernel_are_those_of_the_loop():
    hidden, head = draw(60, 1300)
    rows, labels = hidden.reshape(2, 30, D), np.array([[3, 3, -1], [1299, 7, 1300]])  # repeated, absent, beyond
    by = {
        name: label_log_probs(rows, head, labels, "vocabulary", implementation=name)
        for name in ("xla", "tpu-interpreted")
    }
    np.testing.assert_allclose(by["xla"], by["tpu-interpreted"], rtol=2e-6, atol=2e-6)
    assert np.isnan(by["xla"][1, :, 2]).all()
    assert (by["xla"][0, :, 2] == -np.inf).all()


@pytest.mark.parametrize("normalize_over", ["vocabulary", "labels"])
def test_a_head_in_shards_gives_what_a_whole_one_gives(normalize_over):
    hidden, head = draw(8, 1200)
    labels = np.array([3, 3, -1, 1199, 700, 1200])
    score = functools.partial(label_log_probs, normalize_over=normalize_over, implementation="tpu-interpreted")
    in_shards = jax.vmap(functools.partial(score, vocabulary_over=("tensor",)), (None, 0, None), axis_name="tensor")
    shards = jax.jit(in_shards)(hidden, head.reshape(4, 300, D), labels)
    np.testing.assert_array_equal(shards[1:], shards[:-1])
    np.testing.assert_allclose(shards[0], score(hidden, head, labels), rtol=1e-6)


# --- what the TPU's compiler makes of it


@pytest.mark.parametrize(
    ("chip", "N", "D", "V", "dtypes"),
    [
        ("v5e", 500, 3072, 128_256, BFLOAT16_OR_FLOAT32[1]),
        ("v5p", 500, 1024, 49_152, BFLOAT16_OR_FLOAT32[1]),
        ("v6e", 500, 1024, 128_256, BFLOAT16_OR_FLOAT32[2]),
        ("tpu7x", 500, 3072, 128_256, BFLOAT16_OR_FLOAT32[1]),
        ("tpu7x", 32, 6144, 32_768, BFLOAT16_OR_FLOAT32[0]),
    ],
    ids=str,
)
def test_serving_shapes_compile(chip, N, D, V, dtypes):
    hidden, head = (jax.ShapeDtypeStruct(x, dtype) for x, dtype in zip([(1, N, D), (V, D)], dtypes, strict=True))
    score = functools.partial(label_log_probs, normalize_over="vocabulary")
    compiled = compile_for(chip, score, hidden, head, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert "head_log_sum_exp" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * N * D * 4 + (1 << 20)  # no logits, no copy of the head


def test_a_head_over_devices_takes_one_small_reduction():
    mesh = jax.make_mesh((4,), ("tensor",), devices=devices("v6e", 2))
    place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*axes))
    )
    score = functools.partial(label_log_probs, normalize_over="vocabulary", vocabulary_over=("tensor",))
    sharded = jax.shard_map(
        score, mesh=mesh, in_specs=(jax.P(), jax.P("tensor"), jax.P()), out_specs=jax.P(), check_vma=False
    )
    inputs = place((1, 256, 512), jnp.float32), place((32_768, 512), jnp.bfloat16, "tensor"), place((1, 2), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(sharded).lower(*inputs).compile().as_text()
    assert "head_log_sum_exp" in text
    assert not re.search(r" (all-to-all|collective-permute)(-start)?\(", text)
    reductions = re.findall(r"= \(?(\S+) (?:all-gather|all-reduce)(?:-start)?\(", text)
    assert len(reductions) == 1
