"""How few pairs of tokens could be computed with tiles of a size, each skipped by itself: over those that must be.

python -m benchmarks.attention_tiles
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks.attention_static import LAYOUTS, make_labels, pairs, table
from pallas_kernels.token_labels import TokenLabels
from pallas_kernels.worklist import block_visibility

TILES = [(128, 128), (128, 64), (128, 32), (128, 8), (64, 64), (32, 128), (32, 32)]  # queries x keys


def main() -> None:
    shown = table("pairs over ideal, tiles of queries x keys", ("layout", *(f"{q} x {k}" for q, k in TILES)))
    for name in LAYOUTS:
        labels = make_labels(name)
        ideal, length = pairs(labels), labels.example_id.shape[1]
        whole = TokenLabels(*(jnp.pad(x, ((0, 0), (0, -length % 128))) for x in labels))
        count = jax.jit(lambda row, q, k: block_visibility(row, row, 0, q, k).any.sum(), static_argnums=(1, 2))
        shown.add_row(name, *(f"{int(count(whole, q, k)) * q * k / ideal:.3f}" for q, k in TILES))
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
