"""Cross-entropy by kernels: against float64 and XLA's loop, interpreted; the TPU's through its compiler too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cross_entropy import linear_cross_entropy, linear_log_probs, logits_gradient
from pallas_kernels.head_gradients_tpu import choose_gradient_blocks, gradients
from pallas_kernels.log_sum_exp_tpu import INTERPRETED_VMEM
from tests.pallas_kernels.tpu import compile_for

N, V, D = 600, 1700, 128  # in interpret mode: blocks of tokens, and tiles of words the last of which is not whole
# The GPU's kernel takes bfloat16 heads, and XLA's loop makes its gradients.
KERNELS = [("tpu-interpreted", jnp.float32), ("tpu-interpreted", jnp.bfloat16), ("gpu-interpreted", jnp.bfloat16)]
TOLERANCES = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
each_kernel = pytest.mark.parametrize(("implementation", "dtype"), KERNELS, ids=str)


@functools.cache
def value_and_grads(implementation: str):
    """Jitted (hidden, head, targets, weights) -> ((loss, count), (d_hidden, d_head))."""
    loss = functools.partial(linear_cross_entropy, implementation=implementation)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def draw(dtype, size: float = 2.0):
    """Logits are about as large as `size`; a third of the tokens counts."""
    random = np.random.default_rng(0)
    hidden, head = random.standard_normal((N, D)), random.standard_normal((V, D)) * size * D**-0.5
    targets = random.integers(0, V, N).astype(np.int32)
    targets[:7], targets[-3:] = -1, 5  # no target; one target of several tokens
    weights = np.where(np.arange(N) % 3 == 1, random.random(N), 0).astype(np.float32)
    return np.asarray(hidden, dtype), np.asarray(head, dtype), targets, weights


def reference(hidden, head, targets, weights):
    """float64 loss and gradients."""
    hidden, head = np.float64(hidden), np.float64(head)
    logits = hidden @ head.T
    top = logits.max(-1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    weights = np.where(targets >= 0, np.float64(weights), 0)
    rows = np.arange(N), np.maximum(targets, 0)
    d_logits = np.exp(logits - lse)
    d_logits[rows] -= 1
    d_logits *= weights[:, None]
    return weights @ (lse[:, 0] - logits[rows]), (d_logits @ head, d_logits.T @ hidden)


def largest_error(actual, expected) -> float:
    return float(np.abs(np.float64(actual) - expected).max() / np.abs(expected).max())


def test_interpreted_shapes_have_several_blocks_and_tiles():
    blocks = choose_gradient_blocks(N, D, 4, INTERPRETED_VMEM)
    assert blocks.n * 3 <= N + blocks.n
    assert blocks.v * 2 < V


@each_kernel
def test_loss_and_gradients_against_float64_and_the_loop(implementation, dtype):
    inputs = draw(dtype)
    expected_loss, expected = reference(*inputs)
    errors = {}
    for name in ("xla", implementation):
        (loss, count), grads = value_and_grads(name)(*inputs)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        np.testing.assert_allclose(count, inputs[3][inputs[2] >= 0].sum(), rtol=1e-6)
        assert {grad.dtype for grad in grads} == {jnp.dtype(dtype)}
        errors[name] = [largest_error(*pair) for pair in zip(grads, expected, strict=True)]
    for ours, loop in zip(errors[implementation], errors["xla"], strict=True):
        assert ours < 1.5 * loop + 1e-6
        assert ours < TOLERANCES[dtype]


@each_kernel
def test_tokens_that_do_not_count_give_nothing_and_get_nothing(implementation, dtype):
    hidden, head, targets, weights = draw(dtype)
    run = value_and_grads(implementation)
    clean = run(hidden, head, targets, weights)
    counts = (targets >= 0) & (weights != 0)
    hidden[~counts] = np.nan
    poisoned = run(hidden, head, targets, weights)
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    assert not np.asarray(clean[1][0])[~counts].any()
    (loss, count), grads = run(hidden, head, targets, np.zeros_like(weights))  # none counts
    assert loss == count == 0
    assert not any(np.asarray(grad).any() for grad in grads)


@each_kernel
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits(implementation, dtype, shift):
    hidden, head, targets, weights = draw(dtype)
    hidden[:, 0], head[:, 0] = shift, 1
    expected_loss, expected = reference(hidden, head, targets, weights)
    (loss, _), grads = value_and_grads(implementation)(hidden, head, targets, weights)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)  # a unit of the last place of 10,000 is 0.001
    for grad, exact in zip(grads, expected, strict=True):
        assert largest_error(grad, exact) < max(5e-3, TOLERANCES[dtype])


@each_kernel
def test_a_target_that_is_no_word_is_not_passed_over(implementation, dtype):
    hidden, head, targets, weights = draw(dtype)
    targets[1] = V
    assert np.isnan(value_and_grads(implementation)(hidden, head, targets, weights)[0][0])


@each_kernel
def test_log_probs_of_each_token_and_gradients_of_their_squares(implementation, dtype):
    hidden, head, targets, _ = draw(dtype)
    targets[::2] = -1

    def squares(implementation, hidden, head):
        log_probs = linear_log_probs(hidden, head, targets, implementation=implementation)
        return jnp.sum(log_probs**2), log_probs

    by = {
        name: jax.jit(jax.value_and_grad(functools.partial(squares, name), argnums=(0, 1), has_aux=True))(hidden, head)
        for name in ("xla", implementation)
    }
    (_, expected), expected_grads = by["xla"]
    (_, actual), grads = by[implementation]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    for grad, exact in zip(grads, expected_grads, strict=True):
        assert largest_error(grad, np.float64(exact)) < TOLERANCES[dtype]


def test_the_gradient_kernel_has_no_races():
    hidden, head, targets, weights = draw(jnp.float32)
    hidden, targets, weights = hidden[:300], targets[:300], weights[:300]
    gradients(
        [(hidden, head[:1000])],
        [np.zeros(300, np.float32), targets, weights],
        logits_gradient,
        jnp.int32(300),
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    assert not interpret_pallas_call.races.races_found


# --- what the TPU's compiler makes of it


def compile_step(chip: str, N: int, D: int, V: int) -> jax.stages.Compiled:
    shape = jax.ShapeDtypeStruct
    matrices = shape((N, D), jnp.bfloat16), shape((V, D), jnp.bfloat16)
    step = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1), has_aux=True)
    compiled = compile_for(chip, step, *matrices, shape((N,), jnp.int32), shape((N,), jnp.float32))
    assert "head_log_sum_exp" in compiled.as_text()
    assert "head_gradients" in compiled.as_text()
    return compiled


@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_a_small_step_compiles(chip):
    compile_step(chip, 1024, 256, 8192)


@pytest.mark.long
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize(("N", "D", "V"), [(8192, 4096, 128_256), (32_768, 6144, 32_768), (16_384, 2048, 49_152)])
def test_training_shapes_compile(chip, N, D, V):
    memory = compile_step(chip, N, D, V).memory_analysis()
    # The hidden states of the tokens that count, and their float32 gradient: no logits, no float32 head.
    assert memory.temp_size_in_bytes < N * D * (2 + 4) * 1.1 + (1 << 20)
