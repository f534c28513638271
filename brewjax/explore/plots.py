"""Figures that a notebook shows without pyplot, which would set a backend for the whole process."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

FOR, AGAINST, NEITHER = "#3b82c4", "#d9822b", "#999999"  # readable on white and on black
LONGEST = 60  # characters of a name
LONGEST_LABEL = 28  # characters of a name beside a point
LETTER, LINE = 5.6, 11  # width and height, in pixels, of a letter of such a name


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


def plot_points(title: str, points: np.ndarray, names: Sequence[str], categories: Sequence[str] | None) -> Plot:
    """Points with names, as many as do not overlap, and a colour for each category.

    Args:
      title: of the figure.
      points: float64 [points, 2].
      names: of the points.
      categories: of the points, by whose frequency colours are chosen; None paints all alike.
    """
    figure = Plot(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    kinds = np.array(categories if categories is not None else [""] * len(names))
    legend, counts = np.unique(kinds, return_counts=True)
    for number, kind in enumerate(legend[np.argsort(-counts, kind="stable")]):
        chosen = points[kinds == kind]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=22, color=f"C{number}", alpha=0.75, linewidths=0, label=kind)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.axhline(0, color=NEITHER, linewidth=0.5, zorder=0)
    axes.axvline(0, color=NEITHER, linewidth=0.5, zorder=0)
    if categories is not None:
        figure.legend(loc="outside right upper", frameon=False)
    figure.draw_without_rendering()
    placed: list[tuple[float, float, float]] = []  # left, right and height of the names so far, in pixels
    for name, (x, y), (left, height) in zip(names, points, axes.transData.transform(points), strict=True):
        text = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 2]}.."
        right = left + 7 + LETTER * len(text)
        if any(left < end and start < right and abs(height - line) < LINE for start, end, line in placed):
            continue
        placed.append((left, right, height))
        axes.annotate(text, (x, y), (4, 0), textcoords="offset points", fontsize=7, va="center")
    return figure


def plot_reliability(title: str, label: str, predicted: np.ndarray, observed: np.ndarray, errors: np.ndarray) -> Plot:
    """Observed frequencies by predicted probabilities; on the dashed diagonal they are equal.

    Args:
      title: of the figure.
      label: the label word that is meant.
      predicted, observed: float64 [bins].
      errors: half the height of the bars at the frequencies.
    """
    figure = Plot(figsize=(4.8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=NEITHER, linewidth=1, linestyle="--")
    axes.errorbar(predicted, observed, errors, fmt="o-", color=FOR, markersize=4, linewidth=1, capsize=2)
    axes.set_title(title, fontsize=9)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set(xlabel=f"probability of “{label}”", ylabel="observed frequency")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
