import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import attention_blockwise, attention_reference
from pallas_kernels.segments import PADDING, SELF, Segments
from tests.pallas_kernels.layouts import Example, batches, pack, rows, stack

B, T, H, K, D = 2, 96, 4, 2, 8
BLOCKS = (16, 40, 128)  # divides the row, does not, is longer than it
seeds = st.integers(0, 2**32 - 1)


def draw_qkvd(seed: int, dtype=np.float32, shape=(B, T)) -> list[np.ndarray]:
    """Queries, keys, values, and a cotangent of the output."""
    random = np.random.default_rng(seed)
    spread = random.choice([0.3, 1, 2])  # from nearly even weights to nearly one key only
    spreads = {"q": spread, "k": spread, "v": 1, "d_out": 1}
    heads = {"q": H, "k": K, "v": K, "d_out": H}
    return [(spreads[x] * random.standard_normal((*shape, heads[x], D))).astype(dtype) for x in heads]


@functools.cache
def out_and_grads(block: int | None):
    """Jitted (q, k, v, d_out, segments) -> (out, dq, dk, dv); block None is the reference."""
    function = attention_reference if block is None else functools.partial(attention_blockwise, block=block)

    @jax.jit
    def run(q, k, v, d_out, segments):
        out, vjp = jax.vjp(lambda *qkv: function(*qkv, segments), q, k, v)
        return (out, *vjp(d_out))

    return run


def reference(qkvd: list[np.ndarray], segments: Segments) -> list[np.ndarray]:
    """The reference in float64."""
    with jax.enable_x64(True):
        return [np.asarray(x) for x in out_and_grads(None)(*(x.astype(np.float64) for x in qkvd), segments)]


def assert_close(found, expected, tolerance: float) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        difference = np.abs(np.asarray(a, np.float64) - b).max()
        assert difference <= tolerance * max(1, np.abs(b).max()), name


@pytest.mark.parametrize("block", BLOCKS)
@settings(deadline=None, max_examples=30)
@given(batches(B, T), seeds)
def test_blockwise_is_the_reference(block, segments, seed):
    qkvd = draw_qkvd(seed)
    assert_close(out_and_grads(block)(*qkvd, segments), reference(qkvd, segments), 1e-5)


@settings(deadline=None, max_examples=10)
@given(batches(B, T), seeds)
def test_bfloat16(segments, seed):
    qkvd = draw_qkvd(seed, jnp.bfloat16)
    found = out_and_grads(16)(*qkvd, segments)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    # Sums are float32: the error is that of rounding `out`, once for the result and once inside the gradients.
    assert_close(found, reference(qkvd, segments), 2**-6)


@pytest.mark.parametrize("heads", [(3, 3), (6, 1)], ids=["each head its own keys", "one for all"])
def test_groups_of_heads(heads):
    segments = stack([pack([Example(9, [4, 4], [5] * 6, star=True), Example(3)], 64)])
    random = np.random.default_rng(0)
    q, k, v, d = (random.standard_normal((1, 64, n, D), np.float32) for n in (heads[0], heads[1], heads[1], heads[0]))
    assert_close(out_and_grads(16)(q, k, v, d, segments), reference([q, k, v, d], segments), 1e-5)


@settings(deadline=None, max_examples=20)
@given(batches(B, T), seeds)
def test_padding_gets_zeros_and_gives_nothing(segments, seed):
    real = (segments.example != PADDING)[..., None, None]
    qkvd = draw_qkvd(seed)
    clean = out_and_grads(40)(*qkvd, segments)
    poisoned = out_and_grads(40)(*(np.where(real, x, np.nan) for x in qkvd), segments)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.where(real, 0, a).any()


@settings(deadline=None, max_examples=20)
@given(rows(T), seeds, st.data())
def test_a_question_changes_no_bit_of_another(row, seed, data):
    questions = sorted({(e, s) for e, s, r in zip(*row, strict=True) if e != PADDING and r == SELF})
    hypothesis.assume(questions)
    example, segment = data.draw(st.sampled_from(questions))
    changed = ((row.example == example) & (row.segment == segment))[:, None, None]
    (q, k, v, d), others = draw_qkvd(seed, shape=(1, T)), draw_qkvd(seed + 1, shape=(1, T))
    segments = stack([row])
    before = out_and_grads(16)(q, k, v, d, segments)[0]
    q, k, v = (np.where(changed, other, x) for x, other in zip((q, k, v), others, strict=False))
    after = out_and_grads(16)(q, k, v, d, segments)[0]
    np.testing.assert_array_equal(np.where(changed, 0, before), np.where(changed, 0, after))


def test_memory_is_linear_in_the_length():
    def compiled(length: int) -> jax.stages.Compiled:
        q, k = (jax.ShapeDtypeStruct((1, length, heads, D), jnp.float32) for heads in (H, K))
        segments = Segments(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 3)
        return out_and_grads(128).lower(q, k, k, q, segments).compile()

    short, long = compiled(4096), compiled(8192)
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[([\d,]+)\]", long.as_text())]
    assert 8192 * H * D in sizes  # the expression does find arrays
    assert max(sizes) < 8192**2 / 64
    temporary = [one.memory_analysis().temp_size_in_bytes for one in (short, long)]
    assert temporary[1] < 2.2 * temporary[0]
