"""The report's plots, as SVG text in the colours of the page, light or dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, ScalarFormatter

from brewjax.data.tasks.task import MetricName
from brewjax.evaluate.budgets import BudgetPoint
from brewjax.evaluate.metrics import ratio, reliability
from brewjax.evaluate.predictions import probabilities
from brewjax.evaluate.results import METRICS, OVERALL, SLICES, Comparison, ModelSummary

INK = "#010203"  # placeholder for the page's text colour, which matplotlib cannot know
COLOURS = ("#3b82c4", "#d9822b", "#3f9c6b", "#a968c9", "#c9556b", "#8a8f3c")  # readable on white and on black
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
POINTS = 100  # of a training loss that a reader can point at
Tips = list[tuple[Artist, Sequence[str]]]  # a line with a text for each of its points, or a bar with one text


def slice_plot(comparison: Comparison, metric: MetricName) -> str:
    """A metric by the member's number of past events, with intervals; slices without an interval are left out."""
    model = next(iter(comparison.results.values()))
    slices = [name for name in SLICES if name != OVERALL and np.isfinite(model[name].metrics[metric].error)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure("past events of the member", METRICS[metric].title)
        tips: Tips = []
        for index, (name, results) in enumerate(comparison.results.items()):
            estimates = [results[slice_].metrics[metric] for slice_ in slices]
            values = np.array([estimate.value for estimate in estimates])
            bounds = np.array([estimate.interval for estimate in estimates]).reshape(-1, 2)
            x = np.arange(len(slices)) + 0.12 * (index - (len(comparison.results) - 1) / 2)
            bars = axes.errorbar(
                x, values, np.abs(bounds - values[:, None]).T, fmt="o-", markersize=5, capsize=2, label=name,
                color=COLOURS[index % len(COLOURS)],
            )  # fmt: skip
            texts = [
                f"{name}, {slice_} past events: {value:.3f} ({low:.3f} to {high:.3f}), {model[slice_].rows:,} questions"
                for slice_, value, (low, high) in zip(slices, values, bounds, strict=True)
            ]
            tips.append((bars.lines[0], texts))
        rows = [model[slice_].rows for slice_ in slices]
        axes.set_xticks(range(len(slices)), [f"{name}\n({n:,})" for name, n in zip(slices, rows, strict=True)])
        return _svg(figure, axes, f"{comparison.name} slices", tips)


def reliability_plot(comparison: Comparison) -> str:
    """The observed frequency of the first label against its predicted probability, in ten bins of equal weight."""
    task = comparison.task
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(f"probability of “{task.words[0]}”", "observed frequency")
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1, linestyle="--")
        tips: Tips = []
        for index, (name, table) in enumerate(comparison.predictions.items()):
            if len(table):
                outcome = table["label"].to_numpy() == 0
                predicted, observed, weight = reliability(
                    probabilities(table, task)[:, 0], outcome, np.ones(len(table))
                )
                mean, frequency = ratio(predicted, weight), ratio(observed, weight)
                (line,) = axes.plot(
                    mean, frequency, "o-", markersize=4, label=name, color=COLOURS[index % len(COLOURS)]
                )  # fmt: skip
                texts = [
                    f"{name}: predicted {x:.3f}, observed {y:.3f}, {count:,.0f} questions"
                    for x, y, count in zip(mean, frequency, weight, strict=True)
                ]
                tips.append((line, texts))
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        return _svg(figure, axes, f"{comparison.name} reliability", tips)


def size_plot(comparison: Comparison, models: Sequence[ModelSummary]) -> str:
    """A task's first metric against the size of the models, with intervals."""
    metric = comparison.task.metrics[0]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure("weights, MB", METRICS[metric].title)
        tips: Tips = []
        for index, model in enumerate(models):
            estimate = comparison.results[model.name][OVERALL].metrics[metric]
            point = (model.weight_bytes / 1e6, estimate.value)
            bars = axes.errorbar(*point, estimate.error, fmt="o", capsize=2, color=COLOURS[index % len(COLOURS)])
            text = f"{model.name}: {estimate.value:.3f} ±{estimate.error:.3f}, {point[0]:,.1f} MB"
            tips.append((bars.lines[0], [text]))
            axes.annotate(model.name, point, (5, 4), textcoords="offset points", fontsize=8)
        sizes = [model.weight_bytes for model in models]
        if max(sizes) > 8 * min(sizes):  # a narrower range holds too few round numbers
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.minorticks_off()
        return _svg(figure, axes, f"{comparison.name} sizes", tips)


def budget_plot(comparison: Comparison, points: Sequence[BudgetPoint]) -> str:
    """A model's quality on a task by the tokens that its prompts hold before the questions, with intervals."""
    with matplotlib.rc_context(STYLE):
        title = METRICS[comparison.task.metrics[0]].title
        figure, axes = _figure("tokens before the questions", title)
        bars = axes.errorbar(
            [point.size.tokens for point in points],
            [point.quality.value for point in points],
            [point.quality.error for point in points],
            fmt="o-", markersize=5, capsize=2, color=COLOURS[0],
        )  # fmt: skip
        texts = [
            f"budget of {point.max_tokens:,} tokens, {point.size.events:.1f} events: {point.quality.value:.3f} "
            f"±{point.quality.error:.3f}"
            for point in points
        ]
        return _svg(figure, axes, f"{comparison.name} budgets", [(bars.lines[0], texts)])


def cost_plot(models: Sequence[ModelSummary]) -> str:
    """The seconds that it took to make each model."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure("seconds to make", "")
        bars = axes.barh([model.name for model in models], [model.seconds for model in models], color=COLOURS[0])
        axes.invert_yaxis()
        texts = [f"{model.name}, {model.how}: {model.seconds:,.0f} seconds" for model in models]
        tips: Tips = [(bar, [text]) for bar, text in zip(bars, texts, strict=True)]
        return _svg(figure, axes, "cost", tips)


def loss_plot(name: str, rows: Sequence[Mapping[str, float]]) -> str:
    """The training loss of a stage by step, and its running mean over a fiftieth of the stage."""
    step = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows])
    width = max(1, len(rows) // 50)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure("step", f"training loss of {name}")
        axes.plot(step, loss, color=COLOURS[0], alpha=0.35, linewidth=0.8, label="of one step")
        mean = np.convolve(loss, np.ones(width) / width, mode="valid")
        axes.plot(step[width - 1 :], mean, color=COLOURS[0], label=f"mean of {width} steps")
        apart = -(-len(mean) // POINTS)  # points that are not drawn, for a reader who points at the line
        (points,) = axes.plot(step[width - 1 :: apart], mean[::apart], "o", markersize=4, alpha=0)
        texts = [f"step {x:,.0f}: {y:.3f}" for x, y in zip(step[width - 1 :: apart], mean[::apart], strict=True)]
        return _svg(figure, axes, f"{name} loss", [(points, texts)])


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y", color=INK, alpha=0.12)
    return figure, axes


def _svg(figure: Figure, axes: Axes, name: str, tips: Tips) -> str:
    """The figure as an <svg> element, whose ids depend on `name`, so that a page can hold several. The texts of `tips`
    become titles of points and bars, which browsers show to who points at them."""
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper left", ncols=3)
    for number, (artist, _) in enumerate(tips):
        artist.set_gid(f"tips-{number}")
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for number, (artist, texts) in enumerate(tips):
        before, _, after = svg.partition(f'<g id="tips-{number}">')
        svg = f"{before}<g>{_add_titles(after, artist, texts)}"
    return svg.replace(INK, "currentColor")


def _add_titles(svg: str, artist: Artist, texts: Sequence[str]) -> str:
    """Puts a title into the bar that `svg` begins with, or into each point of the line that it begins with."""
    if not isinstance(artist, Line2D):
        return f"<title>{html.escape(texts[0])}</title>{svg}"
    finite = np.isfinite(np.asarray(artist.get_xydata())).all(1)  # no other point is visible
    titles = iter(
        [f"<title>{html.escape(text)}</title>" for text, visible in zip(texts, finite, strict=True) if visible]
    )
    line, end, after = svg.partition("</defs>")
    points, _, rest = after.partition("</g>")
    points = re.sub(r"(<use [^>]*?)/>", lambda match: f"{match[1]}>{next(titles)}</use>", points)
    return f"{line}{end}{points}</g>{rest}"
