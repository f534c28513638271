"""The heads' kernels beside XLA's loops, by the compiler of a TPU that is not there, in one run.

    python -m benchmarks.heads [v5e v5p v6e tpu7x] [cross-entropy distillation scores] ["skewed KL" ..]
    python -m benchmarks.heads precision            errors of log-sums and of log-probabilities, on a CPU

Label scores; a cross-entropy, and distillation from another head, with both gradients. Of each: what the matrix unit
needs at least (floor), instruction bundles, the time of the bytes that must go to and from HBM (all at nominal clocks),
temporary memory, and for XLA's own operations the compiler's estimate, which has memory in it. A bundle is issued in a
cycle at best: time is at least the largest of the three. It ranks programs; it is no measurement. Bytes are counted by
hand: the head as often as it is read, gradients as often as they are added to.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.attention_static import DUMP, table  # isort: skip  # sets up libtpu

import shutil

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console

from benchmarks.bundles import costs_of, kernel_bundles
from brewjax.aot.topology import topology
from pallas_kernels import head_gradients_tpu, log_sum_exp_gpu, log_sum_exp_tpu
from pallas_kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.distillation import (
    Divergence,
    forward_kl,
    jensen_shannon,
    linear_distillation,
    reverse_kl,
    skewed_kl,
)
from pallas_kernels.label_scores import label_log_probs

CHIPS = {"v5e": "v5e-1x1", "v5p": "v5p-1x1x1", "v6e": "v6e-1x1", "tpu7x": "tpu7x-1x1x1"}
BF16, F32 = jnp.bfloat16, jnp.float32
V = 128_256
SCORES = [  # tokens, D, dtypes of hidden states and head, parts
    (500, 3072, BF16, BF16, (1,)),
    (500, 3072, F32, BF16, (2, 3)),
    (500, 3072, F32, F32, (2,)),
    (8192, 4096, F32, BF16, (2,)),
]
LOSSES = [(8192, 4096)]
DISTILLATIONS = [(8192, 3072, 4096)]  # tokens, D of student and teacher: brew-mini teaches brew-mini-turbo
DIVERGENCES = {
    "forward KL": forward_kl,
    "reverse KL": reverse_kl,
    "Jensen-Shannon": jensen_shannon(0.5),
    "skewed KL": skewed_kl(0.1),
}
CHUNKS = (512, 2048)  # tokens of XLA's loop


class Chip:
    """A device to compile for: a chip, or one of the two cores of tpu7x.

    A device of v5p is both cores. They share XLA's operations, and a kernel's first axis where it is "parallel".
    """

    def __init__(self, name: str):
        result = topology(CHIPS[name])
        self.name, self.clock = name, result.chip.clock
        self.mesh = jax.sharding.Mesh(np.array(result.devices[:1]), ("chip",))
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            self.info = pltpu.get_tpu_info()  # of a core
        self.cores = self.info.num_cores

    def compile(self, function: Callable, *shapes: Any) -> jax.stages.Compiled:
        shutil.rmtree(DUMP, ignore_errors=True)
        place = jax.NamedSharding(self.mesh, jax.P())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        local = jax.shard_map(function, mesh=self.mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(local).lower(*shapes).compile()

    def product_ms(self, macs: float) -> float:
        return macs * 2 / (self.cores * self.info.bf16_ops_per_second) * 1e3

    def bytes_ms(self, size: float) -> float:
        return size / (self.cores * self.info.mem_bw_bytes_per_second) * 1e3

    def cycles_ms(self, cycles: float, cores: int = 1) -> float:
        return cycles / self.clock / cores * 1e3


@dataclasses.dataclass
class Row:
    """Milliseconds, and bytes of temporary memory; no estimate for kernels."""

    floor: float
    bundles: float
    bytes: float
    estimate: float
    temporary: int

    @property
    def bound(self) -> float:
        return max(self.floor, self.bundles, self.bytes)

    def cells(self) -> list[str]:
        times = (self.floor, self.bundles, self.bytes, self.bound)
        estimate = f"{self.estimate:.2f}" if self.estimate else ""
        return [
            *(f"{x:.2f}" for x in times),
            f"{self.bound / self.floor:.2f}",
            estimate,
            f"{self.temporary / 1e6:,.0f}",
        ]


def score(chip: Chip, N: int, D: int, hidden: Any, head: Any, parts: int, implementation: str) -> Row:
    """Log-probabilities of eight labels against the vocabulary; XLA's loop takes as many passes as are exact."""
    shape = jax.ShapeDtypeStruct
    compiled = chip.compile(
        lambda x, w, labels: label_log_probs(x, w, labels, "vocabulary", parts=parts, implementation=implementation),
        *(shape((N, D), hidden), shape((V, D), head), shape((8,), jnp.int32)),
    )
    hidden_parts, head_parts = (parts if dtype == F32 else 1 for dtype in (hidden, head))
    rest = costs_of(compiled.as_text())
    row = Row(
        chip.product_ms(len(log_sum_exp_tpu.pairs(hidden_parts, head_parts)) * N * D * V),
        chip.cycles_ms(rest.bundles, chip.cores),
        chip.bytes_ms(V * D * jnp.dtype(head).itemsize) if implementation == "xla" else 0,
        chip.cycles_ms(rest.estimate),
        compiled.memory_analysis().temp_size_in_bytes,
    )
    if implementation != "xla":
        add_log_sum(row, chip, N, (D,), hidden, head, parts)
    return row


def add_log_sum(row: Row, chip: Chip, N: int, sizes: Sequence[int], hidden: Any, head: Any, parts: int) -> None:
    """Adds the bundles and bytes of a kernel for each of the model dimensions, which must have the same blocks."""
    vmem = chip.info.vmem_capacity_bytes
    ((n, v),) = {log_sum_exp_tpu.choose_blocks(N, D, hidden, head, parts, vmem, chip.cores) for D in sizes}
    depth = kernel_bundles("head_log_sum_exp")
    blocks, numbers = pl.cdiv(N, n), sum(sizes)
    bundles = blocks * (pl.cdiv(V, v) * depth[1] + n // log_sum_exp_tpu.SPLIT_ROWS * depth[2])
    row.bundles += chip.cycles_ms(bundles, min(chip.cores, blocks))
    row.bytes += chip.bytes_ms(
        blocks * V * numbers * jnp.dtype(head).itemsize + N * numbers * jnp.dtype(hidden).itemsize
    )
    row.estimate = 0


def train(chip: Chip, N: int, D: int, implementation: str, chunk: int = 512) -> Row:
    """A cross-entropy and both gradients, in bfloat16: four products."""
    shape = jax.ShapeDtypeStruct

    def step(x: Any, w: Any, targets: Any) -> Any:
        def loss(x: Any, w: Any) -> Any:
            return linear_cross_entropy(x, w, targets, chunk=chunk, implementation=implementation)[0]

        return jax.value_and_grad(loss, (0, 1))(x, w)

    compiled = chip.compile(step, shape((N, D), BF16), shape((V, D), BF16), shape((N,), jnp.int32))
    turns = pl.cdiv(N, chunk)
    rest = costs_of(compiled.as_text(), turns)
    # A turn reads the head three times, and adds to its float32 gradient, which is zeroed first, and rounded at last.
    loop_bytes = V * D * (turns * (3 * 2 + 2 * 4) + 2 * 4 + 2)
    row = Row(
        chip.product_ms(4 * N * D * V),
        chip.cycles_ms(rest.bundles, chip.cores),
        chip.bytes_ms(loop_bytes if implementation == "xla" else 6 * N * D * 2),  # or what compacts the tokens
        chip.cycles_ms(rest.estimate),
        compiled.memory_analysis().temp_size_in_bytes,
    )
    if implementation != "xla":
        add_log_sum(row, chip, N, (D,), BF16, BF16, 1)
        add_gradients(row, chip, N, D)
    return row


def add_gradients(row: Row, chip: Chip, N: int, D: int, E: int = 0) -> None:
    """Adds the kernel's bundles and bytes, in bfloat16; E is the teacher's model dimension, if there is one."""
    n, v = head_gradients_tpu.choose_gradient_blocks(N, D, 2, chip.info.vmem_capacity_bytes, E)
    depth = kernel_bundles("head_gradients")
    tiles, blocks = pl.cdiv(V, v), pl.cdiv(N, n)
    row.bundles += chip.cycles_ms(tiles * blocks * (depth[1] + v // head_gradients_tpu.SUB * depth[2]))
    row.bytes += chip.bytes_ms(tiles * N * (D * (2 + 8) + E * 2) + V * (2 * D + E) * 2)


def distill(chip: Chip, N: int, D: int, E: int, divergence: Divergence, implementation: str, chunk: int = 512) -> Row:
    """A divergence from another head and both gradients, in bfloat16."""
    shape = jax.ShapeDtypeStruct

    def step(x: Any, w: Any, teacher_x: Any, teacher_w: Any, weights: Any) -> Any:
        def loss(x: Any, w: Any) -> Any:
            how = {"divergence": divergence, "chunk": chunk, "implementation": implementation}
            return linear_distillation(x, w, teacher_x, teacher_w, weights, **how)[0]

        return jax.value_and_grad(loss, (0, 1))(x, w)

    models = [shape((rows, size), BF16) for size in (D, E) for rows in (N, V)]
    compiled = chip.compile(step, *models, shape((N,), F32))
    passes = 2 + (divergence.slope is None)  # over the logits of both models, the last one for gradients
    turns = pl.cdiv(N, chunk)
    rest = costs_of(compiled.as_text(), turns)
    # As for the cross-entropy; the student's head is read once more for the hidden states' gradient.
    loop_bytes = V * (turns * (passes * (D + E) * 2 + D * (2 + 2 * 4)) + D * (2 * 4 + 2))
    row = Row(
        chip.product_ms(N * V * (passes * (D + E) + 2 * D)),
        chip.cycles_ms(rest.bundles, chip.cores),
        chip.bytes_ms(loop_bytes if implementation == "xla" else 4 * N * (D + E) * 2 + 2 * N * D * 2),
        chip.cycles_ms(rest.estimate),
        compiled.memory_analysis().temp_size_in_bytes,
    )
    if implementation != "xla":
        add_log_sum(row, chip, N, (D, E), BF16, BF16, 1)
        if divergence.slope is None:
            add_divergence_sums(row, chip, N, D, E)
        add_gradients(row, chip, N, D, E)
    return row


def add_divergence_sums(row: Row, chip: Chip, N: int, D: int, E: int) -> None:
    """Adds the kernel's bundles and bytes."""
    n, v = log_sum_exp_tpu.choose_blocks(N, D + E, BF16, BF16, 1, chip.info.vmem_capacity_bytes, chip.cores)
    bundles = pl.cdiv(N, n) * pl.cdiv(V, v) * kernel_bundles("divergence_sums")[1]
    row.bundles += chip.cycles_ms(bundles, chip.cores)
    row.bytes += chip.bytes_ms((pl.cdiv(N, n) * V + N) * (D + E) * 2)


def cross_entropies(chip: Chip) -> Iterator[tuple[str, str, Row]]:
    for N, D in LOSSES:
        workload = f"cross-entropy and gradients, {N:,} x {D:,}"
        yield workload, "kernels", train(chip, N, D, "tpu")
        for chunk in CHUNKS:
            yield workload, f"XLA, chunk={chunk}", train(chip, N, D, "xla", chunk)


def distillations(chip: Chip) -> Iterator[tuple[str, str, Row]]:
    names = [name for name in DIVERGENCES if name in sys.argv[1:]] or list(DIVERGENCES)
    for (N, D, E), name in itertools.product(DISTILLATIONS, names):
        divergence = DIVERGENCES[name]
        workload = f"{name} and gradients, {N:,} x {D:,} from {E:,}"
        yield workload, "kernels", distill(chip, N, D, E, divergence, "tpu")
        yield workload, f"XLA, chunk={CHUNKS[-1]}", distill(chip, N, D, E, divergence, "xla", CHUNKS[-1])


def label_scores(chip: Chip) -> Iterator[tuple[str, str, Row]]:
    for N, D, hidden, head, all_parts in SCORES:
        workload = f"label scores, {N:,} x {D:,}, {jnp.dtype(hidden).name} x {jnp.dtype(head).name}"
        for parts in all_parts:
            by = f"kernel, {parts} part{'s' * (parts > 1)}"
            yield workload, by, score(chip, N, D, hidden, head, parts, "tpu")
        yield workload, "XLA", score(chip, N, D, hidden, head, 3, "xla")


KINDS = {"cross-entropy": cross_entropies, "distillation": distillations, "scores": label_scores}


def on_chips(chips: list[str], kinds: list[str]) -> None:
    columns = ("chip", "what", "by", "floor, ms", "bundles, ms", "bytes, ms", "least, ms", "over floor", "estimate, ms")
    shown = table("the heads", (*columns, "temporary, MB"))
    for chip, kind in itertools.product(map(Chip, chips), kinds):
        for workload, by, row in KINDS[kind](chip):
            shown.add_row(chip.name, workload, by, *row.cells())
            print(chip.name, workload, by, *row.cells(), file=sys.stderr, flush=True)  # compiling takes long
    Console(width=180).print(shown)


def on_cpu(N: int = 128, D: int = 3072, words: int = 5000) -> None:
    """Errors in units of the last place of float32, against float64; logits have a standard deviation of 3."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((N, D)), F32)
    shown = table(f"errors, {N} x {D:,} x {words:,}: mean / largest ulp", ("head", "by", "log-sum", "log-probability"))
    labels = np.array([1, 77, 4000, 4999])
    for dtype in (BF16, F32):
        head = jnp.asarray(random.standard_normal((words, D)) * 3 * D**-0.5, dtype)
        logits = np.float64(hidden) @ np.float64(head).T
        top = logits.max(-1)
        lse = top + np.log(np.exp(logits - top[:, None]).sum(-1))

        def show(by: str, parts: int, implementation: str, dtype=dtype, head=head, logits=logits, lse=lse) -> None:
            scores = label_log_probs(hidden, head, labels, "vocabulary", parts=parts, implementation=implementation)
            sums = ""
            if implementation == "tpu-interpreted":
                sums = errors(log_sum_exp_tpu.log_sum_exp(hidden, head, parts=parts, interpret=True)[0], lse)
            elif implementation == "gpu-interpreted":
                sums = errors(log_sum_exp_gpu.log_sum_exp(hidden, head, parts=parts, interpret=True), lse)
            exact = logits[:, labels] - lse[:, None]
            shown.add_row(jnp.dtype(dtype).name, by, sums, errors(scores, exact))

        for parts in (1, 2, 3):
            show(f"exact labels, log-sum of {parts} parts", parts, "tpu-interpreted")
            if dtype == BF16:
                show("the same, the GPU's kernel", parts, "gpu-interpreted")
        show("XLA's loop, HIGHEST", 3, "xla")
        rounded = jnp.matmul(hidden.astype(BF16), head.astype(BF16).T, preferred_element_type=F32)
        one_pass = rounded[:, labels] - jax.nn.logsumexp(rounded, -1, keepdims=True)
        shown.add_row(
            jnp.dtype(dtype).name, "all in one pass, a TPU's default", errors(jax.nn.logsumexp(rounded, -1), lse),
            errors(one_pass, logits[:, labels] - lse[:, None]),
        )  # fmt: skip
    Console(width=120).print(shown)


def errors(actual: Any, expected: np.ndarray) -> str:
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    error = np.abs(np.float64(actual) - expected) / ulp
    return f"{error.mean():,.1f} / {error.max():,.0f}"


if __name__ == "__main__":
    if "precision" in sys.argv[1:]:
        on_cpu()
    else:
        chips = [name for name in sys.argv[1:] if name in CHIPS] or ["v5e", "v6e", "tpu7x"]
        on_chips(chips, [kind for kind in sys.argv[1:] if kind in KINDS] or list(KINDS))
