"""Instruction bundles of what a compiled program runs, kernels and XLA's operations, from the compiler's own dump."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping

from benchmarks.attention_static import DUMP  # isort: skip  # sets up libtpu

SKIPPED = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


@dataclasses.dataclass
class Cost:
    """Of one run: bundles, and the compiler's estimate in cycles."""

    bundles: int = 0
    estimate: int = 0


def costs_of(text: str, turns: int = 1) -> Cost:
    """Of XLA's own operations, in loops as often as they run; `turns` of a loop whose length is known at run time."""
    computations: dict[str, list[tuple[str, ...]]] = {}
    entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
            current.append(match.groups())
    cost = Cost()

    def trips(condition: str) -> int:
        constants = {name: rest for name, _, op, rest in computations[condition] if op == "constant"}
        compares = [rest for *_, op, rest in computations[condition] if op == "compare" and "direction=LT" in rest]
        limits = re.findall(r"%([\w.\-]+)", compares[0].split(")")[0]) if len(compares) == 1 else []
        return next((int(constants[name].split(")")[0]) for name in limits if name in constants), turns)

    def walk(computation: str, times: int) -> None:
        for name, _, op, rest in computations[computation]:
            called = dict(re.findall(r"(\w+)=%([\w.\-]+)", rest))
            if op == "while":
                walk(called["body"], times * trips(called["condition"]))
            elif op in ("call", "conditional"):
                for key in ("to_apply", "calls", "true_computation", "false_computation"):
                    if key in called:
                        walk(called[key], times)
            elif op not in SKIPPED and "tpu_custom_call" not in rest:
                cost.bundles += times * bounds(rest) * count_bundles(name)
                cost.estimate += times * int((re.search(r'"estimated_cycles":"(\d+)"', rest) or (0, 0))[1])

    walk(entry, 1)
    return cost


def kernel_bundles(name: str) -> Mapping[int, int]:
    """Bundles of all kernels of a name, by the depth of loops: 1 is a step of the grid, 2 a loop in a step."""
    pattern = re.compile(rf"\d+-\w*{re.escape(name)}[\w.]*-\d+-final_bundles\.txt")
    files = [file for file in DUMP.iterdir() if pattern.fullmatch(file.name)]
    assert files, f"the dump in {DUMP} has no kernel {name}"
    lines = (
        re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:\s*(>*)\s*\{", line)
        for file in files
        for line in file.read_text().splitlines()
    )
    return Counter(len(line[1]) for line in lines if line)


def bounds(rest: str) -> int:
    """Steps of one of XLA's own operations."""
    result = re.search(r'"iteration_bounds":\[([^\]]*)\]', rest)
    return math.prod(int(n) for n in re.findall(r"\d+", result[1])) if result else 1


def count_bundles(name: str) -> int:
    """Of a step of an operation."""
    files = [
        file for file in DUMP.iterdir() if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-final_bundles\.txt", file.name)
    ]
    return sum("0x" in line[:8] for file in files for line in file.read_text().splitlines())
