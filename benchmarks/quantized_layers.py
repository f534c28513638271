"""8-bit weights in a layer with its neighbours: brew-mini-turbo's MLP, norm and residual, in a scan over four layers.

    python -m benchmarks.quantized_layers [v5e v6e ..] [8192 512 32] [bfloat16 e4m3 e4m3-tokens int8-tokens]

`e4m3` multiplies bfloat16 tokens; `-tokens` rounds them to the weights' 8 bits, with a scale for each. All by XLA,
compiled for a chip that is not there. Milliseconds of a layer at the nominal clock: what the matrix unit needs in
bfloat16, to read the weights, instruction bundles, and the compiler's estimate, which has memory in it. A product alone
says little: what XLA fuses with it decides how it runs.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

from benchmarks.heads import CHIPS, Chip  # isort: skip  # sets up libtpu

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks.attention_static import table
from benchmarks.bundles import costs_of
from brewjax.model.config import ModelConfig
from brewjax.model.weights import DTYPES
from pallas_kernels.quantized_matmul import Quantized, quantized_matmul

MODEL = ModelConfig.load("configs/models/brew-mini-turbo.yaml")
LAYERS = 4
TOKENS = (8192, 512, 32)
KINDS = {
    "bfloat16": (None, None),
    "e4m3": ("e4m3", None),
    "e4m3-tokens": ("e4m3", "per_token"),
    "int8-tokens": ("int8", "per_token"),
}


def mlp(kind: str, x: jax.Array, stacks: Any) -> jax.Array:
    name, activations = KINDS[kind]
    product = functools.partial(quantized_matmul, activations=activations) if name else jnp.matmul

    def layer(x: jax.Array, matrices: Any) -> tuple[jax.Array, None]:
        gate, up, down = matrices
        h = x.astype(jnp.float32)
        h = (h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + MODEL.norm_eps)).astype(x.dtype)
        return x + product(jax.nn.silu(product(h, gate)) * product(h, up), down), None

    return jax.lax.scan(layer, x, stacks)[0]


def stack(kind: str, K: int, N: int) -> Any:
    name, _ = KINDS[kind]
    values = jax.ShapeDtypeStruct((LAYERS, K, N), DTYPES[name] if name else jnp.bfloat16)
    return Quantized(values, jax.ShapeDtypeStruct((LAYERS, N), jnp.float32)) if name else values


def main(chips: list[str], tokens: list[int], kinds: list[str]) -> None:
    D, F = MODEL.d_model, MODEL.d_ff
    columns = ("chip", "tokens", "weights", "matrix unit, ms", "weights' bytes, ms", "bundles, ms", "estimate, ms")
    shown = table("the MLP of a layer", columns)
    for chip, T, kind in itertools.product(map(Chip, chips), tokens, kinds):
        x = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
        compiled = chip.compile(functools.partial(mlp, kind), x, (*[stack(kind, D, F)] * 2, stack(kind, F, D)))
        cost = costs_of(compiled.as_text())
        itemsize = 1 if KINDS[kind][0] else 2
        floors = chip.product_ms(3 * T * D * F), chip.bytes_ms(3 * D * F * itemsize)
        times = *floors, chip.cycles_ms(cost.bundles, chip.cores) / LAYERS, chip.cycles_ms(cost.estimate) / LAYERS
        row = (chip.name, f"{T:,}", kind, *(f"{time:.3f}" for time in times))
        shown.add_row(*row)
        print(*row, file=sys.stderr, flush=True)  # compiling takes long
    Console(width=120).print(shown)


if __name__ == "__main__":
    chosen = [[name for name in sys.argv[1:] if name in known] or list(known) for known in (CHIPS, KINDS)]
    main(chosen[0], [int(name) for name in sys.argv[1:] if name.isdigit()] or list(TOKENS), chosen[1])
