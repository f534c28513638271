"""The terminal. What is printed is text, never rich's markup: cells of tables, names of files and words of users are in
it, where `[/applied]` would end in a traceback, `[applied]` would vanish and `:fire:` would become a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")


def plain_console(**settings: Any) -> Console:
    """A console, of rich's settings, that prints every text as it is."""
    return Console(markup=False, emoji=False, highlight=False, **settings)


def bold(text: str, rest: str = "") -> Text:
    """Bold text, then some that is not."""
    return Text.assemble((text, "bold"), rest)


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, with a progress bar that goes away when they are done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=plain_console(), transient=True) as progress:
        yield from progress.track(items, description=description)


def print_ranking(
    console: Console,
    probabilities: np.ndarray,
    labels: Sequence[str],
    values: np.ndarray,
    names: Sequence[str],
    top: int,
) -> None:
    """The `top` items of the highest expected value, the best first.

    Args:
      probabilities: [items, labels].
      values: [labels], what each answer is worth.
    """
    expected = probabilities @ values
    table = Table(caption=f"the best of {len(names):,}")
    for heading in ("rank", "item", *(f"P({word})" for word in labels)):
        table.add_column(heading, justify="left" if heading == "item" else "right")
    for rank, row in enumerate(np.argsort(-expected, kind="stable")[:top], 1):
        table.add_row(str(rank), names[row], *(f"{p:.3f}" for p in probabilities[row]))
    console.print(table)
