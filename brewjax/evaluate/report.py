"""The report of a run: Markdown, a self-contained HTML page, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brewjax.console import bold
from brewjax.data.tasks.task import MetricName
from brewjax.evaluate.budgets import BudgetPoint
from brewjax.evaluate.fact_worth import FactWorth
from brewjax.evaluate.mistakes import Mistake
from brewjax.evaluate.plots import budget_plot, cost_plot, loss_plot, reliability_plot, size_plot, slice_plot
from brewjax.evaluate.results import METRICS, OVERALL, SLICES, Comparison, Estimate, ModelSummary, agreements

UNDEFINED = "\N{EN DASH}"
HOW_TO_READ = (
    "All models and baselines answer the same questions of the test period, from data before the cutoff time.",
    "AUC: the probability that of two questions with different answers the better one has the higher score; 0.5 is "
    "chance. AUC in list (GAUC): the same for questions of one list, a request or a member. NDCG@10: how close the ten "
    "best-scored candidates of a list are to the best order; 1 is perfect. All are better when higher.",
    "Log loss: the mean of -ln(probability of the true answer). Calibration error: how far probabilities are from "
    "observed frequencies. Both are better when lower.",
    "In brackets: a 95% interval, from a bootstrap over members. If two intervals overlap, look at the paired "
    "difference instead, whose interval is narrower.",
    "Spearman between two tasks: how alike a model orders the same candidates for both. Tasks that ask for opposite "
    "things should be near -1; a model far from the baselines confuses the tasks.",
    "What a fact is worth: how much the fact regression loses when the number is shuffled over the questions, which "
    "takes away what it says and leaves how it is distributed. Facts that say the same stand in for each other.",
    "Budgets: the last model, in prompts of at most so many tokens up to the end of a question. Each is compared with "
    "the smallest, paired over members.",
    f"{UNDEFINED} means undefined: no questions, or only one answer among them. A single member has no interval.",
)


class TaskDetails(NamedTuple):
    """What a report shows of a task beside its metrics.

    Attributes:
      mistakes: where the first model shown was most wrong.
      facts: what the numbers that prompts state are worth to the fact regression.
      budgets: the last model's quality by the budget of its prompts.
    """

    mistakes: Sequence[Mistake] = ()
    facts: Sequence[FactWorth] = ()
    budgets: Sequence[BudgetPoint] = ()


def write_report(
    folder: Path,
    title: str,
    comparisons: Sequence[Comparison],
    models: Sequence[ModelSummary],
    shown: Sequence[str],
    facts: Mapping[str, str],
    losses: Mapping[str, Sequence[Mapping[str, float]]],
    details: Mapping[str, TaskDetails],
) -> None:
    """Writes `report.md` and `report.html`; the page refers to nothing outside itself.

    Args:
      folder: made if need be.
      title: of the report.
      comparisons: of all models and baselines, one per task.
      models: in the order of the table.
      shown: names of the models and baselines to compare in detail.
      facts: about the run, by name: dataset, date, commit, seconds by phase, ..
      losses: the logged metrics of each stage that trained, by its name: "step" and "loss" of every step.
      details: of tasks, by name; may be missing.
    """
    finite_rows = {name: [row for row in rows if np.isfinite(row["loss"])] for name, rows in losses.items()}
    context = {
        "title": title,
        "facts": facts,
        "how_to_read": HOW_TO_READ,
        "models": describe_models(comparisons, models),
        "size_plots": [size_plot(comparison, models) for comparison in comparisons] if len(models) > 1 else [],
        "cost_plot": cost_plot(models) if len(models) > 1 else "",
        "tasks": [
            _describe(comparison.select(*shown))
            | _describe_details(details.get(comparison.name, TaskDetails()), comparison)
            for comparison in comparisons
        ],
        "agreements": describe_agreements(comparisons, shown),
        "loss_plots": [loss_plot(name, rows) for name, rows in finite_rows.items() if rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("brewjax.evaluate", "."),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in ("report.md", "report.html"):
        (folder / name).write_text(environment.get_template(f"{name}.j2").render(context), encoding="utf-8")


def describe_models(comparisons: Sequence[Comparison], models: Sequence[ModelSummary]) -> dict[str, Any]:
    """The table of a run's models as texts: size, quality by each task's first metric, cost and speed."""
    quality = [f"{comparison.name}: {METRICS[comparison.task.metrics[0]].title}" for comparison in comparisons]
    rows = []
    for model in models:
        cells = []
        for comparison in comparisons:
            estimate = comparison.results[model.name][OVERALL].metrics[comparison.task.metrics[0]]
            error = f" ±{_format_number(estimate.error)}" if np.isfinite(estimate.error) else ""
            cells.append(_format_number(estimate.value) + error)
        size = f"{model.parameters:,}", f"{model.weight_bytes / 1e6:,.1f}"
        cost = f"{model.item_flops / 1e6:,.1f}", f"{model.speed:,.0f}", f"{model.seconds:,.0f}"
        rows.append([model.name, model.how, *size, *cells, *cost])
    columns = ["model", "made", "parameters", "MB", *quality, "MFLOPs an item", "items/s", "seconds to make"]
    return {"columns": columns, "rows": rows}


def describe_agreements(comparisons: Sequence[Comparison], shown: Sequence[str]) -> list[str]:
    """Says of each two tasks that ask about the same items whether models tell them apart.

    Args:
      comparisons: of the tasks.
      shown: names of the models and baselines.

    Returns:
      A line for each two tasks, with Spearman's rank correlation of the scores by each model.
    """
    return [
        f"{' and '.join(agreement.tasks)}: Spearman of the scores "
        + ", ".join(f"{name} {_format_number(agreement.spearman[name], sign='+')}" for name in shown)
        for agreement in agreements(comparisons)
    ]


def print_models(comparisons: Sequence[Comparison], models: Sequence[ModelSummary], console: Console) -> None:
    """Prints the table of models without what a terminal has no room for: how a model was made, and intervals.

    Args:
      comparisons: of all models, one per task; the first metric of each task is shown.
      models: in the order of the table.
      console: that prints.
    """
    quality = [f"{comparison.name}\n{METRICS[comparison.task.metrics[0]].title}" for comparison in comparisons]
    table = Table(title="models", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in ("params", "MB", *quality, "items/s", "seconds"):
        table.add_column(column, justify="right", overflow="fold")
    for model in models:
        results = [(comparison.results[model.name][OVERALL], comparison.task) for comparison in comparisons]
        values = [_format_number(result.metrics[task.metrics[0]].value) for result, task in results]
        table.add_row(
            model.name,
            f"{model.parameters / 1e6:,.1f}M",
            f"{model.weight_bytes / 1e6:,.1f}",
            *values,
            f"{model.speed:,.0f}",
            f"{model.seconds:,.0f}",
        )
    console.print(table)


def print_results(comparison: Comparison, console: Console) -> None:
    """Prints a task's tables: every metric overall, then the first metric by the member's number of past events.

    Args:
      comparison: of all models and baselines on the task.
      console: that prints.
    """
    described = _describe(comparison, plots=False)
    overall = Table("", *described["metrics"], title=f"{described['name']}: {described['size']}", title_justify="left")
    for row in described["overall"]:
        overall.add_row(row["name"], *(_format_cell(cell) for cell in row["cells"]))
    console.print(overall)
    slices = Table("past events", "questions", *described["names"], title=described["headline"], title_justify="left")
    for row in described["slices"]:
        slices.add_row(row["name"], row["rows"], *(_format_cell(cell) for cell in row["cells"]))
    console.print(slices)
    for line in described["differences"]:
        console.print(line)


def _describe(comparison: Comparison, plots: bool = True) -> dict[str, Any]:
    """Everything that a report shows of a task, as texts. The task's first metric is the headline."""
    task, results = comparison.task, comparison.results
    names, headline = list(results), task.metrics[0]
    model = results[names[0]]

    def cell(name: str, metric: MetricName, slice_: str = OVERALL) -> dict[str, Any]:
        estimate = results[name][slice_].metrics[metric]
        error = f" ±{_format_number(estimate.error)}" if np.isfinite(estimate.error) else ""
        return {
            "value": _format_number(estimate.value),
            "interval": _format_interval(estimate),
            "error": error,
            "best": comparison.best(metric, slice_) == name,
        }

    return {
        "name": comparison.name,
        "question": task.questions.question,
        "words": ", ".join(task.words),
        "size": f"{model[OVERALL].rows:,} questions to {model[OVERALL].members:,} members",
        "names": names,
        "metrics": [METRICS[metric].title for metric in task.metrics],
        "headline": METRICS[headline].title,
        "overall": [{"name": name, "cells": [cell(name, metric) for metric in task.metrics]} for name in names],
        "slices": [
            {"name": slice_, "rows": f"{model[slice_].rows:,}", "cells": [cell(n, headline, slice_) for n in names]}
            for slice_ in SLICES
        ],
        "differences": [_describe_difference(comparison, headline, name) for name in names[1:]],
        "slice_plot": slice_plot(comparison, headline) if plots else "",
        "reliability_plot": reliability_plot(comparison) if plots else "",
    }


def _describe_details(details: TaskDetails, comparison: Comparison) -> dict[str, Any]:
    """The mistakes, facts and budgets of a task, as texts."""
    return {
        "mistakes": [
            {
                "member": mistake.member,
                "title": mistake.title,
                "answer": mistake.answer,
                "probability": _format_number(mistake.probability),
                "baseline": mistake.baseline,
                "baseline_probability": _format_number(mistake.baseline_probability),
                "text": mistake.text,
            }
            for mistake in details.mistakes
        ],
        "facts": [
            {
                "name": fact.name,
                "cells": [_format_signed(value) for value in (-fact.gauc, fact.log_loss, fact.log_odds)],
            }
            for fact in details.facts
        ],
        "budgets": [
            [
                f"{point.max_tokens:,}",
                f"{point.size.events:.1f}",
                f"{point.size.tokens:,.0f}",
                f"{_format_number(point.quality.value)} {_format_interval(point.quality)}".strip(),
                f"{_format_number(point.gain.value, sign='+')} {_format_interval(point.gain)}" if point.gain else "",
            ]
            for point in details.budgets
        ],
        "budget_plot": budget_plot(comparison, details.budgets) if details.budgets else "",
    }


def _describe_difference(comparison: Comparison, metric: MetricName, baseline: str) -> str:
    model, difference = next(iter(comparison.results)), comparison.difference(metric, baseline)
    value, interval = _format_number(difference.value, sign="+"), _format_interval(difference)
    return f"{model} minus {baseline}: {METRICS[metric].title} {value} {interval}"


def _format_number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if np.isfinite(value) else UNDEFINED


def _format_signed(value: float) -> str:
    return f"{value:+.4f}" if np.isfinite(value) else UNDEFINED


def _format_interval(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"({_format_number(low)} to {_format_number(high)})" if np.isfinite(low) else ""


def _format_cell(cell: dict[str, Any]) -> Text:
    return bold(cell["value"], cell["error"]) if cell["best"] else Text(cell["value"] + cell["error"])
