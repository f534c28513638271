"""Compiles a program ahead of time, and reports its memory, cycles and collectives."""

from __future__ import annotations

import math
import re
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brewjax.aot.hlo import BETWEEN_SLICES, Program, read
from brewjax.aot.program import TracedProgram
from brewjax.aot.topology import GIB, Topology
from brewjax.model.config import ModelConfig
from brewjax.model.sharding import data_parallel_size
from brewjax.train.loop import TrainConfig


class Memory(NamedTuple):
    """Bytes on each device. `temporaries` includes the program itself; outputs may reuse donated arguments."""

    arguments: float
    outputs: float
    temporaries: float
    peak: float


class Compiled(NamedTuple):
    """The result of a compilation; `program` is None if it did not fit into memory."""

    work: TracedProgram
    memory: Memory
    program: Program | None
    seconds: float


class Roofline(NamedTuple):
    """Lower bounds of a run's seconds, and the model FLOPs utilisation that they allow.

    Attributes:
      compute: the model's FLOPs at the chip's peak.
      operations: the compiler's estimate of its own operations, plus kernels (attention, experts) at the chip's peak;
        without the head's kernels, which compute the tokens that count only.
      sent: the bytes of collectives over all links of a slice at once.
    """

    compute: float
    operations: float
    sent: float

    @property
    def overlapped(self) -> float:
        """Utilisation if computation and communication overlap fully."""
        return self.compute / max(self)

    @property
    def serial(self) -> float:
        """Utilisation if they do not overlap."""
        return self.compute / max(self.compute, self.operations + self.sent)


def compile_work(work: TracedProgram) -> Compiled:
    """Runs the TPU compiler. A program that does not fit is no error: its peak is what the compiler says it needs.

    Args:
      work: a traced program, and the shapes and shardings of its arguments.

    Returns:
      What the compiler says of memory (bytes of a device) and of operations, None where the program does not fit; and
      the seconds that it took.
    """
    leaves = jax.tree.leaves(work.arguments)
    arguments = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    start_time = time.monotonic()
    try:
        compiled = work.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
        if not used:
            raise
        size, unit = (group for group in used.groups() if group)
        peak = float(size) * 1024.0 ** " KMGT".index(unit)
        return Compiled(work, Memory(arguments, 0.0, 0.0, peak), None, time.monotonic() - start_time)
    analysis = compiled.memory_analysis()
    temporaries = analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
    new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = Memory(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        temporaries,
        analysis.argument_size_in_bytes + new_outputs + temporaries,
    )
    return Compiled(work, memory, read(compiled.as_text()), time.monotonic() - start_time)


def roofline(compiled: Compiled, where: Topology) -> Roofline:
    """The lower bounds of a compiled program on a topology."""
    assert compiled.program is not None
    chip, work = where.chip, compiled.work
    peak = len(where.devices) * chip.flops
    sent = sum(
        times * collective.sent
        for collective, times in compiled.program.collectives.items()
        if BETWEEN_SLICES not in collective.kind
    )
    operations = compiled.program.cycles.total() / chip.clock + work.kernel_flops / peak
    return Roofline(work.flops / peak, operations, sent / chip.ici)


def advice(model: ModelConfig, config: TrainConfig, mesh: Mesh, memory: Memory, hbm: float) -> str:
    """Says what to change such that a training step fits: the cheapest change that is not made yet.

    Args:
      model: the shape of the decoder.
      config: of the training run.
      mesh: that the step was compiled for.
      memory: that it needs on a device.
      hbm: bytes of memory of a device.

    Returns:
      A line, with the settings to change.
    """
    num_devices, sizes = data_parallel_size(mesh), dict(mesh.shape)
    spread = f"more devices along fsdp (now {sizes['fsdp']}), expert ({sizes['expert']}) or tensor ({sizes['tensor']})"
    if memory.arguments > 0.8 * hbm:
        return f"parameters and optimiser state alone take {memory.arguments / GIB:.2f} GiB of a device: {spread}"
    if not model.remat:
        return "remat: true in the model recomputes activations instead of storing them"
    num_rows = config.batch_size // config.gradient_accumulation_steps // num_devices
    if num_rows > 1:
        singly = f"train.gradient_accumulation_steps={config.batch_size // num_devices}"
        return f"{num_rows} rows are computed at once on a device: {singly} takes them singly"
    longer = 2 * sizes["context"]
    return f"one row of {config.seq_len} tokens is too much for a device: train.mesh.context={longer}; or {spread}"


def show(compiled: Compiled, where: Topology, suggestion: str, console: Console, longest: int = 16) -> None:
    """Prints the report of a program.

    Args:
      compiled: the program.
      where: the devices that it was compiled for.
      suggestion: what to change; printed only if the program does not fit.
      console: that is printed to.
      longest: rows of a table, at most.
    """
    memory, hbm, program = compiled.memory, where.chip.hbm, compiled.program
    table = Table(title=f"{compiled.work.name}, compiled in {compiled.seconds:.0f} s", show_header=False)
    share = f"{memory.peak / hbm:.1%} of {hbm / GIB:.2f} GiB"
    table.add_row("arguments", _gib(memory.arguments))
    if program:
        table.add_row("outputs (in place of arguments where they are donated)", _gib(memory.outputs))
        table.add_row("temporaries and program", _gib(memory.temporaries))
    verdict = ("", "") if program else (" DOES NOT FIT", "red")
    table.add_row("peak of a device", Text.assemble(f"{_gib(memory.peak)}: {share}", verdict))
    if not program:
        table.add_row("to make it fit", suggestion)
        console.print(table)
        return
    devices, limits = len(where.devices), roofline(compiled, where)
    table.add_row("model FLOPs, over all devices", f"{compiled.work.flops:.4g}")
    table.add_row("model FLOPs of a device at its peak", f"{limits.compute * 1000:,.2f} ms")
    table.add_row("estimated cycles", f"{program.cycles.total():,}")
    table.add_row("these, and kernels at the peak", f"{limits.operations * 1000:,.2f} ms")
    table.add_row("collectives, over all links at once", f"{limits.sent * 1000:,.2f} ms")
    between = [
        times * collective.sent
        for collective, times in program.collectives.items()
        if BETWEEN_SLICES in collective.kind
    ]
    if between:
        table.add_row("a device sends between slices, in no estimate here", _gib(sum(between)))
    if limits.compute:
        overlapped, serial = f"{limits.overlapped:.1%}", f"{limits.serial:.1%}"
        table.add_row("utilisation is at most", f"{overlapped} (all at once), {serial} (one after the other)")
    for kernel, times in sorted(program.kernels.items()):
        table.add_row(f"kernel {kernel}", f"{times:,} times")
    for loop, times in sorted(program.unknown_loops.items()):
        table.add_row(f"loop of unknown length in {loop}", f"{times:,} times, its body counted once")
    console.print(table)
    _show_cycles(program, console, longest)
    if devices > 1:
        _show_collectives(program, console, longest)


def _show_cycles(program: Program, console: Console, longest: int) -> None:
    table = Table(title="estimated cycles of a device", caption=f"the {longest} that take most")
    table.add_column("share", justify="right")
    table.add_column("where")
    for source, cycles in program.cycles.most_common(longest):
        table.add_row(f"{cycles / program.cycles.total():.1%}", source)
    console.print(table)


def _show_collectives(program: Program, console: Console, longest: int) -> None:
    kinds = sorted({collective.kind for collective in program.collectives})
    table = Table(title="collectives of a device", caption=f"by kind, then the {longest} that send most")
    for heading in ("kind", "times", "bytes", "sent", "among", "of", "where"):
        number = heading in ("times", "bytes", "sent", "among")
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for kind in kinds:
        alike = [(collective, times) for collective, times in program.collectives.items() if collective.kind == kind]
        size, sent = (
            sum(times * collective.size for collective, times in alike),
            sum(times * collective.sent for collective, times in alike),
        )
        table.add_row(kind, f"{sum(times for _, times in alike):,}", _gib(size), _gib(sent))
    table.add_section()
    ranked = sorted(program.collectives.items(), key=lambda item: -item[0].sent * item[1])
    for collective, times in ranked[:longest]:
        sizes = _gib(times * collective.size), _gib(times * collective.sent)
        table.add_row(
            collective.kind, f"{times:,}", *sizes, str(collective.devices), collective.shape, collective.source
        )
    console.print(table)


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f} GiB"
