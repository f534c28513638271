"""Draws docs/masks.png: who sees whom in each layout, and what the kernels do with each block.

python -m docs.draw_masks
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from benchmarks.layouts import example
from pallas_kernels.token_labels import TokenLabels, dense_mask
from pallas_kernels.worklist import block_visibility

TILE = 16
SKIPPED, PARTLY, EVERY = "#ffffff", "#f4c7a1", "#a9c9e8"
LAYOUTS = {
    "multi-item: a dense history, items behind it": example(48, [10, 14, 12, 12], [20] * 8),
    "star: events see the center, questions see all": example(32, [16] * 7, [16] * 7, star=True),
    "packed: two examples in a row": np.concatenate(
        [example(40, [8] * 4, [12] * 4), example(56, [], [24] * 3, number=2)]
    ),
    "plain language model": example(256, [], []),
}


def draw(axes: plt.Axes, title: str, labels: np.ndarray, q_start: int = 0) -> None:
    labels = np.pad(labels, ((0, -len(labels) % TILE), (0, 0)))
    kv = TokenLabels(*labels.T)
    q = TokenLabels(*labels[q_start:].T)
    index = np.arange(len(labels))
    seen = np.asarray(dense_mask(q, kv, index[q_start:], index))
    some, every = block_visibility(
        TokenLabels(*(x[None] for x in q)), TokenLabels(*(x[None] for x in kv)), q_start, TILE, TILE
    )
    kinds = np.asarray(some[0]).astype(int) + np.asarray(every[0])
    extent = (0, len(labels), len(labels), q_start)
    axes.imshow(kinds, cmap=ListedColormap([SKIPPED, PARTLY, EVERY]), vmin=0, vmax=2, extent=extent)
    axes.imshow(np.where(seen, 1, np.nan), cmap=ListedColormap(["#1f3b57"]), alpha=0.4, extent=extent)
    axes.set(title=title, xlabel="key", ylabel="query")
    axes.set_xticks(range(0, len(labels) + 1, 4 * TILE))
    axes.set_yticks(range(q_start, len(labels) + 1, 4 * TILE))


def main() -> None:
    figure, grid = plt.subplots(1, len(LAYOUTS) + 1, figsize=(22, 4.8), layout="constrained")
    for axes, (title, labels) in zip(grid, LAYOUTS.items(), strict=False):
        draw(axes, title, labels)
    draw(grid[-1], "items behind a cached prefix", next(iter(LAYOUTS.values())), q_start=96)
    legend = {SKIPPED: "skipped", PARTLY: "visited, masked", EVERY: "visited, no mask", "#1f3b57": "sees"}
    patches = [Patch(facecolor=color, edgecolor="grey", label=label) for color, label in legend.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(Path(__file__).parent / "masks.png", dpi=60)


if __name__ == "__main__":
    main()
