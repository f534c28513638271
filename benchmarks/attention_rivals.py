"""The kernels of `attention_static` beside those of others with a hand-made mask, in one run.

    pip install tokamax, then: python -m benchmarks.attention_rivals [v5e v6e ..]

4096 + 500 x 64 tokens, one query head of size 128, bfloat16, blocks of 512 x 512. Tokamax's splash attention takes a
worklist too, and a mask function of numbers that are stored with each query: here the beginning of its item and its own
place. What its sums over dq's parts cost after its backward kernel is not counted.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

from benchmarks.attention_static import CLOCKS, PRODUCTS, Chip, costs, estimate, pairs, visits  # isort: skip  # sets up libtpu

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from rich.console import Console
from rich.table import Table
from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from benchmarks.layouts import segments
from pallas_kernels.worklist import EVERY

LAYOUT, PREFIX, D, BLOCK = "4096 + 500 x 64", 4096, 128, 512
LENGTH = 36352  # the layout's 36,096 tokens in whole blocks


def sees(q: jax.Array, k: jax.Array) -> jax.Array:
    """`q`: the beginning of the query's item in the upper 16 bits, its own place in the lower."""
    return (k <= (q & 0xFFFF)) & ((k < PREFIX) | (k >= (q >> 16)))


def rival(chip: Chip, way: str) -> dict[str, dict[str, int]]:
    """Bundles of a visit of tokamax's kernel: "visit" (what each costs anyway), "every" (no mask), "some" (masked)."""
    shape = jax.ShapeDtypeStruct
    ints = [shape((1024,), jnp.int32)] * 4
    q, kv = shape((1, LENGTH, D), jnp.bfloat16), shape((LENGTH, D), jnp.bfloat16)
    per_query = shape((1, LENGTH), jnp.float32)
    config = splash.SplashConfig(BLOCK, BLOCK, block_q_dkv=BLOCK, block_kv_dkv=BLOCK)

    def info(ints: list[jax.Array], count: jax.Array, sequence: jax.Array) -> MaskInfo:
        return MaskInfo(None, ints[0], ints[1], ints[2], count, None, sequence)

    def forward(ints, count, sequence, q, k, v):
        return splash._splash_attention_forward(
            info(ints, count, sequence), q, k, v, None, None, -1e30, True, config, True, sees, 1.0
        )

    def backward(ints, count, sequence, q, k, v, log_sum, d_out, correction):
        return splash._splash_attention_bwd_dkv(
            q, k, v, None, log_sum, d_out, correction, bq=BLOCK, bkv=BLOCK, bkv_compute=BLOCK, is_mqa=True,
            mask_info=info(ints, count, sequence), mask_value=-1e30, mask_function=sees, config=config,
            dkv_mask_sparsity=1.0,
        )  # fmt: skip

    inputs = [ints, shape((1,), jnp.int32), shape((LENGTH,), jnp.int32), q, kv, kv]
    if way == "backward":
        inputs += [per_query, q, per_query]

    def compile_only(kept: int | None) -> dict[str, int]:
        """The kernels say four times what to do when: at the beginning, without a mask, with one, at the end."""
        said = []

        def when(condition: object) -> Callable:
            said.append(condition)
            return lambda body: body() if len(said) - 1 == kept else None

        with mock.patch.object(splash, "pl", SimpleNamespace(**(vars(pl) | {"when": when}))):
            return chip.compile(forward if way == "forward" else backward, *inputs, name="splash")

    empty = compile_only(None)
    found = {"visit": empty | {"pairs": 0, "cycles": 0}}
    for name, kept in (("every", 1), ("some", 2)):
        whole = compile_only(kept)
        found[name] = {slot: whole[slot] - empty[slot] for slot in whole}
        found[name] |= {"pairs": BLOCK**2, "cycles": chip.cycles(way, BLOCK**2)}
    return found


def main(chips: list[str]) -> None:
    labels = segments(LAYOUT)
    ideal = pairs(labels)
    table = Table(title=f"{LAYOUT}, estimates per query head", title_justify="left")
    for column in ("chip", "way", "ours, ms", "tokamax, ms", "ours / tokamax", "floor, ms", "bodies: ours", "tokamax"):
        table.add_column(column, justify="right")
    for name in chips:
        chip = Chip(name)
        for way in PRODUCTS:
            cost = costs(chip, way)
            plan = cost.plan
            ours, _ = estimate(cost, visits(plan, labels))
            theirs = rival(chip, way)
            blocks = dataclasses.replace(plan, chunk=128, chunks=BLOCK // 128, keys=BLOCK)
            kinds = np.where(visits(blocks, labels) == EVERY, "every", "some")
            other = sum(theirs["visit"]["bundles"] + max(theirs[x]["bundles"], theirs[x]["cycles"]) for x in kinds)
            scale = BLOCK**2 / cost.every["pairs"]
            table.add_row(
                name,
                way,
                *(f"{chip.milliseconds(x):.2f}" for x in (ours, other)),
                f"{ours / other:.2f}",
                f"{chip.milliseconds(chip.cycles(way, ideal)):.2f}",
                f"{cost.every['bundles'] * scale:,.0f}",
                f"{theirs['every']['bundles']:,} ({theirs['some']['bundles']:,} masked)",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if re.fullmatch("|".join(CLOCKS), name)] or list(CLOCKS))
