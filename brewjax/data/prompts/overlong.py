"""Texts that do not fit into the budget of a prompt: cut to what fits, named and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

LONGEST_TOKEN = 128  # characters, of those that tokenizers have


class Overlong(NamedTuple):
    """An item, or a member, of which more is to be said than fits.

    Attributes:
      row: of the table.
      noun: what the dataset's card calls it, and its id: "job 107".
      column: the attribute that takes most tokens.
      tokens: that all of it takes, where there are `room`.
    """

    row: int
    noun: str
    column: str
    tokens: int
    room: int

    def __str__(self) -> str:
        return f"{self.noun} takes {self.tokens:,} tokens, most of them its '{self.column}', where {self.room:,} fit"


class OverlongLog:
    """What was cut or skipped, each row of a table once for a task."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, Overlong]] = {}

    def add(self, task: str, done: str, overlong: Overlong) -> None:
        """Notes that `done` ("cut", "skipped") was done about it."""
        self._found.setdefault((task, done), {}).setdefault(overlong.noun, overlong)

    def lines(self) -> list[str]:
        """A line for each task and what was done, with the longest; begins anew."""
        entries, self._found = self._found, {}
        lines = []
        for (task, done), by_noun in entries.items():
            longest = max(by_noun.values(), key=lambda overlong: overlong.tokens)
            count = "1 text too long was" if len(by_noun) == 1 else f"{len(by_noun):,} texts too long were"
            lines.append(f"{task}: {count} {done}, {'the longest: ' if len(by_noun) > 1 else ''}{longest}")
        return lines


def cut_to_fit(say: Callable[[int | None], str], count: Callable[[str], int], room: int) -> str | None:
    """The longest text of at most `room` tokens that `say` makes; None where it makes none.

    Args:
      say: makes the text, each value in it cut to so many characters; None: uncut.
      count: tokens of a text.
    """
    whole = say(None)
    if count(whole) <= room:
        return whole
    if count(say(0)) > room:
        return None
    low, high = 0, min(len(whole), room * LONGEST_TOKEN)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(say(middle)) <= room else (low, middle - 1)
    return say(low)
