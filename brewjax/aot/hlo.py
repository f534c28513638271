"""Reads collectives, kernels and estimated cycles from a compiled program's text, multiplied by loop counts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Bytes that each of n devices sends for an array of `size` bytes, by the shortest route.
SENT = {"all-reduce": lambda size, n: 2 * size * (n - 1) / n, "collective-permute": lambda size, n: size}
BETWEEN_SLICES = " between slices"  # suffix of a kind: over the slower network between slices
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}


class Collective(NamedTuple):
    """A collective; equal ones are counted together.

    Attributes:
      kind: one of `KINDS`, with the suffix `BETWEEN_SLICES` if it uses that network.
      shape: of the whole array: gathered, reduced, or before it is scattered.
      devices: devices that take part in one.
      source: the part of the model that it comes from, by JAX's names of operations.
    """

    kind: str
    shape: str
    devices: int
    source: str

    @property
    def size(self) -> float:
        """Bytes of `shape`, in one device's memory."""
        return size_of(self.shape)

    @property
    def sent(self) -> float:
        """Bytes that each device sends."""
        return SENT.get(self.kind.removesuffix(BETWEEN_SLICES), lambda size, n: size * (n - 1) / n)(
            self.size, self.devices
        )


@dataclasses.dataclass
class Program:
    """What one run of a program does on each device.

    Attributes:
      collectives: runs of each.
      cycles: the compiler's estimates for its own operations, by source; it has none for kernels and collectives.
      kernels: runs of each kernel.
      unknown_loops: runs of loops whose length is only known at run time; their bodies are counted `turns` times.
      turns: of such a loop.
    """

    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    cycles: Counter[str] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: Counter[str] = dataclasses.field(default_factory=Counter)
    turns: int = 1


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    rest: str


def read(text: str, turns: int = 1) -> Program:
    """Reads the text of `compiled.as_text()`; `turns` are those of a loop whose length is only known at run time."""
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
            current.append(_Instruction(*match.groups()))
    program = Program(turns=turns)
    _walk(program, computations, entry, 1, fused=False)
    return program


def _walk(program: Program, computations: dict[str, list[_Instruction]], name: str, times: int, fused: bool) -> None:
    instructions = computations[name]
    starts = any('"AsyncCollectiveStart"' in instruction.rest for instruction in instructions)
    for instruction in instructions:
        if not fused and (cycles := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)):
            program.cycles[_source(instruction.rest)] += times * int(cycles[1])
        kind = instruction.op.removesuffix("-start")
        # An asynchronous collective is written in each fusion that it overlaps with; it is counted where it starts.
        if kind in KINDS and (starts or "chain_id=" not in instruction.rest):
            shape = instruction.shape
            if instruction.op.endswith("-start"):
                shape = max(re.findall(r"\w+\[[\d,]*\]", shape), key=size_of)
            devices = _group(instruction.rest)
            if kind == "reduce-scatter":
                shape = f"{devices} x {_plain(shape)}"
            if name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            program.collectives[Collective(kind, _plain(shape), devices, _source(instruction.rest))] += times
        if instruction.op == "send" and (between := re.search(r'megascale_transfer_type="(\w+)"', instruction.rest)):
            kind, shape = between[1].lower().replace("_", "-"), _plain(instruction.shape.partition(", u32[]")[0])
            program.collectives[
                Collective(kind + BETWEEN_SLICES, shape, _slices(instruction.rest), _source(instruction.rest))
            ] += times
        if instruction.op == "while":
            body, condition = (_called(key, instruction.rest)[0] for key in ("body", "condition"))
            trips = _trips(computations[condition])
            if trips is None:
                program.unknown_loops[_source(instruction.rest)] += times
            _walk(program, computations, body, times * (program.turns if trips is None else trips), fused)
        elif instruction.op in ("fusion", "async-start"):
            for called in _called("calls", instruction.rest):
                _walk(program, computations, called, times, fused=True)
        elif instruction.op in ("call", "conditional"):
            keys = "to_apply|calls|true_computation|false_computation|branch_computations"
            for called in _called(keys, instruction.rest):
                _walk(program, computations, called, times, fused)
        elif instruction.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest:
            program.kernels[re.sub(r"[.\d]+$", "", instruction.name)] += times


def _called(keys: str, rest: str) -> list[str]:
    matches = re.findall(rf"\b(?:{keys})=\{{?((?:%[\w.\-]+(?:, )?)+)", rest)
    return [name for names in matches for name in re.findall(r"%([\w.\-]+)", names)]


def _trips(condition: list[_Instruction]) -> int | None:
    """Iterations of a scan's loop, which counts from zero to a constant; None if the length is unknown."""
    constants = {
        instruction.name: int(instruction.rest.split(")")[0])
        for instruction in condition
        if instruction.op == "constant"
    }
    compares = [
        instruction for instruction in condition if instruction.op == "compare" and "direction=LT" in instruction.rest
    ]
    if len(compares) != 1:
        return None
    limit = re.findall(r"%([\w.\-]+)", compares[0].rest.split(")")[0])[1]
    return constants.get(limit)


def _group(rest: str) -> int:
    """The number of devices in one collective."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 2  # a permutation: from one device to another


def _slices(rest: str) -> int:
    """The number of slices in one collective: `{1,2}x{0:3}` or `{1:4}x{0:3}`, slices and then devices."""
    listed = re.search(r'megascale_target="\{([^}]*)\}', rest)
    ranges = [part.split(":") for part in listed[1].split(",")] if listed else []
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges) or 2


def _source(rest: str) -> str:
    """The last two names of the operation's path, and its pass: forward, backward or recomputed."""
    match = re.search(r'op_name="([^"]*)"', rest)
    if not match:
        return "the compiler's own"
    path = match[1]
    passes = "recomputed" if "rematted" in path else "backward" if "transpose(" in path else "forward"
    scopes = [_unwrap(name) for name in path.split("/")]
    names = [
        name for name in scopes if not re.fullmatch(r"|while|body|cond|closed_call|checkpoint|rematted.*|jit\(.*", name)
    ]
    return f"{'/'.join(names[-2:])}, {passes}"


def _unwrap(name: str) -> str:
    """A `jax.named_scope` without the transformations around it: "transpose(jvp(mlp))" is "mlp"."""
    while wrapped := re.fullmatch(r"(?:transpose|jvp|vmap)\((.*)\)", name):
        name = wrapped[1]
    return name


def _plain(shape: str) -> str:
    """A shape without its layout."""
    return " + ".join(re.findall(r"\d+ x \w+\[[\d,]*\]|\w+\[[\d,]*\]", shape))


def size_of(shape: str) -> float:
    """Bytes of all arrays in a shape, such as "2 x bf16[64,8]"."""
    total = 0.0
    for times, dtype, dims in re.findall(r"(?:(\d+) x )?(\w+)\[([\d,]*)\]", shape):
        bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 32)
        total += int(times or 1) * bits / 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total
