import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.cross_entropy import linear_cross_entropy, linear_log_probs

N, V, D = 13, 21, 8
SIZES = [(1, 8), (5, 21), (512, 5)]  # tokens and words at a time: one, all, more than there are, not a divisor


@functools.cache
def value_and_grads(chunk: int, block: int):
    """Jitted (hidden, head, targets, weights) -> ((loss, count), (d_hidden, d_head))."""
    loss = functools.partial(linear_cross_entropy, chunk=chunk, block=block)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def dense(hidden, head, targets, weights):
    """The definition, in the dtype of the inputs."""
    log_probs = jax.nn.log_softmax(hidden @ head.T)
    picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[:, None], 1)[:, 0]
    return -jnp.sum(jnp.where(targets >= 0, weights * picked, 0))


def reference(hidden, head, targets, weights):
    with jax.enable_x64(True):
        loss, grads = dense(np.float64(hidden), np.float64(head), targets, np.float64(weights))
        return np.asarray(loss), [np.asarray(grad) for grad in grads]


def draw(seed: int, dtype=np.float32, N=N, V=V) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    hidden, head = random.standard_normal((N, D)), random.standard_normal((V, D))
    return (3 * hidden).astype(dtype), head.astype(dtype)


def assert_is_the_definition(chunk, block, hidden, head, targets, weights):
    (loss, count), grads = value_and_grads(chunk, block)(hidden, head, targets, weights)
    expected_loss, expected_grads = reference(hidden, head, targets, weights)
    np.testing.assert_allclose(count, np.sum(weights[targets >= 0]), rtol=1e-6)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for grad, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


seeds = st.integers(0, 2**32 - 1)
target = st.integers(0, V - 1)
# Some tokens with a target, all of them, none.
targets = st.one_of(
    st.lists(st.just(-1) | target, min_size=N, max_size=N),
    st.lists(target, min_size=N, max_size=N),
    st.just([-1] * N),
).map(lambda ids: np.array(ids, np.int32))
weights = st.lists(st.sampled_from([0, 0.25, 1, 3]), min_size=N, max_size=N).map(np.float32)


@pytest.mark.parametrize(("chunk", "block"), SIZES)
@settings(deadline=None, max_examples=25)
@given(seeds, targets, weights)
def test_loss_and_gradients_are_those_of_log_softmax(chunk, block, seed, targets, weights):
    assert_is_the_definition(chunk, block, *draw(seed), targets, weights)


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 7), st.integers(1, 9), seeds)
def test_any_shape_in_any_pieces(N, V, chunk, block, seed):
    targets = np.random.default_rng(seed).integers(-1, V, N)
    assert_is_the_definition(chunk, block, *draw(seed, N=N, V=V), targets, np.ones(N, np.float32))


def test_without_weights_each_target_counts_as_one():
    hidden, head = draw(0)
    targets = np.arange(N) % 3 - 1
    plain = linear_cross_entropy(hidden, head, targets)
    weighted = linear_cross_entropy(hidden, head, targets, np.ones(N, np.float32))
    assert plain == weighted
    assert plain[1] == np.sum(targets >= 0)


def test_large_logits():
    hidden, head = draw(3)
    targets = np.arange(N)
    (loss, _), _ = value_and_grads(5, 8)(300 * hidden, head, targets, np.ones(N, np.float32))
    expected, _ = reference(300 * hidden, head, targets, np.ones(N))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_target_that_is_no_word_is_not_passed_over():
    hidden, head = draw(4)
    assert np.isnan(linear_cross_entropy(hidden, head, np.full(N, V))[0])


@pytest.mark.parametrize(("chunk", "block"), SIZES)
def test_log_probs_of_each_token_and_their_gradients(chunk, block):
    """A loss that no weights known beforehand express: the square of each log-probability."""
    hidden, head = draw(3)
    targets = np.random.default_rng(3).integers(-1, V, N)
    of_all = jax.jit(functools.partial(linear_log_probs, chunk=chunk, block=block))
    with jax.enable_x64(True):
        logits = np.float64(hidden) @ np.float64(head).T
        rows = np.arange(N), np.maximum(targets, 0)
        expected = np.where(targets >= 0, np.asarray(jax.nn.log_softmax(logits))[rows], 0)
        expected_grads = jax.grad(
            lambda hidden, head: jnp.sum(jnp.where(targets >= 0, jax.nn.log_softmax(hidden @ head.T)[rows], 0) ** 2),
            argnums=(0, 1),
        )(np.float64(hidden), np.float64(head))
        expected_grads = [np.asarray(grad) for grad in expected_grads]
    np.testing.assert_allclose(of_all(hidden, head, targets), expected, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda *student: jnp.sum(of_all(*student, targets) ** 2), argnums=(0, 1))(hidden, head)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6 * np.abs(expected_grad).max())
