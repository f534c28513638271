import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantized_matmul as qm
from pallas_kernels.quantized_matmul import Quantized, dequantize, quantize, quantized_matmul
from tests.pallas_kernels.tpu import CHIPS, compile_for, devices

E4M3, INT8 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8)
KINDS = [(E4M3, None), (E4M3, "per_token"), (INT8, None), (INT8, "per_token")]
kinds = pytest.mark.parametrize(("dtype", "activations"), KINDS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
seeds = st.integers(0, 2**32 - 1)

INPUTS = {  # float32 [48, 96] and [96, 80]
    "random": lambda random: (random.standard_normal((48, 96)), random.standard_normal((96, 80))),
    # A few features a hundred times the others, as in trained language models; weights with heavy tails.
    "outliers": lambda random: (
        random.standard_normal((48, 96)) * np.where(random.random(96) < 0.05, 100, 1),
        random.standard_t(2, (96, 80)),
    ),
    # Magnitudes from channel to channel and from token to token that no common scale would hold.
    "uneven": lambda random: (
        random.standard_normal((48, 96)) * np.exp(5 * random.standard_normal((48, 1))),
        random.standard_normal((96, 80)) * np.exp(5 * random.standard_normal(80)),
    ),
}


def draw(inputs: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, weight = INPUTS[inputs](np.random.default_rng(seed))
    return x.astype(np.float32), weight.astype(np.float32)


def rounding(x: np.ndarray, dtype: np.dtype, axis: int) -> np.ndarray:
    """How far a value can move: half a step of int8; 3 bits of fraction in e4m3, half a step below its 2^-6."""
    scale = np.abs(x).max(axis, keepdims=True) / qm.LIMITS[dtype]
    return np.broadcast_to(0.5 * scale, x.shape) if dtype == INT8 else np.maximum(np.abs(x) * 2**-4, scale * 2**-10)


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


@dtypes
@pytest.mark.parametrize("inputs", INPUTS)
@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_quantize_rounds_to_nearest(dtype, inputs, seed):
    _, weight = draw(inputs, seed)
    values, scale = quantize(weight, dtype)
    assert (values.dtype, scale.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(scale, np.abs(weight).max(0) / qm.LIMITS[dtype], rtol=1e-6)
    values = np.float32(values)
    scaled = weight / np.asarray(scale)
    nearest = np.rint if dtype == INT8 else lambda x: x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    # XLA's quotient may be a last place off, which moves what lies at the middle of a step.
    assert np.all((values == nearest(scaled * (1 - 3e-7))) | (values == nearest(scaled * (1 + 3e-7))))
    np.testing.assert_array_equal(np.abs(values).max(0), qm.LIMITS[dtype])
    assert np.all(np.abs(values * scale - weight) <= rounding(weight, dtype, 0) * (1 + 1e-5))


@pytest.mark.parametrize(
    ("dtype", "column", "expected"),
    [(INT8, [127, 0.5, 1.5, -2.5, 3.5], [127, 0, 2, -2, 4]), (E4M3, [448, 17, 19, -21, 2**-10], [448, 16, 20, -20, 0])],
    ids=str,
)
def test_ties_go_to_even(dtype, column, expected):
    values, scale = quantize(np.array(column, np.float32)[:, None], dtype)
    assert scale.tolist() == [1]
    assert np.float32(values)[:, 0].tolist() == expected


@dtypes
def test_channels_of_zeros_and_of_what_is_not_finite(dtype):
    _, weight = draw("random", 0)
    whole = quantize(weight, dtype)
    weight[:, 1] = 0
    weight[3, 2], weight[4, 3], weight[5, 4] = np.nan, np.inf, -np.inf
    weight[:, 5] = 1e-42  # subnormal
    quantized = quantize(weight, dtype)
    values, scale, matrix = *map(np.asarray, quantized), np.asarray(dequantize(quantized))
    assert not matrix[:, 1].any()
    assert np.isnan(matrix[:, 2:5]).all()
    assert np.abs(matrix[:, 5]).max() <= 1e-30
    finite = [0, *range(6, weight.shape[1])]
    np.testing.assert_array_equal(values[:, finite], np.asarray(whole.values)[:, finite])
    np.testing.assert_array_equal(scale[finite], np.asarray(whole.scale)[finite])


def test_e4m3_values_have_no_negative_zero_and_no_nan():
    weight = np.array([[1.0, np.nan], [-1e-9, 1], [-0.0, -1]], np.float32)
    assert np.asarray(quantize(weight, E4M3).values).view(np.uint8).tolist() == [[0x7E, 0], [0, 0], [0, 0]]


@kinds
@pytest.mark.parametrize("inputs", INPUTS)
def test_error_is_what_the_format_allows(dtype, activations, inputs):
    x, weight = draw(inputs, 2)
    out = np.asarray(quantized_matmul(x, quantize(weight, dtype), activations))
    exact = np.float64(x) @ np.float64(weight)
    moved_weight = rounding(weight, dtype, 0)
    moved_x = np.abs(x) * 2**-8 if activations is None else rounding(x, dtype, 1)
    allowed = np.abs(x) @ moved_weight + moved_x @ (np.abs(weight) + moved_weight)
    assert np.all(np.abs(out - exact) <= 1.001 * allowed)
    if inputs == "random":
        max_error = {(E4M3, None): 0.03, (E4M3, "per_token"): 0.042, (INT8, None): 0.008, (INT8, "per_token"): 0.011}
        assert relative_error(out, exact) < max_error[dtype, activations]
    elif dtype == E4M3:  # floating point: the large do not cost the small their bits
        assert relative_error(out, exact) < 0.05


@kinds
def test_against_the_product_of_what_was_rounded(dtype, activations):
    x, weight = draw("outliers", 3)
    weight = quantize(weight, dtype)
    if activations is None:
        rounded = np.float64(x.astype(jnp.bfloat16))
    else:
        rounded = np.float64(dequantize(quantize(x.T, dtype))).T
    exact = rounded @ np.float64(dequantize(weight))
    assert relative_error(np.asarray(quantized_matmul(x, weight, activations)), exact) < 1e-6


@kinds
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_token_spoils_no_other(dtype, activations, bad):
    x, weight = draw("random", 5)
    weight = quantize(weight, dtype)
    clean = np.asarray(quantized_matmul(x, weight, activations))
    x[7, 3] = bad
    out = np.asarray(quantized_matmul(x, weight, activations))
    assert not np.isfinite(out[7]).any()
    np.testing.assert_array_equal(np.delete(out, 7, 0), np.delete(clean, 7, 0))


@kinds
def test_zero_tokens_and_zero_channels_give_zeros(dtype, activations):
    x, weight = draw("random", 6)
    x[3], weight[:, 5] = 0, 0
    out = np.asarray(quantized_matmul(x, quantize(weight, dtype), activations))
    assert not out[3].any()
    assert not out[:, 5].any()
    assert np.count_nonzero(out) == 47 * 79


@kinds
def test_leading_dimensions_and_dtype_are_those_of_x(dtype, activations):
    x, weight = draw("random", 7)
    weight = quantize(weight, dtype)
    x = x.astype(jnp.bfloat16)
    out = quantized_matmul(x.reshape(2, 3, 8, 96), weight, activations)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.float32(out), np.float32(quantized_matmul(x, weight, activations)).reshape(2, 3, 8, 80)
    )


@kinds
def test_outputs_of_several_axes(dtype, activations):
    x, weight = draw("random", 7)
    matrix = quantize(weight, dtype)
    heads = Quantized(matrix.values.reshape(96, 5, 16), matrix.scale.reshape(5, 16))
    out = quantized_matmul(x.reshape(2, 24, 96), heads, activations)
    expected = np.asarray(quantized_matmul(x, matrix, activations)).reshape(2, 24, 5, 16)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


@kinds
def test_a_stack_of_weights_under_vmap(dtype, activations):
    x, weight = draw("random", 8)
    stack = np.stack([weight, np.roll(weight, 1), weight**3])
    out = jax.vmap(lambda weight: quantized_matmul(x, weight, activations))(quantize(stack, dtype))
    for i, weight in enumerate(stack):
        expected = quantized_matmul(x, quantize(weight, dtype), activations)
        np.testing.assert_allclose(out[i], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, weight: quantize(weight, jnp.float8_e5m2), "only to float8_e4m3fn or int8"),
        (lambda x, weight: quantized_matmul(x[:, :95], quantize(weight, E4M3)), r"\(48, 95\) .* \(96, 80\)"),
        (lambda x, weight: quantized_matmul(x, quantize(weight[None], E4M3)), "one matrix"),
        (lambda x, weight: quantized_matmul(x, quantize(weight, E4M3), "per_channel"), "'per_channel'"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw("random", 9))


def arguments(T: int, K: int, N: int, dtype) -> tuple[jax.ShapeDtypeStruct, Quantized]:
    weight = Quantized(jax.ShapeDtypeStruct((K, N), dtype), jax.ShapeDtypeStruct((N,), jnp.float32))
    return jax.ShapeDtypeStruct((T, K), jnp.bfloat16), weight


@kinds
@pytest.mark.parametrize("chip", CHIPS)
def test_no_chip_copies_the_weights_of_a_stack_of_layers(chip, dtype, activations):
    def layers(x, stack):
        def layer(total, weight):
            return total + quantized_matmul(x, weight, activations), None

        return jax.lax.scan(layer, jnp.zeros((512, 8192), x.dtype), stack)[0]

    x, weight = arguments(512, 3072, 8192, dtype)
    stack = jax.tree.map(lambda each: jax.ShapeDtypeStruct((4, *each.shape), each.dtype), weight)
    operations = makers(compile_for(chip, layers, x, stack), "4,3072,8192|3072,8192")
    assert "parameter" in operations
    assert operations <= {"parameter", "get-tuple-element", "bitcast"}


def makers(compiled: jax.stages.Compiled, shapes: str) -> set[str]:
    """The operations, outside of what XLA fuses, that make arrays of these shapes."""
    text = compiled.as_text()
    fused = set(re.findall(r"calls=%([\w.-]+)", text))  # made in no memory of its own
    computations = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))
    made = "".join(body for name, body in computations.items() if name not in fused)
    return set(re.findall(rf" = \S*\[(?:{shapes})\]\S* ([\w-]+)\(", made))


def sharded(mesh: jax.sharding.Mesh):
    """`quantized_matmul` with the out dimension split over the mesh."""
    return jax.shard_map(
        functools.partial(quantized_matmul, activations="per_token"),
        mesh=mesh,
        in_specs=(jax.P(), Quantized(jax.P(None, "tensor"), jax.P("tensor"))),
        out_specs=jax.P(None, "tensor"),
    )


def test_in_shard_map_compiles_for_a_mesh_of_tpus():
    mesh = jax.sharding.Mesh(np.array(devices("v5e", 2)), ("tensor",))
    x, weight = arguments(8, 3072, 32768, E4M3)

    def split(a, *spec):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    weight = Quantized(split(weight.values, None, "tensor"), split(weight.scale, "tensor"))
    compiled = compile_for("v5e", sharded(mesh), split(x), weight)
    assert makers(compiled, "3072,8192") <= {"parameter", "copy-start", "copy-done"}  # it may come onto the chip early
    assert "all-" not in compiled.as_text()  # nothing is gathered or summed


def test_in_shard_map_equals_outside():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    x, weight = draw("random", 10)
    weight = quantize(weight, E4M3)
    out = jax.jit(sharded(mesh))(x, weight)
    np.testing.assert_allclose(out, quantized_matmul(x, weight, "per_token"), rtol=1e-5, atol=1e-4)
