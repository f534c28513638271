"""The terminal. Everything is printed as text, never as rich's markup.

Output holds values of tables, file names and users' words, in which rich would raise an error at `[/applied]`, drop
`[applied]` and turn `:fire:` into a picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
FILE_WIDTH = 160


def plain_console(**settings: Any) -> Console:
    """A console that prints every text unchanged; `settings` are those of `rich.console.Console`.

    In a pipe or a file, which have no width, tables have FILE_WIDTH columns, unless COLUMNS says otherwise.
    """
    console = Console(markup=False, emoji=False, highlight=False, **settings)
    if not (console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ or "width" in settings):
        console.width = FILE_WIDTH
    return console


def print_line(text: object, stderr: bool = False) -> None:
    """Prints a text on as many columns as it takes, whatever the width of the terminal; to stdout, or to `stderr`."""
    plain_console(stderr=stderr).print(text, soft_wrap=True)


def bold(text: str, rest: str = "") -> Text:
    """Text whose first part is bold; `rest` is not."""
    return Text.assemble((text, "bold"), rest)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Yields the items behind a progress bar with the time left, which disappears at the end.

    Args:
      items: what is iterated over.
      description: the words before the bar.
      total: how many items there are; by default their length.

    Yields:
      Each item; the bar advances when the next one is asked for.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=plain_console(), transient=True) as progress:
        yield from progress.track(items, total=total, description=description)


def print_ranking(
    console: Console,
    probabilities: np.ndarray,
    labels: Sequence[str],
    values: np.ndarray,
    names: Sequence[str],
    top: int,
) -> None:
    """Prints the items of the highest expected value, the best first; ties keep their order.

    Args:
      probabilities: float [items, labels].
      labels: the label words.
      values: float [labels], the value of each label in a ranking.
      names: of the items.
      top: how many items to print.
    """
    expected = probabilities @ values
    table = Table(caption=f"the best of {len(names):,}")
    for heading in ("rank", "item", *(f"P({word})" for word in labels)):
        table.add_column(heading, justify="left" if heading == "item" else "right")
    for rank, row in enumerate(np.argsort(-expected, kind="stable")[:top], 1):
        table.add_row(str(rank), names[row], *(f"{p:.3f}" for p in probabilities[row]))
    console.print(table)
