"""The gate: a model is accepted if it is not worse than the last that was, by mean, by domain, and in its ties."""

from __future__ import annotations

import datetime
import json
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from brewjax.paths import write_text
from brewjax.suite.board import HEADLINE, Board, Row, make_board
from brewjax.suite.runs import Entry
from brewjax.suite.suite import Size, Suite

ALPHA = 0.05  # chance that some domain is called down where none is
MAX_TWIN_GAP = 1e-6  # between the probabilities of one question that is asked twice in a prompt


class Verdict(NamedTuple):
    """What the gate says; it accepts where there is no reason against."""

    reasons: list[str]

    @property
    def accepted(self) -> bool:
        """Whether the model may take the place of the last accepted one."""
        return not self.reasons


def judge(board: Board, row: Row, last: Row | None) -> Verdict:
    """Judges a row beside that of the last accepted model, if any."""
    reasons = [f"{name} is missing" for name in row.missing[:3]]
    if len(row.missing) > 3:
        reasons.append(f"and {len(row.missing) - 3} more tasks")
    if row.entry.twin_gap > MAX_TWIN_GAP:
        reasons.append(f"a question asked twice gets scores {row.entry.twin_gap:.1e} apart, more than {MAX_TWIN_GAP:g}")
    if row.missing or last is None:
        return Verdict(reasons)
    if last.missing:
        reasons.append(f"{last.name}, accepted before, has not answered {last.missing[0]} as it is now: run it again")
        return Verdict(reasons)
    difference = row.minus(last)
    if difference.value < -difference.error:
        reasons.append(
            f"the mean is {-difference.value:.4f} below that of {last.name}, more than its interval of "
            f"{difference.error:.4f}"
        )
    for domain in domains_down(board, row, last):
        difference = row.minus(last, domain)
        reasons.append(f"{domain} is down by {-difference.value:.4f} ±{difference.error:.4f}")
    return Verdict(reasons)


def domains_down(board: Board, row: Row, last: Row) -> list[str]:
    """The domains that are worse beyond chance, with all domains looked at (Holm, Scand. J. Statist. 1979)."""
    p_values = []
    for domain in board.domains:
        difference = row.minus(last, domain)
        error = difference.error / 1.96
        p_values.append(float(scipy.stats.norm.cdf(difference.value / error)) if error > 0 else 1.0)
    return [domain for domain, rejected in zip(board.domains, holm(p_values), strict=True) if rejected]


def holm(p_values: list[float], alpha: float = ALPHA) -> list[bool]:
    """Which hypotheses are rejected: from the smallest p-value on, each at alpha over the number of those left."""
    order = np.argsort(p_values)
    rejected = [False] * len(p_values)
    for place, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - place):
            break
        rejected[index] = True
    return rejected


def accept(suite: Suite, size: Size, name: str) -> Verdict:
    """Judges a model of the leaderboard, and writes it into the history where it is accepted.

    Args:
      suite: what is asked.
      size: how much of it, "quick" or "full".
      name: of the model's row.

    Returns:
      Whether the model may follow the last accepted one, and why.

    Raises:
      ValueError: there is no such model.
    """
    board = make_board(suite, size)
    row, before = board.row(name), history(suite, size)
    if row is None or row.entry.folder is None:
        models = ", ".join(each.name for each in board.rows if each.entry.folder) or "none"
        raise ValueError(f"no model '{name}' on the leaderboard; there are: {models}")
    last = make_board(suite, size, [Entry.model_validate(before[-1]["entry"])]).rows[0] if before else None
    verdict = judge(board, row, last)
    if verdict.accepted:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "mean": row.mean[HEADLINE].value,
            "error": row.mean[HEADLINE].error,
            "domains": {domain: row.domains[domain][HEADLINE].value for domain in board.domains},
            "entry": row.entry.model_dump(mode="json"),
        }
        lines = [json.dumps(each) for each in [*before, record]]
        write_text(_history_file(suite, size), "\n".join(lines) + "\n")
    return verdict


def history(suite: Suite, size: Size) -> list[dict[str, Any]]:
    """The accepted models, the first first: date, mean with its error, domains and entry of each."""
    path = _history_file(suite, size)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _history_file(suite: Suite, size: Size) -> Any:
    return suite.folder / size / "accepted.jsonl"
