"""The kernels of `attention_static` beside those of others with a hand-made mask, in one run.

    pip install tokamax, then: python -m benchmarks.attention_rivals [v5e v6e ..]

4096 + 500 x 64 tokens, one query head of size 128, bfloat16, blocks of 512 x 512. Both rivals are splash attention with
a mask function of numbers that are stored with each query: here the beginning of its item and its own place.

    stock    JAX's own: a grid of query blocks x the most visits of any; always masked; dq, then dk and dv
    tokamax  a worklist, masked where a block is seen in part; one backward pass. What its sums over dq's parts
             cost after its kernel is not counted
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

from benchmarks.attention_static import CLOCKS, PRODUCTS, Chip, costs, estimate, kinds_of, pairs, visits  # isort: skip  # sets up libtpu

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as stock
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo as StockMaskInfo
from rich.console import Console
from rich.table import Table
from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as tokamax
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_mask_info import MaskInfo as TokamaxMaskInfo

from benchmarks.layouts import make_labels
from pallas_kernels.worklist import FULL_BLOCK

LAYOUT, PREFIX, D, BLOCK = "4096 + 500 x 64", 4096, 128, 512
LENGTH = 36352  # the layout's 36,096 tokens in whole blocks


def sees(q: jax.Array, k: jax.Array) -> jax.Array:
    """`q`: the beginning of the query's item in the upper 16 bits, its own place in the lower."""
    return (k <= (q & 0xFFFF)) & ((k < PREFIX) | (k >= (q >> 16)))


class Steps(NamedTuple):
    """How often a kernel comes by, and how often it then computes a block, without a mask and with one."""

    all: int
    every: int
    some: int


def compile_parts(
    chip: Chip, module: ModuleType, call: Callable, inputs: list, parts: dict[str, int]
) -> dict[str, dict[str, int]]:
    """Bundles of a kernel's parts: of those under its nth `pl.when`, beside what each step costs anyway ("step")."""

    def compile_only(branch: int | None) -> dict[str, int]:
        conditions = []

        def when(condition: object) -> Callable:
            conditions.append(condition)
            return lambda body: body() if len(conditions) - 1 == branch else None

        with mock.patch.object(module, "pl", SimpleNamespace(**(vars(pl) | {"when": when}))):
            return chip.compile(call, *inputs, name="splash")

    empty = compile_only(None)
    result = {"step": empty}
    for name, branch in parts.items():
        whole = compile_only(branch)
        result[name] = {slot: whole[slot] - empty[slot] for slot in whole}
    return result


def cycles(chip: Chip, products: int, parts: dict[str, dict[str, int]], steps: Steps) -> int:
    """The estimate: bundles of every step, and of every block computed these or what the matrix unit needs."""
    floor = round(BLOCK**2 * D * products / chip.products_a_cycle)
    block_cycles = {name: max(parts[name]["bundles"], floor) for name in ("every", "some")}
    return (
        steps.all * parts["step"]["bundles"] + steps.every * block_cycles["every"] + steps.some * block_cycles["some"]
    )


def tokamax_cycles(chip: Chip, direction: str, kinds: np.ndarray) -> tuple[int, str]:
    """Cycles, and the bundles of a block without a mask and with one."""
    shape = jax.ShapeDtypeStruct
    ints = [shape((1024,), jnp.int32)] * 4
    q, kv = shape((1, LENGTH, D), jnp.bfloat16), shape((LENGTH, D), jnp.bfloat16)
    per_query = shape((1, LENGTH), jnp.float32)
    config = tokamax.SplashConfig(BLOCK, BLOCK, block_q_dkv=BLOCK, block_kv_dkv=BLOCK)

    def info(ints: list[jax.Array], count: jax.Array, sequence: jax.Array) -> TokamaxMaskInfo:
        return TokamaxMaskInfo(None, ints[0], ints[1], ints[2], count, None, sequence)

    def forward(ints, count, sequence, q, k, v):
        return tokamax._splash_attention_forward(
            info(ints, count, sequence), q, k, v, None, None, -1e30, True, config, True, sees, 1.0
        )

    def backward(ints, count, sequence, q, k, v, log_sum, d_out, correction):
        return tokamax._splash_attention_bwd_dkv(
            q, k, v, None, log_sum, d_out, correction, bq=BLOCK, bkv=BLOCK, bkv_compute=BLOCK, is_mqa=True,
            mask_info=info(ints, count, sequence), mask_value=-1e30, mask_function=sees, config=config,
            dkv_mask_sparsity=1.0,
        )  # fmt: skip

    inputs = [ints, shape((1,), jnp.int32), shape((LENGTH,), jnp.int32), q, kv, kv]
    if direction == "backward":
        inputs += [per_query, q, per_query]
    # At the beginning, without a mask, with one, at the end.
    call = forward if direction == "forward" else backward
    parts = compile_parts(chip, tokamax, call, inputs, {"every": 1, "some": 2})
    every, active = int(np.sum(kinds == FULL_BLOCK)), int(np.sum(kinds != 0))
    result = cycles(chip, PRODUCTS[direction], parts, Steps(active, every, active - every))
    return result, f"{parts['every']['bundles']:,} ({parts['some']['bundles']:,})"


def stock_cycles(chip: Chip, direction: str, kinds: np.ndarray) -> tuple[int, str]:
    """As `of_tokamax`; `kinds` are [query blocks, key blocks]."""
    shape = jax.ShapeDtypeStruct
    active = kinds != 0
    blocks, computed = len(kinds), int(active.sum())
    by_query, by_key = (
        int(active.sum(axis).max()) for axis in (1, 0)
    )  # the grid's width: the most visits of any block
    q, kv = shape((1, LENGTH, D), jnp.bfloat16), shape((LENGTH, D), jnp.bfloat16)
    per_query, layout = shape((1, LENGTH), jnp.float32), stock.QKVLayout.HEAD_DIM_MINOR
    sizes = stock.BlockSizes(BLOCK, BLOCK)

    def info(visits: jax.Array, sequence: jax.Array) -> StockMaskInfo:
        return StockMaskInfo(visits, None, visits, None, sequence)

    def forward(visits, sequence, q, k, v):
        return stock._splash_attention_forward(
            info(visits, sequence), q, k, v, None, None, -1e30, True, sizes, None, True, sees
        )

    def backward(function: Callable, **more: object) -> Callable:
        def call(visits, sequence, q, k, v, log_sum, d_out, correction):
            return function(
                q, k, v, None, None, log_sum, d_out, correction, bq=BLOCK, bkv=BLOCK, is_mqa=True,
                mask_info=info(visits, sequence), mask_value=-1e30, attn_logits_soft_cap=None, q_layout=layout,
                k_layout=layout, v_layout=layout, mask_function=sees, interpret=False, **more,
            )  # fmt: skip

        return call

    rows = shape((1, blocks, by_query), jnp.int32)
    columns = shape((1, by_key, blocks), jnp.int32)
    per_pair = [per_query, q, per_query]
    dkv = {"bkv_compute": BLOCK, "use_fused_bwd_kernel": False}
    kernels = {
        "forward": [(forward, rows, [], 2, by_query)],
        "backward": [
            (backward(stock._splash_attention_bwd_dq), rows, per_pair, 3, by_query),
            (backward(stock._splash_attention_bwd_dkv, **dkv), columns, per_pair, 4, by_key),
        ],
    }[direction]
    total, bundles = 0, []
    for call, visits_of, more, products, width in kernels:
        inputs = [visits_of, shape((LENGTH,), jnp.int32), q, kv, kv, *more]
        parts = compile_parts(chip, stock, call, inputs, {"some": 1})  # the beginning, a block, the end
        parts["every"] = parts["some"]
        total += cycles(chip, products, parts, Steps(blocks * width, 0, computed))
        bundles.append(f"{parts['some']['bundles']:,}")
    return total, f"({' + '.join(bundles)})"


def main(chips: list[str]) -> None:
    labels = make_labels(LAYOUT)
    ideal = pairs(labels)
    table = Table(
        title=f"{LAYOUT}, estimates per query head", title_justify="left", caption="bodies: bundles of a block (masked)"
    )
    columns = ("chip", "way", "floor, ms", "ours, ms", "body", "tokamax, ms", "body", "stock, ms", "body", "of both")
    for column in columns:
        table.add_column(column, justify="right")
    for name in chips:
        chip = Chip(name)
        for direction in PRODUCTS:
            cost = costs(chip, direction)
            plan = cost.plan
            ours, _ = estimate(cost, visits(plan, labels))
            blocks = dataclasses.replace(plan, chunk=128, chunks=BLOCK // 128, keys=BLOCK)
            kinds = kinds_of(blocks, labels)[0]
            theirs = [tokamax_cycles(chip, direction, kinds), stock_cycles(chip, direction, kinds)]
            scale = BLOCK**2 / cost.every["pairs"]
            table.add_row(
                name,
                direction,
                f"{chip.milliseconds(chip.cycles(direction, ideal)):.2f}",
                f"{chip.milliseconds(ours):.2f}",
                f"{cost.every['bundles'] * scale:,.0f}",
                *(cell for result, body in theirs for cell in (f"{chip.milliseconds(result):.2f}", body)),
                ", ".join(f"{ours / result:.2f}" for result, _ in theirs),
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if re.fullmatch("|".join(CLOCKS), name)] or list(CLOCKS))
