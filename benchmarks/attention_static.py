"""What the TPU compiler says of the attention kernels, without a TPU: bundles, spills, and an estimate from them.

    python -m benchmarks.attention_static [v5e v6e ..]

A visit's code is compiled by itself, once for each kind of visit, and its instruction bundles are counted in the
compiler's own dump. A bundle is issued in a cycle at best, so that time is at least the bundles, and at least what the
matrix unit needs: the estimate is the larger of the two, for every visit of the layout's worklist, none of which runs
again. It ranks kernels; it is not a measurement. Heads of size 128, bfloat16.

Exits with 1 where a kernel misses what is held: `MAX_PAIRS_OVER_IDEAL`, and no spills where nothing is masked on v5e.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

# Read when libtpu is first loaded.
os.environ["BUNDLES"] = tempfile.mkdtemp(prefix="bundles-")
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={os.environ['BUNDLES']} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*|.*final_hlo.*"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console
from rich.table import Table

from benchmarks.layouts import LAYOUTS, PACKED, STAR, make_labels
from pallas_kernels import attention_tpu
from pallas_kernels.attention_tpu_plan import TILE, AttentionPlan, Line, kinds_and_labels, largest_divisor
from pallas_kernels.token_labels import TokenLabels, dense_mask
from pallas_kernels.worklist import FULL_BLOCK

DUMP = Path(os.environ["BUNDLES"])
TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # Hz, nominal
D = 128
SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
PRODUCTS = {"forward": 2, "backward": 5}  # of queries x keys x D
GROUPS = (1, 4)  # query heads on one key head
MAX_PAIRS_OVER_IDEAL = {STAR: 1.12, PACKED: 1.6}  # with tiles of 128 queries, the smallest that fill a matrix unit
WITHOUT_SPILLS = ("v5e",)


class Chip:
    """One core of a chip to compile for."""

    def __init__(self, name: str):
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[name], chips_per_host_bounds=(1, 1, 1)
        )
        self.mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("chip",))
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            peak = pltpu.get_tpu_info().bf16_ops_per_second
        self.clock = CLOCKS[name]
        self.products_a_cycle = round(peak / 2 / self.clock)

    def cycles(self, direction: str, pairs: int) -> int:
        """What the matrix unit needs for so many pairs of tokens."""
        return round(pairs * D * PRODUCTS[direction] / self.products_a_cycle)

    def milliseconds(self, cycles: int) -> float:
        return cycles / self.clock * 1e3

    def compile(
        self, function: Callable, *shapes: jax.ShapeDtypeStruct, name: str = "token_label_attention"
    ) -> dict[str, int]:
        """Bundles of the kernel of that name, and how many slots of each kind they fill."""
        shutil.rmtree(DUMP, ignore_errors=True)
        local = jax.shard_map(function, mesh=self.mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        place = jax.NamedSharding(self.mesh, jax.P())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            jax.jit(local).lower(*shapes).compile()
        (file,) = DUMP.glob(f"*{name}*static-per-bundle-utilization.txt")
        bundles = np.array([line.split() for line in file.read_text().split("== UTILIZATION:")[1].strip().split("\n")])
        return {"bundles": len(bundles)} | dict(zip(SLOTS, bundles.astype(int).sum(0).tolist(), strict=True))


Slots = dict[str, int]
"""Bundles, slots by kind, pairs of tokens, and the cycles that the matrix unit needs for these."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a visit costs, for all heads of a group.

    Attributes:
      visit: whatever it does.
      every: where every query sees every key.
      masked: where that is not so, besides its lines.
      lines: for each of the plan's lines.
    """

    plan: AttentionPlan
    visit: Slots
    every: Slots
    masked: Slots
    lines: list[Slots]


def costs(chip: Chip, direction: str, group: int = 1) -> Costs:
    """Compiled with nothing in a visit but what is asked about."""
    length = 4096
    shape = jax.ShapeDtypeStruct
    q, k = (shape((1, length, heads, D), jnp.bfloat16) for heads in (group, 1))
    labels = TokenLabels(*[shape((1, length), jnp.int32)] * 3)
    inputs = [q, k, k, labels, labels, shape((), jnp.int32)]
    if direction == "backward":
        inputs += [*[shape((1, length, group), jnp.float32)] * 2, q]
    with jax.sharding.use_abstract_mesh(chip.mesh.abstract_mesh):
        plan = AttentionPlan.of(q, k, False)

    def compile_only(visit: Callable) -> Counter:
        def only(plan, kind, whole, masked, masks):
            visit(whole, masked, masks)

        def nothing(run, jobs, mask):  # but some code, or the compiler would leave out the question
            mask[0] = jnp.zeros_like(mask[0])

        # A kernel that never begins or ends a block, has no other kind of visit, and runs nothing again.
        with mock.patch.multiple(attention_tpu, _visit=only, _edges=lambda block, i: (False, False), _rerun=nothing):
            return Counter(chip.compile(getattr(attention_tpu, direction), *inputs))

    def less(a: Counter, b: Counter) -> Counter:
        return Counter({slot: a[slot] - b[slot] for slot in a})

    def slots(result: Counter, pairs: int = 0) -> Slots:
        return dict(result) | {"pairs": pairs, "cycles": chip.cycles(direction, pairs)}

    def along(line: Line) -> Callable:
        return lambda whole, masked, masks: attention_tpu._run_line(plan, masked, masks, line)

    longest = max(plan.diagonals, key=len)  # all key tiles are in it

    def prepared(whole: Callable, masked: Callable, masks: attention_tpu.Masks) -> None:
        masks.prepare()
        pl.when(masks.start >= 0)(lambda: along(longest)(whole, masked, masks))  # apart from it, as in the kernel

    empty = compile_only(lambda *_: None)
    every = less(compile_only(lambda whole, *_: attention_tpu._run_full_block(plan, whole)), empty)
    chunks = group * plan.chunks
    times = chunks // largest_divisor(chunks, attention_tpu.UNROLL)  # the code is in a loop

    @functools.cache
    def line_cost(count: int, is_row: bool) -> Counter:
        """The first line of that form: others are the same code elsewhere."""
        line = next(line for line in plan.lines if len(line) == count and (line in plan.rows) == is_row)
        whole = less(compile_only(along(line)), empty)
        more = group // largest_divisor(group, attention_tpu.UNROLL // len(line)) - 1
        if not more:
            return whole
        with mock.patch.object(attention_tpu.Masks, "make"):
            heads = less(compile_only(along(line)), empty)  # in a loop, behind the masks of all heads
        return Counter({slot: whole[slot] + more * heads[slot] for slot in whole})

    lines = [line_cost(len(line), line in plan.rows) for line in plan.lines]
    return Costs(
        plan,
        slots(empty),
        slots(Counter({slot: times * every[slot] for slot in every}), plan.queries * plan.keys * group),
        slots(less(compile_only(prepared), compile_only(along(longest)))),
        [slots(line, len(tiles) * TILE**2 * group) for line, tiles in zip(lines, plan.lines, strict=True)],
    )


def estimate(cost: Costs, kinds: np.ndarray) -> tuple[int, int]:
    """Cycles of all visits of these kinds, and the pairs of tokens they compute, for one head of the group."""
    cycles = visited = 0
    for kind in kinds:
        parts = [cost.every]
        if kind != FULL_BLOCK:
            parts = [cost.masked, *(line for bit, line in enumerate(cost.lines) if kind >> bit & 1)]
        cycles += cost.visit["bundles"] + sum(max(part["bundles"], part["cycles"]) for part in parts)
        visited += sum(part["pairs"] for part in parts)
    return cycles // cost.plan.group, visited // cost.plan.group


def pairs(labels: TokenLabels) -> int:
    """Pairs of tokens that must be computed."""
    length, step = labels.example_id.shape[1], 512
    row = TokenLabels(*(jnp.asarray(x[0]) for x in labels))
    count = jax.jit(lambda at: dense_mask(TokenLabels(*(x[at] for x in row)), row, at, np.arange(length)).sum())
    return sum(int(count(np.arange(start, min(start + step, length)))) for start in range(0, length, step))


def kinds_of(plan: AttentionPlan, labels: TokenLabels) -> np.ndarray:
    """The kinds [1, query blocks, key blocks] of a layout's pairs of blocks, by kernels of that plan's blocks."""
    length = labels.example_id.shape[1]
    plan = dataclasses.replace(plan, T=length, S=length)
    return np.asarray(jax.jit(lambda labels: kinds_and_labels(plan, labels, labels, 0)[0])(labels))


def visits(plan: AttentionPlan, labels: TokenLabels) -> np.ndarray:
    """The kinds of a layout's visits."""
    kinds = kinds_of(plan, labels)
    return kinds[kinds != 0]


def main(chips: list[str]) -> list[str]:
    """Prints the tables; returns what was missed."""
    console, missed = Console(width=110), []
    ideal = {name: pairs(make_labels(name)) for name in LAYOUTS}
    for chip_name, direction, group in itertools.product(chips, PRODUCTS, GROUPS):
        chip = Chip(chip_name)
        cost = costs(chip, direction, group)
        plan = cost.plan
        title = f"{chip_name} {direction}, {group} query heads on one"
        code = table(
            f"{title}: a visit of {plan.queries} queries x {plan.keys} keys",
            ("what", "bundles", "MXU cycles", "MXU slots", "VALU slots", "spills"),
        )
        forms = {
            f"{'row' if line in plan.rows else 'diagonal'} of {len(line)} tiles": n for n, line in enumerate(plan.lines)
        }
        for name, slots in {
            "visit": cost.visit,
            "every": cost.every,
            **{x: cost.lines[n] for x, n in forms.items()},
        }.items():
            code.add_row(name, *(f"{slots[x]:,}" for x in ("bundles", "cycles", "MXU", "VALU", "SPILL")))
        console.print(code)
        times = table(
            f"{title}: estimate per query head",
            ("layout", "visits", "partly masked", "pairs over ideal", "MXU floor, ms", "estimate, ms"),
        )
        for name in LAYOUTS:
            kinds = visits(plan, make_labels(name))
            cycles, visited = estimate(cost, kinds)
            if visited > MAX_PAIRS_OVER_IDEAL.get(name, float("inf")) * ideal[name]:
                limit = MAX_PAIRS_OVER_IDEAL[name]
                missed.append(f"{title}: {visited / ideal[name]:.3f} pairs over ideal for {name}, over {limit}")
            floor = chip.milliseconds(chip.cycles(direction, ideal[name]))
            masked = (kinds != FULL_BLOCK).sum()
            numbers = (f"{visited / ideal[name]:.3f}", f"{floor:.2f}", f"{chip.milliseconds(cycles):.2f}")
            times.add_row(name, f"{len(kinds):,}", f"{masked:,}", *numbers)
        console.print(times)
        if chip_name in WITHOUT_SPILLS and cost.every["SPILL"]:
            missed.append(f"{title}: {cost.every['SPILL']} spills where nothing is masked")
    return missed


def table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


if __name__ == "__main__":
    sys.exit("\n".join(main([name for name in sys.argv[1:] if name in TOPOLOGIES] or list(TOPOLOGIES))) or None)
