"""Attention on a CPU: blocks over a worklist against a dense mask, forward and backward, in one process.

    python -m benchmarks.attention_cpu [length ..]

Expected before it was run: near the ratio of the pairs computed, since both do the same products on what they visit.
Times on shared machines are rough; the ratio is what counts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.layouts import example
from pallas_kernels.attention import attention, attention_reference
from pallas_kernels.attention_xla import BLOCK
from pallas_kernels.token_labels import TokenLabels
from pallas_kernels.worklist import block_visibility

H, K, D = 4, 2, 64
ROUNDS = 5


def layouts(length: int) -> dict[str, np.ndarray]:
    """Half history, half items; a star; plain causal."""
    half = length // 2
    return {
        f"{half} + {half // 32} x 32": example(half, [], [32] * (half // 32)),
        f"star: {half} in events of 32": example(32, [32] * (half // 32 - 1), [32] * (half // 32), star=True),
        "plain causal": example(length, [], []),
    }


def step(function: Callable) -> Callable:
    """Jitted gradients of a sum of the output."""
    return jax.jit(jax.grad(lambda q, k, v, token_labels: function(q, k, v, token_labels)[0].sum(), argnums=(0, 1, 2)))


def main(lengths: list[int]) -> None:
    table = Table(title="gradients of attention, 4 heads of 64 over 2, float32", title_justify="left")
    for column in ("length", "layout", "pairs, dense / visited", "time, dense / ours", "memory, dense, MB", "ours, MB"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for length in lengths:
        for name, labels in layouts(length).items():
            token_labels = TokenLabels(*(jnp.asarray(x)[None] for x in labels.T))
            q, k, v = (jax.random.normal(jax.random.key(n), (1, length, h, D)) for n, h in enumerate((H, K, K)))
            methods = [step(attention_reference), step(attention)]
            memory = [
                method.lower(q, k, v, token_labels).compile().memory_analysis().temp_size_in_bytes for method in methods
            ]
            seconds = np.zeros((ROUNDS + 1, 2))
            for at in np.ndindex(seconds.shape):  # in turn; the first round compiles
                start_time = time.perf_counter()
                jax.block_until_ready(methods[at[1]](q, k, v, token_labels))
                seconds[at] = time.perf_counter() - start_time
            ratio = np.median(seconds[1:, 0] / seconds[1:, 1])
            visited = int(block_visibility(token_labels, token_labels, 0, BLOCK, BLOCK).any.sum()) * BLOCK**2
            table.add_row(
                f"{length:,}", name, f"{length**2 / visited:.1f}", f"{ratio:.1f}", *(f"{x / 1e6:,.0f}" for x in memory)
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or [1024, 2048, 4096])
