"""Texts that do not fit into the token budget of a prompt: truncated to what fits, named and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from brewjax.console import print_line

MAX_TOKEN_CHARACTERS = 128  # no token of a common tokenizer is longer


class Overlong(NamedTuple):
    """An item, or a member, whose text does not fit.

    Attributes:
      row: of its table.
      noun: its noun on the card, and its id: "job 107".
      column: the attribute with the longest text.
      tokens: of the whole text.
      room: tokens that would fit.
    """

    row: int
    noun: str
    column: str
    tokens: int
    room: int

    def __str__(self) -> str:
        return f"{self.noun} takes {self.tokens:,} tokens, most of them its '{self.column}', where {self.room:,} fit"


class OverlongLog:
    """Counts the texts that were truncated or skipped: each row of a table once per task."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], dict[str, Overlong]] = {}
        self._prefix = ""

    def within(self, prefix: str) -> OverlongLog:
        """This log, for tasks whose names begin with `prefix` here: "jobs/"."""
        log = OverlongLog()
        log._entries, log._prefix = self._entries, prefix
        return log

    def add(self, task: str, outcome: str, overlong: Overlong) -> None:
        """Notes that a text was too long; one of the same task, outcome and noun counts once.

        Args:
          task: its name.
          outcome: "truncated" or "skipped".
          overlong: the text, and how long it is.
        """
        self._entries.setdefault((self._prefix + task, outcome), {}).setdefault(overlong.noun, overlong)

    def merge(self, log: OverlongLog) -> None:
        """Adds the counts of another log."""
        for (task, outcome), texts in log._entries.items():
            for overlong in texts.values():
                self.add(task, outcome, overlong)

    def take(self) -> OverlongLog:
        """The counts, as a log of their own; the count starts anew."""
        log = OverlongLog()
        log._entries = dict(self._entries)
        self._entries.clear()
        return log

    def print(self) -> None:
        """Prints `lines` on stderr."""
        for line in self.lines():
            print_line(line, stderr=True)

    def lines(self) -> list[str]:
        """A line per task and outcome, which names the longest text; the count starts anew."""
        lines = []
        for (task, outcome), texts in self.take()._entries.items():
            longest = max(texts.values(), key=lambda overlong: overlong.tokens)
            count = "1 text too long was" if len(texts) == 1 else f"{len(texts):,} texts too long were"
            lines.append(f"{task}: {count} {outcome}, {'the longest: ' if len(texts) > 1 else ''}{longest}")
        return lines


def truncate_to_fit(render: Callable[[int | None], str], count: Callable[[str], int], room: int) -> str | None:
    """The longest rendering of at most `room` tokens; None if even the shortest has more.

    Args:
      render: renders a text with each value in it truncated to so many characters; None: not truncated.
      count: counts the tokens of a text.
      room: tokens.
    """
    full_text = render(None)
    if count(full_text) <= room:
        return full_text
    if count(render(0)) > room:
        return None
    low, high = 0, min(len(full_text), room * MAX_TOKEN_CHARACTERS)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(render(middle)) <= room else (low, middle - 1)
    return render(low)
