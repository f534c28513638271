"""The leaderboard for readers: tables in the terminal, and one HTML page that refers to nothing outside itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.console import Console
from rich.table import Table

from brewjax.console import bold
from brewjax.evaluate.baselines import ORACLE
from brewjax.evaluate.results import METRICS, Estimate
from brewjax.paths import write_text
from brewjax.suite.board import BOARD_METRICS, HEADLINE, Board, Row, most_different
from brewjax.suite.gate import domains_down, history
from brewjax.suite.predictors import FLOOR, POPULARITY
from brewjax.suite.slices import COLD, MONTHS, NEW

UNDEFINED = "\N{EN DASH}"
HOW_TO_READ = (
    "Numbers are the AUC within a list (GAUC), of a request or of a member: the probability that of two of its items "
    "the better one has the higher score; .5 is chance. ± is half of a 95% interval, by a bootstrap over members.",
    "The mean is of domains, unweighted, each the mean of its tasks; its interval is that of this very mean.",
    "Group: rows of one group are not told apart from its best, by the interval of their paired difference.",
    "A row that has not answered every question as it is frozen now has no mean and no place.",
    f"'{FLOOR}' is the floor: a regression on the numbers that prompts state. Baselines are trained on each surface.",
    "Share of the oracle, where tables were simulated and the truth is known: (AUC - .5) / (the oracle's AUC - .5).",
    "Number of tasks: above popularity, and above chance, which is above .5 by more than the interval.",
    "Notes followed: .5 + (with - against) / 2. Of the pairs of a list that the note truly turns around, the model "
    "turns these shares with the note and against it. .5 is a model that reads no notes, 1 the truth.",
    "New items are those that nobody had an event with before training ended. Months have 30 days, from that moment.",
    "Cold start: the same questions to the same members, asked as if they had only had so many events before.",
)


def print_board(board: Board, console: Console) -> None:
    """Prints the leaderboard by tier, and by domain, a column for each row of the board, on `console`."""
    tables = (_overview(board), _counts(board, board.rows), _by_domain(board), _of_oracle(board), _notes(board))
    for table in (*tables, _slices(board, COLD)):
        if table is not None:
            console.print(_rich(table))


def write_page(board: Board) -> Path:
    """Writes the page next to the suite's results; returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("brewjax.suite", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    described = (_overview(board), _counts(board, board.rows), _by_domain(board), _of_oracle(board), _notes(board))
    slices = (_slices(board, kind) for kind in (COLD, NEW, MONTHS))
    tables = [table for table in (*described, _by_task(board), *slices) if table]
    accepted = [
        {"date": each["date"], "name": each["entry"]["name"], "mean": f"{each['mean']:.4f} ±{each['error']:.4f}"}
        for each in history(board.suite, board.size)
    ]
    page = environment.get_template("board.html.j2").render(
        title=f"{board.suite.name}, {board.size}",
        questions=f"{sum(task.questions for task in board.tasks):,}",
        count=len(board.tasks),
        domains=len(board.domains),
        tables=tables,
        accepted=accepted,
        how_to_read=HOW_TO_READ,
    )
    path = board.suite.folder / board.size / "board.html"
    write_text(path, page)
    return path


def print_difference(board: Board, first: Row, second: Row, prompts: int, console: Console) -> None:
    """Prints the paired difference of two rows by domain, and the questions about which they disagree most.

    Args:
      board: with both rows.
      first: a row.
      second: a row; the difference is the first minus the second.
      prompts: how many questions.
      console: that is printed to.
    """
    down = {"down": set(domains_down(board, first, second)), "up": set(domains_down(board, second, first))}
    table = Table("domain", first.name, second.name, "difference", "beyond chance", box=None)
    for domain in board.domains:
        values = [_number(row.domains[domain][HEADLINE].value) for row in (first, second)]
        word = next((word for word, domains in down.items() if domain in domains), "")
        table.add_row(domain, *values, _signed(first.minus(second, domain)), word)
    means = [_number(row.mean[HEADLINE].value) for row in (first, second)]
    table.add_row(*(bold(text) for text in ("mean", *means, _signed(first.minus(second)))), "")
    console.print(table)
    console.print(_rich(_counts(board, (first, second))))
    for row in most_different(board.suite, board.size, board.tasks, first, second, prompts):
        scores = " and ".join(f"{score:.3f}" for score in row["scores"])
        console.print(
            f"{row['task']}, prompt {row['example']}, item row {row['item']}: {scores}; it was {row['label']}"
        )


def _overview(board: Board) -> dict[str, Any]:
    tiers = [name for name in board.suite.tiers if any(task.tier == name for task in board.tasks)]
    columns = [
        "group",
        "",
        "mean",
        "NDCG@10",
        *(f"{name} {board.suite.tiers[name].title}" for name in tiers),
        "seconds",
    ]
    rows = []
    for index, row in enumerate(board.rows):
        group = str(board.groups[index]) if index < len(board.groups) else UNDEFINED
        missing = f" ({len(row.missing)} tasks missing)" if row.missing else ""
        cells = [_cell(row.mean.get(HEADLINE)), _cell(row.mean.get("ndcg@10"))]
        cells += [_cell(row.tiers.get(name, {}).get(HEADLINE)) for name in tiers]
        rows.append([group, row.name + missing, *cells, f"{row.seconds:,.0f}"])
    return {"title": f"{board.suite.name}, {board.size}: AUC in list", "columns": columns, "rows": rows}


def _counts(board: Board, rows: Sequence[Row]) -> dict[str, Any]:
    """On how many tasks of each tier each row is above popularity, and above chance."""
    cells = []
    for tier in dict.fromkeys(task.tier for task in board.tasks):
        counts = [board.counts(row, tier) for row in rows]
        title = f"{tier} {board.suite.tiers[tier].title}"
        columns = ((1, "above popularity"), (2, "above chance")) if board.row(POPULARITY) else ((2, "above chance"),)
        for index, column in columns:
            cells.append([title, column, *(f"{each[index]} of {each[0]}" if each[0] else UNDEFINED for each in counts)])
    return {"title": "number of tasks", "columns": ["tier", "", *(row.name for row in rows)], "rows": cells}


def _by_domain(board: Board) -> dict[str, Any]:
    rows = [
        [domain, *(_cell(row.domains.get(domain, {}).get(HEADLINE)) for row in board.rows)] for domain in board.domains
    ]
    return {"title": "by domain", "columns": ["domain", *(row.name for row in board.rows)], "rows": rows}


def _of_oracle(board: Board) -> dict[str, Any] | None:
    """How much of what can be known each row knows, where the truth is known: 0 is chance, 1 the oracle."""
    oracle = board.row(ORACLE)
    domains = [domain for domain in board.domains if oracle and domain in oracle.domains]
    if not oracle or not domains:
        return None
    rivals = [row for row in board.rows if row is not oracle]
    rows = [
        [domain, _cell(oracle.domains[domain][HEADLINE]), *(_cell(row.share_of(oracle, domain)) for row in rivals)]
        for domain in domains
    ]
    return {"title": "share of the oracle", "columns": ["domain", ORACLE, *(row.name for row in rivals)], "rows": rows}


def _by_task(board: Board) -> dict[str, Any]:
    rows = []
    for task in board.tasks:
        for metric in BOARD_METRICS:
            cells = [_cell(row.tasks.get(task.name, {}).get(metric)) for row in board.rows]
            first = [f"{task.name} ({task.tier}, v{task.surface_task.entry.version}, {task.questions:,} questions)"]
            rows.append([*(first if metric == HEADLINE else [""]), METRICS[metric].title, *cells])
    return {"title": "by task", "columns": ["task", "metric", *(row.name for row in board.rows)], "rows": rows}


def _notes(board: Board) -> dict[str, Any] | None:
    tasks = [task.name for task in board.tasks if any(task.name in row.notes for row in board.rows)]
    rows = [[task, *(_cell(row.notes.get(task)) for row in board.rows)] for task in tasks]
    columns = ["task", *(row.name for row in board.rows)]
    return {"title": "notes followed", "columns": columns, "rows": rows} if rows else None


def _slices(board: Board, kind: str) -> dict[str, Any] | None:
    """The slices of a kind, task by task in the suite's order."""
    keys = dict.fromkeys(
        key for task in board.tasks for row in board.rows for key in row.slices if key[:2] == (kind, task.name)
    )
    rows = [[task, name, *(_cell(row.slices.get((kind, task, name))) for row in board.rows)] for _, task, name in keys]
    return {"title": kind, "columns": ["task", "", *(row.name for row in board.rows)], "rows": rows} if rows else None


def _rich(described: dict[str, Any]) -> Table:
    table = Table(title=described["title"], title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(described["columns"]):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for row in described["rows"]:
        table.add_row(*row)
    return table


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or not np.isfinite(estimate.value):
        return UNDEFINED
    return _number(estimate.value) + (f" ±{_number(estimate.error)}" if np.isfinite(estimate.error) else "")


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if 0 <= value < 1 else f"{value:.3f}"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.4f} ±{estimate.error:.4f}"
