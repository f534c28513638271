"""The heads on a GPU: the kernel of the log-sum beside XLA's loops, compiled for an H100; where there is a GPU, timed.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python -m benchmarks.heads_h100

Needs CUDA's packages (`pip install 'brewjax[gpu]'`) and, to compile, no GPU. Milliseconds by an H100's data sheet: the
products, and the bytes that go to and from memory. The kernel does both at once, and takes at least the larger of the
two; XLA's loop is one operation after another, and takes at least the larger where all that it writes stays in the
cache (50 MB), and the sum where nothing does. Bytes are counted by hand from the operations that the compiler makes of
the loop: it copies a block of the head before it multiplies it, and writes logits that two reductions then read.
Registers, spills and shared memory are those that ptxas and XLA name. None of this is a measurement.
"""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.attention_h100 import compile_for_h100, compiled, console, milliseconds, run  # isort: skip  # sets up XLA

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from pallas_kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.label_scores import label_log_probs
from pallas_kernels.log_sum_exp_gpu import choose_groups

BF16, F32 = jnp.bfloat16, jnp.float32
TENSOR_CORES, FLOAT32, BANDWIDTH = 989e12, 67e12, 3.35e12  # an H100's FLOP/s (bfloat16, float32) and bytes/s
V = 128_256
SCORES = [(500, 3072, BF16, 1), (500, 3072, F32, 2), (500, 3072, F32, 3), (8192, 4096, F32, 2)]  # N, D, hidden, parts
CROSS_ENTROPY = (8192, 4096)  # tokens, D
CHUNKS = (512, 2048)
shape = jax.ShapeDtypeStruct


def scores(implementation: str, parts: int, hidden: Any, head: Any, labels: Any) -> Any:
    return label_log_probs(hidden, head, labels, "vocabulary", parts=parts, implementation=implementation)


def step(implementation: str, chunk: int, hidden: Any, head: Any, targets: Any) -> Any:
    """A cross-entropy and both gradients."""

    def loss(hidden: Any, head: Any) -> Any:
        return linear_cross_entropy(hidden, head, targets, chunk=chunk, implementation=implementation)[0]

    return jax.value_and_grad(loss, (0, 1))(hidden, head)


def add(table: Table, workload: str, by: str, products: float, size: float, temporary: int, serial: bool) -> None:
    memory = size / BANDWIDTH * 1e3
    bound = f"{max(products, memory):.2f}"
    if serial:
        bound = f"{products:.2f} - {products + memory:.2f}"
    table.add_row(workload, by, f"{products:.2f}", f"{memory:.2f}", bound, f"{temporary / 1e6:,.0f}")


def count() -> None:
    kernels = Table("hidden states", "parts", "registers", "spills, bytes", "shared, bytes", "products by")
    table = Table("what", "by", "products, ms", "bytes, ms", "least, ms", "temporary, MB", title="H100")
    for N, D, dtype, parts in SCORES:
        workload = f"label scores, {N:,} x {D:,}, {jnp.dtype(dtype).name} x bfloat16"
        shapes = shape((N, D), dtype), shape((V, D), BF16), shape((8,), jnp.int32)
        function = functools.partial(scores, "gpu", parts)
        head_bytes, logits_bytes, flops = V * D * 2, N * V * 4, 2 * N * D * V
        temporary = compile_for_h100(function, *shapes).memory_analysis().temp_size_in_bytes
        groups, _ = choose_groups(N, D, parts)
        products = parts * flops / TENSOR_CORES * 1e3
        add(table, workload, f"kernel, parts={parts}", products, groups * head_bytes, temporary, False)
        if parts < 3:
            rate = FLOAT32 if dtype == F32 else TENSOR_CORES
            loop = compile_for_h100(functools.partial(scores, "xla", parts), *shapes)
            temporary = loop.memory_analysis().temp_size_in_bytes
            add(table, workload, "loop", flops / rate * 1e3, 3 * (head_bytes + logits_bytes), temporary, True)
        for _, *result in compiled("head_", function, *shapes):
            kernels.add_row(f"{N:,} x {D:,} {jnp.dtype(dtype).name}", str(parts), *map(str, result))
    N, D = CROSS_ENTROPY
    workload, shapes = f"cross-entropy and gradients, {N:,} x {D:,}", (shape((N, D), BF16), shape((V, D), BF16))
    for implementation in ("xla", "gpu"):
        for chunk in CHUNKS:
            program = compile_for_h100(functools.partial(step, implementation, chunk), *shapes, shape((N,), jnp.int32))
            # The loop, for a chunk: the head copied, read; copied again, and read by two products; its float32 gradient
            # written, read and added to. Logits written, read twice; written again, read and rounded, and that read
            # twice. The kernel takes the place of the first half of both.
            head, logits = (30, 26) if implementation == "xla" else (24, 14)
            size = N // chunk * head * V * D + logits * N * V
            if implementation == "gpu":
                size += choose_groups(N, D, 1)[0] * V * D * 2
            by = f"loop, chunk={chunk}" if implementation == "xla" else f"kernel, then loop, chunk={chunk}"
            temporary = program.memory_analysis().temp_size_in_bytes
            add(table, workload, by, 8 * N * D * V / TENSOR_CORES * 1e3, size, temporary, True)
    console.print(table)
    console.print(kernels)


# With a GPU.


def check() -> None:
    """Errors of log-probabilities against float64, in units of the last place: mean / largest, and the loop's."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((500, 3072)), F32)
    head = jnp.asarray(random.standard_normal((5000, 3072)) * 3 * 3072**-0.5, BF16)
    labels = jnp.arange(8) * 600
    logits = np.float64(hidden) @ np.float64(head).T
    expected = logits[:, labels] - np.log(np.exp(logits).sum(-1, keepdims=True))
    for name, parts in (("gpu", 1), ("gpu", 2), ("gpu", 3), ("xla", 2)):
        actual = np.float64(jax.jit(functools.partial(scores, name, parts))(hidden, head, labels))
        ulps = np.abs(actual - expected) / np.spacing(np.abs(expected).astype(np.float32))
        console.print(f"{name}, parts={parts}: {ulps.mean():,.1f} / {ulps.max():,.0f}")
        assert parts == 1 or ulps.max() < 100


def time_all() -> None:
    table = Table("what", "kernel, ms", "loop, ms", "kernel / loop")
    key = jax.random.key(0)
    for N, D, dtype, parts in SCORES:
        arrays = jax.random.normal(key, (N, D), dtype), jax.random.normal(key, (V, D), BF16) / 16, jnp.arange(8)
        times = [milliseconds(functools.partial(scores, name, parts), *arrays) for name in ("gpu", "xla")]
        workload = f"label scores, {N:,} x {D:,}, {jnp.dtype(dtype).name}, parts={parts}"
        table.add_row(workload, *(f"{time:.2f}" for time in times), f"{times[0] / times[1]:.2f}")
    N, D = CROSS_ENTROPY
    arrays = jax.random.normal(key, (N, D), BF16), jax.random.normal(key, (V, D), BF16) / 16, jnp.arange(N)
    for chunk in CHUNKS:
        times = [milliseconds(functools.partial(step, name, chunk), *arrays) for name in ("gpu", "xla")]
        workload = f"cross-entropy and gradients, chunk={chunk}"
        table.add_row(workload, *(f"{time:.2f}" for time in times), f"{times[0] / times[1]:.2f}")
    console.print(table)


if __name__ == "__main__":
    run(count, check, time_all)
