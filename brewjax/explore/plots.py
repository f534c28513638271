"""Figures that a notebook shows without pyplot, which would set a backend for the whole process."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

FOR, AGAINST, NEITHER = "#3b82c4", "#d9822b", "#999999"  # readable on white and on black
LONGEST = 60  # characters of a name


class Plot(Figure):
    """A figure that a notebook shows as PNG."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def plot_bars(title: str, axis: str, names: Sequence[str], values: np.ndarray, noise: float) -> Plot:
    """Horizontal bars to the right and to the left of zero, the first on top; those within the shaded noise are grey.

    Args:
      title, axis: of the figure, and of its horizontal axis.
      names, values: of the bars.
      noise: half of the width of the shade.
    """
    figure = Plot(figsize=(7, 0.8 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))[::-1]
    colours = [NEITHER if abs(value) <= noise else FOR if value > 0 else AGAINST for value in values]
    axes.barh(places, values, color=colours)
    axes.set_yticks(places, [name if len(name) <= LONGEST else f"{name[: LONGEST - 2]}.." for name in names])
    axes.axvspan(-noise, noise, color=NEITHER, alpha=0.3, linewidth=0)
    axes.axvline(0, color=NEITHER, linewidth=1)
    axes.set(xlabel=axis, title=title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure
