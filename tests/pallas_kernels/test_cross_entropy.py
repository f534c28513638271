import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.cross_entropy import linear_cross_entropy

N, V, D = 13, 21, 8
CHUNKS = (1, 5, 512)  # one token, does not divide N, more than N


@functools.cache
def value_and_grads(chunk: int | None):
    """Jitted (hidden, head, targets) -> ((loss, count), (d_hidden, d_head)); chunk None is the definition."""
    loss = cross_entropy_reference if chunk is None else functools.partial(linear_cross_entropy, chunk=chunk)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def cross_entropy_reference(hidden, head, targets):
    logits = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32).T)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], 1)[:, 0]
    return -jnp.sum(jnp.where(targets >= 0, picked, 0)), jnp.sum(targets >= 0)


def draw(seed: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    hidden, head = random.standard_normal((N, D)), random.standard_normal((V, D))
    return (3 * hidden).astype(dtype), head.astype(dtype)


seeds = st.integers(0, 2**32 - 1)
target = st.integers(0, V - 1)
# Some tokens with a target, all of them, none.
targets = st.one_of(
    st.lists(st.just(-1) | target, min_size=N, max_size=N),
    st.lists(target, min_size=N, max_size=N),
    st.just([-1] * N),
).map(lambda drawn: np.array(drawn, np.int32))


@pytest.mark.parametrize("chunk", CHUNKS)
@settings(deadline=None, max_examples=40)
@given(seeds, targets)
def test_loss_and_gradients_are_those_of_log_softmax(chunk, seed, targets):
    hidden, head = draw(seed)
    (loss, count), grads = value_and_grads(chunk)(hidden, head, targets)
    (expected_loss, _), expected_grads = value_and_grads(None)(hidden, head, targets)
    assert count == np.sum(targets >= 0)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for grad, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_gradients_scale_with_the_cotangent():
    hidden, head = map(jnp.asarray, draw(0))
    targets = jnp.arange(N) % 3 - 1
    _, vjp, _ = jax.vjp(lambda *inputs: linear_cross_entropy(*inputs, targets, 5), hidden, head, has_aux=True)
    for once, thrice in zip(vjp(jnp.float32(1)), vjp(jnp.float32(-3)), strict=True):
        np.testing.assert_allclose(thrice, -3 * once, rtol=1e-6)


def test_bfloat16_in_float32_loss():
    hidden, head = draw(1, jnp.bfloat16)
    targets = np.arange(N) % 3 - 1
    (loss, count), grads = value_and_grads(5)(hidden, head, targets)
    (expected_loss, _), expected_grads = value_and_grads(None)(hidden, head, targets)
    assert loss.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)  # products of bfloat16 are exact in float32
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(grad), np.float32(expected), rtol=2**-7, atol=2**-7)


def test_a_token_without_a_target_gives_nothing():
    hidden, head = draw(2)
    targets = np.arange(N) % 2 - 1
    poisoned = np.where(targets[:, None] >= 0, hidden, np.nan)
    (loss, _), (d_hidden, d_head) = value_and_grads(5)(poisoned, head, targets)
    (clean_loss, _), clean_grads = value_and_grads(5)(hidden, head, targets)
    assert loss == clean_loss
    np.testing.assert_array_equal(d_hidden, clean_grads[0])
    np.testing.assert_array_equal(d_head, clean_grads[1])
    assert not np.any(np.asarray(d_hidden)[targets < 0])


def test_no_array_of_tokens_by_words():
    hidden, head = jax.ShapeDtypeStruct((4096, 64), jnp.float32), jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    compiled = value_and_grads(128).lower(hidden, head, jax.ShapeDtypeStruct((4096,), jnp.int32)).compile()
    a_few_chunks = 6 * 4 * 128 * 8192
    assert compiled.memory_analysis().temp_size_in_bytes < a_few_chunks
