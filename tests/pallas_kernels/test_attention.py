import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention_gpu, attention_tpu, attention_tpu_plan, attention_xla
from pallas_kernels.attention import attention, attention_reference
from pallas_kernels.token_labels import PADDING, SELF, TokenLabels
from tests.pallas_kernels.layouts import Example, batches, pack, rows, stack

H, K, D = 4, 2, 8
# Rows of a few blocks each, none of them whole: 3 x 3 of 40 tokens, 2 x 2 of 256, and 7 x 4 of 16 and 32 and so on.
LENGTHS = {"xla": 104, "tpu-interpreted": 470, "gpu-interpreted": 104}
IMPLEMENTATIONS = tuple(LENGTHS)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_xla, "BLOCK", 40)
        patch.setattr(attention_tpu_plan, "CHUNKS", 2)
        patch.setattr(attention_tpu_plan, "KEYS", 256)
        cuts = {"forward": (32, 32, 4), "dq": (32, 16, 4), "dk_dv": (16, 32, 4)}
        patch.setattr(attention_gpu, "choose_blocks", lambda kernel, *_: attention_gpu.Blocks(*cuts[kernel]))
        yield


def draw_qkvd(seed: int, length: int, queries: int | None = None, dtype=np.float32, B=2) -> list[np.ndarray]:
    """Queries, keys, values, and a cotangent of the output."""
    random = np.random.default_rng(seed)
    spread = random.choice([0.3, 1, 2])  # from nearly even weights to nearly one key only
    spreads = {"q": spread, "k": spread, "v": 1, "d_out": 1}
    shapes = {"q": (queries or length, H), "k": (length, K), "v": (length, K), "d_out": (queries or length, H)}
    return [(spreads[x] * random.standard_normal((B, *shape, D))).astype(dtype) for x, shape in shapes.items()]


@functools.cache
def results(implementation: str | None):
    """Jitted (q, k, v, d_out, token_labels) -> out, log-sum-exp, and the gradients of both; None is the reference."""

    def run(q, k, v, token_labels):
        if implementation is None:
            out, log_sum = attention_reference(q, k, v, token_labels)
        else:
            out, log_sum = attention(q, k, v, token_labels, implementation=implementation)
        real = token_labels.example_id[:, -q.shape[1] :, None] != PADDING
        return out, jnp.where(real, log_sum, 0)

    @jax.jit
    def with_gradients(q, k, v, d_out, token_labels):
        (out, log_sum), vjp = jax.vjp(lambda *qkv: run(*qkv, token_labels), q, k, v)
        return (out, log_sum, *vjp((d_out, d_out[..., 0].astype(log_sum.dtype))))

    return with_gradients


def reference(qkvd: list[np.ndarray], token_labels: TokenLabels) -> list[np.ndarray]:
    """The reference in float64."""
    with jax.enable_x64(True):
        return [np.asarray(x) for x in results(None)(*(x.astype(np.float64) for x in qkvd), token_labels)]


def assert_close(actual, expected, tolerance: float) -> None:
    for name, a, b in zip(("out", "log_sum", "dq", "dk", "dv"), actual, expected, strict=True):
        difference = np.abs(np.asarray(a, np.float64) - b).max()
        assert difference <= tolerance * max(1, np.abs(b).max()), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=25)
@given(st.data(), seeds)
def test_is_the_reference(implementation, data, seed):
    length = LENGTHS[implementation]
    token_labels, qkvd = data.draw(batches(2, length)), draw_qkvd(seed, length)
    assert_close(results(implementation)(*qkvd, token_labels), reference(qkvd, token_labels), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=10)
@given(st.data(), seeds)
def test_queries_behind_a_cached_prefix(implementation, data, seed):
    length = LENGTHS[implementation]
    token_labels, qkvd = data.draw(batches(2, length)), draw_qkvd(seed, length, queries=length * 2 // 3)
    assert_close(results(implementation)(*qkvd, token_labels), reference(qkvd, token_labels), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_query(implementation):
    """What decoding does: the last token of each row, one of them padding, behind all the others."""
    token_labels = stack([pack([Example(30, [9] * 4, [30])], 96), pack([Example(90, padding=6)], 96)])
    qkvd = draw_qkvd(0, 96, queries=1)
    assert_close(results(implementation)(*qkvd, token_labels), reference(qkvd, token_labels), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=10)
@given(st.data(), seeds)
def test_bfloat16(implementation, data, seed):
    length = LENGTHS[implementation]
    token_labels, qkvd = data.draw(batches(2, length)), draw_qkvd(seed, length, dtype=jnp.bfloat16)
    actual = results(implementation)(*qkvd, token_labels)
    assert [x.dtype for x in actual] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    # Sums are float32; weights and their gradients are rounded to bfloat16 before a product on a TPU.
    assert_close(actual, reference(qkvd, token_labels), 2**-6)


def test_products_of_float32_are_bfloat16_on_a_cpu_that_has_them():
    token_labels = stack([pack([Example(9, [4, 4], [5] * 6, star=True), Example(40, [], [7] * 3)], LENGTHS["xla"])] * 2)
    qkvd = draw_qkvd(0, LENGTHS["xla"])
    rounded = [x.astype(jnp.bfloat16).astype(np.float32) for x in qkvd]
    with jax.default_matmul_precision("bfloat16"):
        actual = results("xla")(*qkvd, token_labels)
        of_rounded = results("xla")(*rounded, token_labels)
    assert {x.dtype for x in actual} == {jnp.dtype(jnp.float32)}
    assert_close(of_rounded, reference(rounded, token_labels), 2**-6)  # weights and their gradients are rounded too
    np.testing.assert_array_equal(actual[0], of_rounded[0])  # inputs are rounded, and nothing else about them counts


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [(3, 3), (6, 1)], ids=["each head its own keys", "one for all"])
def test_groups_of_heads(implementation, heads):
    token_labels = stack([pack([Example(9, [4, 4], [5] * 6, star=True), Example(3)], 64)])
    random = np.random.default_rng(0)
    q, k, v, d = (random.standard_normal((1, 64, n, D), np.float32) for n in (heads[0], heads[1], heads[1], heads[0]))
    assert_close(results(implementation)(q, k, v, d, token_labels), reference([q, k, v, d], token_labels), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=15)
@given(st.data(), seeds)
def test_padding_gets_zeros_and_gives_nothing(implementation, data, seed):
    length = LENGTHS[implementation]
    token_labels, qkvd = data.draw(batches(2, length)), draw_qkvd(seed, length)
    real = (token_labels.example_id != PADDING)[..., None, None]
    clean = results(implementation)(*qkvd, token_labels)
    poisoned = results(implementation)(*(np.where(real, x, np.nan) for x in qkvd), token_labels)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.where(real.reshape(real.shape[: a.ndim]), 0, a).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=15)
@given(st.data(), seeds)
def test_a_question_changes_no_bit_of_another(implementation, data, seed):
    length = LENGTHS[implementation]
    row = data.draw(rows(length))
    questions = sorted({(e, s) for e, s, r in zip(*row, strict=True) if e != PADDING and r == SELF})
    hypothesis.assume(questions)
    example_id, piece_id = data.draw(st.sampled_from(questions))
    changed = ((row.example_id == example_id) & (row.piece_id == piece_id))[:, None, None]
    (q, k, v, d), replacements = draw_qkvd(seed, length, B=1), draw_qkvd(seed + 1, length, B=1)
    token_labels = stack([row])
    before = results(implementation)(q, k, v, d, token_labels)[0]
    q, k, v = (np.where(changed, replacement, x) for x, replacement in zip((q, k, v), replacements, strict=False))
    after = results(implementation)(q, k, v, d, token_labels)[0]
    np.testing.assert_array_equal(np.where(changed, 0, before), np.where(changed, 0, after))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-4), (jnp.bfloat16, 2**-6)], ids=["float32", "bfloat16"]
)
def test_scores_may_be_of_any_size(implementation, dtype, tolerance):
    """Those of some queries leap from block to block by 100 nats, up or down, or are all 100 below zero, or above; it
    changes no bit of the other queries' outputs."""
    length, random = 700, np.random.default_rng(0)
    token_labels = stack([pack(examples, length) for examples in ([Example(100), Example(600)], [Example(length)])])
    q, k, v, d = (x * spread for x, spread in zip(draw_qkvd(0, length), (0.1, 0.1, 1, 1), strict=True))
    k[..., 0] = D**0.5 * np.repeat([[-100, 0, 100], [-100, -100, -100]], 256, 1)[:, :length, None]
    q[..., 0] = 0.1
    k, v, d = (x.astype(dtype) for x in (k, v, d))
    calm = results(implementation)(q.astype(dtype), k, v, d, token_labels)
    wild = random.random(length) < 0.1
    q[:, wild, :, 0] = random.choice([-1, 1], (wild.sum(), 1, H))
    q = q.astype(dtype)
    actual = results(implementation)(q, k, v, d, token_labels)
    assert_close(actual, reference([q, k, v, d], token_labels), tolerance)
    for a, b in zip(actual[:2], calm[:2], strict=True):
        np.testing.assert_array_equal(a[:, ~wild], b[:, ~wild])


def test_blocks_of_queries_share_a_row_evenly(monkeypatch):
    """On a TPU, five chunks in blocks of up to four: three and two, and not four and one."""
    monkeypatch.setattr(attention_tpu_plan, "CHUNKS", 4)
    token_labels = stack([pack([Example(200, [], [40] * 10)], 600)] * 2)
    qkvd = draw_qkvd(0, 600)
    assert attention_tpu_plan.AttentionPlan.of(*qkvd[:2], interpret=True).chunks == 3
    run = jax.jit(functools.partial(attention, implementation="tpu-interpreted"))
    for a, b in zip(run(*qkvd[:3], token_labels), reference(qkvd, token_labels)[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_row_may_be_cut_anywhere():
    """A shard of the queries, wherever it begins, against all of the keys: what context parallelism does."""
    token_labels = stack([pack([Example(30, [9] * 4, [7] * 3), Example(11, [5], [3, 3], star=True)], 104)])
    q, k, v, _ = draw_qkvd(0, 104, B=1)
    whole = attention(q, k, v, token_labels)
    for start in (0, 26, 52, 78):
        part = attention(q[:, start : start + 26], k, v, token_labels, q_start=jnp.int32(start))
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_allclose(a, b[:, start : start + 26], atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_tpu_kernels_have_no_races(direction):
    """Keys of several blocks in which the same queries come twice running: what the backward pass must wait for."""
    token_labels = stack([pack([Example(100, [], [90] * 4)], 512)])
    token_labels = TokenLabels(*map(jnp.asarray, token_labels))
    q, k, v, d_out = draw_qkvd(0, 512, B=1)
    inputs = (q, k, v, token_labels, token_labels, jnp.int32(0))
    out, log_sum = attention_tpu.forward(*inputs, interpret=True)
    detect = pltpu.InterpretParams(detect_races=True)
    if direction == "forward":
        actual, expected = attention_tpu.forward(*inputs, interpret=detect), (out, log_sum)
    else:
        more = log_sum, (out * d_out).sum(-1), d_out
        actual = attention_tpu.backward(*inputs, *more, interpret=detect)
        expected = attention_tpu.backward(*inputs, *more, interpret=True)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_memory_is_linear_in_the_length():
    def compiled(length: int) -> jax.stages.Compiled:
        q, k = (jax.ShapeDtypeStruct((1, length, heads, D), jnp.float32) for heads in (H, K))
        token_labels = TokenLabels(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 3)
        return results("xla").lower(q, k, k, q, token_labels).compile()

    short, long = compiled(4096), compiled(8192)
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[([\d,]+)\]", long.as_text())]
    assert 8192 * H * D in sizes  # the expression does find arrays
    assert max(sizes) < 8192**2 / 64
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (short, long)]
    assert temporary[1] < 2.2 * temporary[0]
