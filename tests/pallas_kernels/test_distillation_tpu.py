"""The TPU's kernels of distillation: against float64 and XLA's loop, interpreted, and through the compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.distillation import forward_kl, jensen_shannon, linear_distillation, reverse_kl, skewed_kl
from pallas_kernels.distillation_tpu import logits_gradient
from pallas_kernels.head_gradients_tpu import choose_gradient_blocks, gradients
from pallas_kernels.log_sum_exp_tpu import INTERPRETED_VMEM, choose_blocks
from tests.pallas_kernels.tpu import compile_for

N, V, D, E = 500, 700, 64, 96  # in interpret mode: blocks of tokens, and tiles of words the last of which is not whole
TEMPERATURE, SHARE = 2.0, 0.3


def kl(p, q):
    return np.sum(p * np.log(p / q), -1)


def skewed(p, q):
    return kl(p, SHARE * p + (1 - SHARE) * q)


# What is offered; its definition on probabilities of the teacher p and the student q; its derivative in q.
DIVERGENCES = {
    "forward KL": (forward_kl, kl, lambda p, q: -p / q),
    "reverse KL": (reverse_kl, lambda p, q: kl(q, p), lambda p, q: np.log(q / p) + 1),
    "Jensen-Shannon": (
        jensen_shannon(SHARE),
        lambda p, q: SHARE * skewed(p, q) + (1 - SHARE) * kl(q, SHARE * p + (1 - SHARE) * q),
        lambda p, q: (1 - SHARE) * np.log(q / (SHARE * p + (1 - SHARE) * q)),
    ),
    "skewed KL": (skewed_kl(SHARE), skewed, lambda p, q: -p * (1 - SHARE) / (SHARE * p + (1 - SHARE) * q)),
}
divergences = pytest.mark.parametrize("name", DIVERGENCES)


@functools.cache
def value_and_grads(name: str, implementation: str):
    """Jitted (hidden, head, teacher's hidden and head, weights) -> ((loss, count), (d_hidden, d_head))."""
    divergence = DIVERGENCES[name][0]
    loss = functools.partial(
        linear_distillation, divergence=divergence, temperature=TEMPERATURE, implementation=implementation
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def draw(dtype=np.float32):
    """Hidden states and head of a student and a teacher, and weights: a third of the tokens counts."""
    random = np.random.default_rng(0)
    matrices = [random.standard_normal(shape) for shape in ((N, D), (V, D), (N, E), (V, E))]
    matrices[1], matrices[3] = 2 * TEMPERATURE * matrices[1] * D**-0.5, 2 * TEMPERATURE * matrices[3] * E**-0.5
    weights = np.where(np.arange(N) % 3 == 1, random.random(N), 0)
    return *(np.asarray(x, dtype) for x in matrices), np.float32(weights)


def reference(name, hidden, head, teacher_hidden, teacher_head, weights):
    """float64 loss and gradients, of the tokens that count."""
    hidden, head, teacher_hidden, teacher_head = (
        np.float64(x) for x in (hidden[weights != 0], head, teacher_hidden[weights != 0], teacher_head)
    )
    q, p = (softmax(x @ w.T / TEMPERATURE) for x, w in ((hidden, head), (teacher_hidden, teacher_head)))
    _, value, derivative = DIVERGENCES[name]
    slopes, weight = derivative(p, q), np.float64(weights[weights != 0])
    d_logits = q * (slopes - np.sum(q * slopes, -1, keepdims=True)) * weight[:, None] * TEMPERATURE
    d_hidden = np.zeros((N, D))
    d_hidden[weights != 0] = d_logits @ head
    return TEMPERATURE**2 * weight @ value(p, q), (d_hidden, d_logits.T @ hidden)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def largest_error(actual, expected) -> float:
    return float(np.abs(np.float64(actual) - expected).max() / np.abs(expected).max())


def test_interpreted_shapes_have_several_blocks_and_tiles():
    n, v = choose_gradient_blocks(N, D, 4, INTERPRETED_VMEM, E)
    assert n * 2 < N
    assert v < V < 2 * v
    n, v = choose_blocks(N, D + E, np.float32, np.float32, 1, INTERPRETED_VMEM)
    assert n < N
    assert 2 * v < V


@divergences
def test_loss_and_gradients_against_float64(name):
    hidden, head, teacher_hidden, teacher_head, weights = draw()
    expected_loss, expected = reference(name, hidden, head, teacher_hidden, teacher_head, weights)
    hidden[weights == 0] = teacher_hidden[weights == 0] = np.nan  # of tokens that do not count
    models = hidden, head, teacher_hidden, teacher_head
    (loss, count), grads = value_and_grads(name, "tpu-interpreted")(*models, weights)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)
    for grad, exact in zip(grads, expected, strict=True):
        assert largest_error(grad, exact) < 3e-5
    (loss, count), grads = value_and_grads(name, "tpu-interpreted")(*models, np.zeros_like(weights))  # none counts
    assert loss == count == 0
    assert not any(np.asarray(grad).any() for grad in grads)


def test_without_gradients_the_loss_is_the_same():
    inputs = draw()
    loss, count = linear_distillation(*inputs, temperature=TEMPERATURE, implementation="tpu-interpreted")
    (expected, expected_count), _ = value_and_grads("forward KL", "tpu-interpreted")(*inputs)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert count == expected_count


def test_bfloat16_is_as_exact_as_the_loop():
    inputs = draw(jnp.bfloat16)
    expected_loss, expected = reference("forward KL", *inputs)
    errors = {}
    for implementation in ("xla", "tpu-interpreted"):
        (loss, _), grads = value_and_grads("forward KL", implementation)(*inputs)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        assert {grad.dtype for grad in grads} == {jnp.dtype(jnp.bfloat16)}
        errors[implementation] = [largest_error(*pair) for pair in zip(grads, expected, strict=True)]
    for ours, loop in zip(errors["tpu-interpreted"], errors["xla"], strict=True):
        assert ours < min(1.5 * loop, 1e-2)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits(shift):
    hidden, head, teacher_hidden, teacher_head, weights = draw()
    hidden[:, 0] = teacher_hidden[:, 0] = shift
    head[:, 0] = teacher_head[:, 0] = 1
    expected_loss, expected = reference("forward KL", hidden, head, teacher_hidden, teacher_head, weights)
    run = value_and_grads("forward KL", "tpu-interpreted")
    (loss, _), grads = run(hidden, head, teacher_hidden, teacher_head, weights)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-3)  # a unit of the last place of 10,000 is 0.001
    for grad, exact in zip(grads, expected, strict=True):
        assert largest_error(grad, exact) < 1e-2


def test_a_student_who_is_the_teacher_has_nothing_to_learn():
    hidden, head, _, _, weights = draw()
    (loss, _), grads = value_and_grads("forward KL", "tpu-interpreted")(hidden, head, hidden, head, weights)
    assert loss == 0
    assert not any(np.asarray(grad).any() for grad in grads)


def test_the_gradient_kernel_with_a_teacher_has_no_races():
    hidden, head, teacher_hidden, teacher_head, weights = draw()
    rows = [np.full(N, 7, np.float32), np.full(N, 7, np.float32), np.full(N, -1, np.float32), weights]
    gradients(
        [(hidden, head), (teacher_hidden, teacher_head)],
        rows,
        functools.partial(logits_gradient, forward_kl, 1.0),
        jnp.int32(N),
        has_terms=True,
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    assert not interpret_pallas_call.races.races_found


# --- what the TPU's compiler makes of it


def compile_step(chip: str, name: str, N: int, D: int, E: int, V: int) -> jax.stages.Compiled:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    loss = functools.partial(linear_distillation, divergence=DIVERGENCES[name][0], temperature=TEMPERATURE)
    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    weights = jax.ShapeDtypeStruct((N,), jnp.float32)
    compiled = compile_for(chip, step, shape((N, D)), shape((V, D)), shape((N, E)), shape((V, E)), weights)
    kernels = ["head_log_sum_exp", "head_gradients"] + ["divergence_sums"] * (name != "forward KL")
    assert all(kernel in compiled.as_text() for kernel in kernels)
    return compiled


@pytest.mark.parametrize(("chip", "name"), [("v5e", "Jensen-Shannon"), ("tpu7x", "skewed KL")])
def test_a_small_step_compiles(chip, name):
    compile_step(chip, name, 1024, 256, 384, 8192)


@pytest.mark.long
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    ("name", "N", "D", "E", "V"),
    [
        ("forward KL", 8192, 3072, 4096, 128_256),
        ("Jensen-Shannon", 8192, 3072, 4096, 128_256),
        ("reverse KL", 32_768, 4096, 6144, 32_768),
    ],
)
def test_training_shapes_compile(chip, name, N, D, E, V):
    memory = compile_step(chip, name, N, D, E, V).memory_analysis()
    # Hidden states of the tokens that count, and the float32 gradient of the student's, which the compiler for TPU7x
    # copies: no logits, no float32 head.
    copies = 2 if chip == "tpu7x" else 1
    assert memory.temp_size_in_bytes < N * (D * (2 + 4 * copies) + E * 2) * 1.1 + (1 << 20)
