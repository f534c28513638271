"""What holds for every fused loss of a linear head."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.distillation import (
    SparseTeacher,
    forward_kl,
    jensen_shannon,
    linear_distillation,
    top_k_distillation,
)
from pallas_kernels.linear_loss import LossPlan, fused_linear_loss
from tests.pallas_kernels.tpu import CHIPS, compile_for

ROOT = Path(__file__).parents[2]
V, D, E, K = 21, 8, 6, 4


def inputs(N: int, dtype=np.float32) -> tuple[tuple, dict[str, np.ndarray]]:
    """The student's hidden states and head; what is known of each token, every third of which counts."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape).astype(dtype)  # noqa: E731
    tokens = {
        "targets": random.integers(0, V, N),
        "teacher_hidden": normal(N, E),
        "ids": np.argsort(random.random((N, V)))[:, :K],
        "log_probs": np.log(random.dirichlet(np.ones(K + 1), N)[:, :K]).astype(np.float32),
        "weights": np.float32(np.arange(N) % 3 == 1) * 2,
    }
    return (normal(N, D), normal(V, D)), tokens


def cross_entropy(hidden, head, tokens, **sizes):
    return linear_cross_entropy(hidden, head, tokens["targets"], tokens["weights"], **sizes)


def another_head(hidden, head, tokens, **sizes):
    teacher_head = jnp.sin(jnp.arange(len(head) * E, dtype=hidden.dtype)).reshape(-1, E)
    js = jensen_shannon(0.4)
    return linear_distillation(hidden, head, tokens["teacher_hidden"], teacher_head, tokens["weights"], js, **sizes)


def few_words(hidden, head, tokens, **sizes):
    return top_k_distillation(hidden, head, tokens["ids"], tokens["log_probs"], tokens["weights"], **sizes)


LOSSES = [cross_entropy, another_head, few_words]
every_loss = pytest.mark.parametrize("loss", LOSSES)


@functools.cache
def value_and_grads(loss, chunk=4, block=8):
    """Jitted (hidden, head, tokens) -> ((sum, count), (d_hidden, d_head))."""
    loss = functools.partial(loss, chunk=chunk, block=block)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), actual, expected)


@every_loss
def test_a_token_that_does_not_count_gives_nothing_and_gets_nothing(loss):
    student, tokens = inputs(10)
    counts = tokens["weights"] > 0
    clean = value_and_grads(loss)(*student, tokens)

    def poison(x):
        if x.dtype != np.float32:
            return x
        return np.where(counts.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan)

    poisoned = {name: x if name == "weights" else poison(x) for name, x in tokens.items()}
    actual = value_and_grads(loss)(poison(student[0]), student[1], poisoned)
    jax.tree.map(np.testing.assert_array_equal, actual, clean)
    d_hidden = np.asarray(actual[1][0])
    assert d_hidden[counts].any(-1).all()
    assert not d_hidden[~counts].any()


@pytest.mark.parametrize(("counting", "chunks"), [(0, 0), (1, 1), (8, 2), (9, 3), (64, 16)])
def test_only_tokens_that_count_are_computed(counting, chunks):
    started = []

    class Counted(SparseTeacher):
        def start(self, *args):
            jax.debug.callback(lambda: started.append(1))
            return super().start(*args)

    student, tokens = inputs(64)
    weights = np.random.default_rng(1).permutation(np.arange(64) < counting).astype(np.float32)
    teacher = tokens["ids"], np.zeros((64, K + 1), np.float32)
    jax.block_until_ready(fused_linear_loss(LossPlan(Counted(forward_kl), 1.0, 4, V), student, [], teacher, weights))
    jax.effects_barrier()
    assert len(started) == chunks


@every_loss
def test_gradients_scale_with_the_cotangent(loss):
    student, tokens = inputs(10)
    grads = jax.jit(jax.grad(lambda *student: -3 * loss(*student, tokens, chunk=4, block=8)[0], argnums=(0, 1)))
    assert_close(grads(*student), jax.tree.map(lambda x: -3 * x, value_and_grads(loss)(*student, tokens)[1]))


@every_loss
def test_bfloat16_in_float32_loss(loss):
    student, tokens = inputs(10, jnp.bfloat16)
    (total, count), grads = value_and_grads(loss)(*student, tokens)
    exact = jax.tree.map(lambda x: np.float32(x) if x.dtype == jnp.bfloat16 else x, (student, tokens))
    (expected, _), expected_grads = value_and_grads(loss)(*exact[0], exact[1])
    assert total.dtype == count.dtype == jnp.float32
    # Products of bfloat16 are exact in float32; the teacher's head was rounded for one of the two.
    np.testing.assert_allclose(total, expected, rtol=1e-2 if loss is another_head else 1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(grad), expected_grad, rtol=2**-6, atol=2**-6)


@every_loss
def test_the_same_when_recomputed_in_the_backward_pass(loss):
    student, tokens = inputs(10)
    again = jax.checkpoint(functools.partial(loss, chunk=4, block=8))
    actual = jax.jit(jax.value_and_grad(again, argnums=(0, 1), has_aux=True))(*student, tokens)
    assert_close(actual, value_and_grads(loss)(*student, tokens))


@every_loss
def test_no_array_of_tokens_by_words(loss):
    N, V, chunk, block = 4096, 8192, 64, 512
    student, tokens = inputs(N)
    head = jax.ShapeDtypeStruct((V, D), jnp.float32)
    compiled = value_and_grads(loss, chunk, block).lower(student[0], head, tokens).compile()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())]
    assert chunk * block in sizes  # the expression does find arrays
    assert max(sizes) <= max(V * D, N * D)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (8 * chunk * block + 4 * V * D + 4 * N * D)


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_tpu(chip):
    student, tokens = inputs(32, jnp.bfloat16)
    all_three = lambda hidden, head, tokens: sum(loss(hidden, head, tokens, chunk=8, block=16)[0] for loss in LOSSES)  # noqa: E731
    compile_for(chip, jax.value_and_grad(all_three, argnums=(0, 1)), *student, tokens)


def test_each_device_its_own_tokens(tmp_path):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.pallas_kernels.test_linear_loss", tmp_path]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    student, tokens = inputs(20)
    for loss in LOSSES:
        actual = [x for _, x in sorted(np.load(tmp_path / f"{loss.__name__}.npz").items())]
        assert_close(actual, jax.tree.leaves(value_and_grads(loss)(*student, tokens)))


def main(folder: Path) -> None:
    """Losses and gradients with the tokens split over four devices, and a copy of the head on each."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    for loss in LOSSES:

        def local(hidden, head, tokens, loss=loss):
            return jax.lax.psum(loss(hidden, head, tokens, chunk=2, block=8), "data")

        split = jax.P("data")
        whole = jax.shard_map(local, in_specs=(split, jax.P(), split), out_specs=jax.P(), check_vma=False)
        with jax.set_mesh(mesh):
            student, tokens = inputs(20)
            placed = jax.device_put((student[0], tokens), jax.NamedSharding(mesh, split))
            actual = jax.jit(jax.value_and_grad(whole, argnums=(0, 1), has_aux=True))(placed[0], student[1], placed[1])
        np.savez(folder / f"{loss.__name__}.npz", *jax.tree.leaves(actual))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
