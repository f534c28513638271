"""Slices of a task's questions, and whether notes are followed: what the leaderboard knows of each question."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from brewjax.data.simulate.truth import note_of, oracle
from brewjax.data.tasks.task import Task
from brewjax.evaluate.predictions import scores
from brewjax.evaluate.results import Estimate
from brewjax.paths import write_table
from brewjax.suite.questions import FrozenQuestions
from brewjax.suite.suite import Size, Suite

COLD, NEW, MONTHS = "cold start", "new items", "months after training"  # kinds of slices
MONTH = 30 * 24 * 3600 * 1_000_000  # microseconds
LATER = 3  # months, from which on there is one slice


def write_slices(suite: Suite, size: Size, questions: FrozenQuestions) -> None:
    """Writes a row for each question, unless it was written before.

    The columns are NEW (nobody had an event with the item before training ended), MONTHS since then, where events have
    times, and where the truth is known with and without the task's note, the utilities "noted" and "plain".
    """
    path = _path(suite, size, questions.digest)
    if path.exists():
        return
    dataset, task, examples = questions.dataset, questions.task, questions.examples
    end, _ = task.boundaries(dataset)
    candidates = np.concatenate([example.candidates for example in examples])
    columns = {NEW: ~np.isin(candidates, dataset.event_item[dataset.event_time < end])}
    if dataset.card.events.time:
        months = [(example.cutoff_time - end) // MONTH for example in examples]
        columns[MONTHS] = np.repeat(months, [len(example.candidates) for example in examples])
    if note := note_of(dataset, task):
        for column, stated in (("noted", note), ("plain", "none")):
            truth = oracle(dataset, task, examples, stated)
            assert truth is not None  # by `note_of`
            columns[column] = truth[:, 1 - task.default_label]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, pa.table(columns))


def read_slices(suite: Suite, size: Size, digest: str) -> pa.Table | None:
    """What `write_slices` wrote of the questions with this digest; None if nothing."""
    path = _path(suite, size, digest)
    return pq.read_table(path) if path.exists() else None


def slice_masks(slices: pa.Table) -> dict[tuple[str, str], np.ndarray]:
    """Which questions are of each slice, bool [questions] by kind and name; kinds that divide nothing are left out."""
    new = slices[NEW].to_numpy()
    masks = {(NEW, "new"): new, (NEW, "known"): ~new}
    if MONTHS in slices.column_names:
        month = np.minimum(slices[MONTHS].to_numpy(), LATER)
        for each in np.unique(month).tolist():
            masks[MONTHS, f"{each} or more" if each == LATER else f"{each} to {each + 1}"] = month == each
    return {key: mask for key, mask in masks.items() if mask.any() and not mask.all()}


def note_followed(
    task: Task, slices: pa.Table, noted: pa.Table, plain: pa.Table, weights: np.ndarray, member: np.ndarray
) -> Estimate:
    """Whether a predictor's order turns with a note where the true order does: .5 + (with - against) / 2.

    Of the pairs of a list that the note truly turns around, the predictor turns these shares with it and against it.
    One that does not read notes has exactly .5, the truth has 1.

    Args:
      task: with the note.
      slices: of its questions.
      noted, plain: predictions of them with the note and without.
      weights: float64 [1 + resamples, members]; see `estimates`.
      member: int [questions], the column of `weights` of each question.
    """
    lists = noted["list"].to_numpy()
    first, second = np.nonzero(np.triu(lists[:, None] == lists, 1))

    def order(values: np.ndarray) -> np.ndarray:
        return np.sign(values[first] - values[second])

    truth, before = (order(slices[column].to_numpy()) for column in ("noted", "plain"))
    turned = truth * before < 0
    share = 0.5 + truth * (order(scores(noted, task)) - order(scores(plain, task))) / 4
    pair_weights = weights[:, member[first[turned]]]
    with np.errstate(invalid="ignore"):
        values = pair_weights @ share[turned] / pair_weights.sum(axis=1)
    return Estimate(float(values[0]), values[1:], (0.0, 1.0))


def _path(suite: Suite, size: Size, digest: str) -> Path:
    return suite.folder / size / "slices" / f"{digest[:32]}.parquet"
