"""Runs of a suite: every task's questions scored by a predictor, each score kept under all that it depends on."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from brewjax.config import Config
from brewjax.console import plain_console
from brewjax.data.simulate.truth import note_of
from brewjax.evaluate.predictions import from_examples
from brewjax.fingerprint import hash_json
from brewjax.paths import write_table, write_text
from brewjax.suite.contamination import check_model
from brewjax.suite.predictors import Predictor, twin_gap
from brewjax.suite.questions import FrozenQuestions, cut_history, frozen_questions
from brewjax.suite.slices import write_slices
from brewjax.suite.suite import Size, Suite

KEY, COST = b"key", b"cost"  # metadata of a file of predictions: what they depend on; seconds and tokens
PLAIN = "@no note"  # behind the name of a task whose questions are asked without its note
TWINS = 2  # prompts of each surface in which a question is asked twice


class Entry(Config):
    """A model or baseline on the leaderboard: which predictions are its own."""

    name: str
    """On the leaderboard; of a model, its folder by default."""
    folder: str | None
    """The model's folder; null for a baseline."""
    fingerprint: str
    """SHA-256 of what it is."""
    predictions: dict[str, str]
    """By task, the file of predictions; cold starts are "films/liked@5", questions without their note "..@no note"."""
    twin_gap: float = 0.0
    """The largest difference between the scores of a question that was asked twice in one prompt."""


class Answers(NamedTuple):
    """What a predictor answered about a surface.

    Attributes:
      predictions: by task, the file.
      twin_gap: see `Entry`.
    """

    predictions: dict[str, str]
    twin_gap: float


def score(
    suite: Suite,
    size: Size,
    predictor: Predictor,
    questions: FrozenQuestions,
    past_events: int | None = None,
    noted: bool = True,
) -> str:
    """Predicts the questions, unless the same predictor has before.

    Args:
      past_events: asks as if the members had only had so many events.
      noted: False leaves the task's steering note out.

    Returns:
      The name of the file in the suite's folder of predictions.
    """
    key = {"questions": questions.digest, "past_events": past_events, **predictor.identity}
    task = questions.task
    if not noted:
        key["noted"], task = False, task.model_copy(update={"steering_note": ""})
    path = predictions_folder(suite, size) / f"{hash_json(key)[:32]}.parquet"
    if not path.exists():
        cut = questions if past_events is None else cut_history(questions, past_events)
        probabilities, cost = predictor.predict(questions.dataset, task, cut.examples, cut.dataset)
        table = from_examples(cut.examples, probabilities)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, table.replace_schema_metadata({KEY: json.dumps(key), COST: json.dumps(cost)}))
        plain_console().print(f"{predictor.name}: {questions.name}: {len(table):,} questions, {cost['seconds']:.1f} s")
    return path.name


def read_predictions(suite: Suite, size: Size, file: str) -> tuple[pa.Table, dict[str, Any], dict[str, float]]:
    """A file of predictions: the table, what it depends on, and what it cost."""
    table = pq.read_table(predictions_folder(suite, size) / file)
    return table, json.loads(table.schema.metadata[KEY]), json.loads(table.schema.metadata[COST])


def predictions_folder(suite: Suite, size: Size) -> Path:
    """Where the predictions of all models and baselines lie."""
    return suite.folder / size / "predictions"


def run_surface(suite: Suite, size: Size, predictors: Sequence[Predictor], surface: str) -> list[Answers]:
    """The answers of each predictor to all tasks of a surface."""
    dataset, surface_tasks = suite.load_surface(surface)
    frozen = [frozen_questions(suite, size, dataset, each) for each in surface_tasks]
    files: list[dict[str, str]] = [{} for _ in predictors]
    # Task by task: what baselines learn from is then made once for all of them.
    for surface_task, questions in zip(surface_tasks, frozen, strict=True):
        for past_events in (None, *surface_task.entry.past_events):
            name = questions.name if past_events is None else f"{questions.name}@{past_events}"
            for predictor, own_files in zip(predictors, files, strict=True):
                if not predictor.can_answer(dataset, surface_task.task):
                    continue
                own_files[name] = score(suite, size, predictor, questions, past_events)
        write_slices(suite, size, questions)
        if note_of(dataset, surface_task.task):
            for predictor, own_files in zip(predictors, files, strict=True):
                if predictor.folder:  # no baseline reads notes
                    own_files[questions.name + PLAIN] = score(suite, size, predictor, questions, noted=False)
    return [
        Answers(own_files, _twin_gap(suite, size, predictor, frozen[0]) if predictor.folder else 0.0)
        for predictor, own_files in zip(predictors, files, strict=True)
    ]


def _twin_gap(suite: Suite, size: Size, predictor: Predictor, questions: FrozenQuestions) -> float:
    key = hash_json({"twins": TWINS, "questions": questions.digest, **predictor.identity})
    path = predictions_folder(suite, size) / f"twins-{key[:32]}.json"
    if not path.exists():
        gap = twin_gap(predictor, questions.dataset, questions.task, questions.examples[:TWINS])
        write_text(path, json.dumps(gap))
    return float(json.loads(path.read_text()))


def run(
    suite: Suite,
    size: Size,
    predictors: Sequence[Predictor],
    surfaces: Iterable[str] | None = None,
    workers: int = 1,
) -> list[Entry]:
    """Puts predictors on the leaderboard.

    Args:
      suite: what is asked.
      size: how much of it, "quick" or "full".
      predictors: models and baselines.
      surfaces: see `answer`.
      workers: see `answer`.

    Returns:
      The entry of each predictor, as it was written.
    """
    return [_write_entry(suite, size, entry) for entry in answer(suite, size, predictors, surfaces, workers)]


def answer(
    suite: Suite,
    size: Size,
    predictors: Sequence[Predictor],
    surfaces: Iterable[str] | None = None,
    workers: int = 1,
) -> list[Entry]:
    """Answers the questions of a suite; what a predictor has answered before is not asked again.

    A run that is killed goes on where it was: each task's predictions are written when they are complete.

    Args:
      suite: what is asked.
      size: how much of it, "quick" or "full".
      predictors: models and baselines.
      surfaces: some of the suite's, for a part of it; all by default.
      workers: processes, each with a surface at a time. Figures do not depend on their number.

    Returns:
      An entry for each predictor, which is not on the leaderboard.

    Raises:
      ContaminationError: a model was trained on what the suite asks.
    """
    names = list(suite.surfaces) if surfaces is None else list(surfaces)
    for predictor in predictors:
        check_model(suite, predictor.training, names)
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(names)), context, initializer=_set_predictors, initargs=(predictors,)
        ) as pool:
            by_surface = [*pool.map(functools.partial(_run_surface, suite, size), names)]
    else:
        by_surface = [run_surface(suite, size, predictors, name) for name in names]
    entries = []
    for index, predictor in enumerate(predictors):
        answers = [results[index] for results in by_surface]
        entries.append(
            Entry(
                name=predictor.name,
                folder=str(predictor.folder) if predictor.folder else None,
                fingerprint=hash_json(predictor.identity),
                predictions={task: file for part in answers for task, file in part.predictions.items()},
                twin_gap=max(part.twin_gap for part in answers),
            )
        )
    return entries


_predictors: list[Predictor] = []  # of a worker process: a model is loaded once for all its surfaces


def _set_predictors(predictors: Sequence[Predictor]) -> None:
    _predictors[:] = predictors


def _run_surface(suite: Suite, size: Size, name: str) -> list[Answers]:
    return run_surface(suite, size, _predictors, name)


def _write_entry(suite: Suite, size: Size, entry: Entry) -> Entry:
    """Writes an entry; a part of the suite adds to what the same model has."""
    path = entries_folder(suite, size) / f"{entry.name.replace('/', '+')}.yaml"
    if path.exists():
        before = Entry.load(path)
        if before.fingerprint == entry.fingerprint:
            entry = entry.model_copy(
                update={
                    "predictions": before.predictions | entry.predictions,
                    "twin_gap": max(before.twin_gap, entry.twin_gap),
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    entry.save(path)
    return entry


def entries_folder(suite: Suite, size: Size) -> Path:
    """Where what is on the leaderboard is written."""
    return suite.folder / size / "entries"


def read_entries(suite: Suite, size: Size) -> list[Entry]:
    """All that is on the leaderboard, by name."""
    return [Entry.load(path) for path in sorted(entries_folder(suite, size).glob("*.yaml"))]
