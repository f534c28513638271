"""Frozen questions: drawn once for each version of a task, stored with what they were drawn from, and then the same for
every model and baseline."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset, hash_dataset
from brewjax.data.tasks.examples import RankingExample, build_examples
from brewjax.data.tasks.task import Task
from brewjax.fingerprint import hash_json
from brewjax.paths import atomic_file
from brewjax.suite.suite import Draw, Size, Suite, SurfaceTask

ORIGIN = b"origin"  # the metadata of a file of questions
INTS = pa.list_(pa.int64())
EXAMPLE = {name: pa.int64() for name in ("member", "cutoff_time", "num_past_events", "request")} | {
    name: INTS for name in ("history", "candidates", "labels", "exposures")
}
SCHEMA = pa.schema(EXAMPLE | {"member_hash": pa.uint64()})


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenQuestions:
    """The frozen questions of a task.

    Attributes:
      name: of the task in the suite, "films/liked".
      dataset, task: what they are about.
      examples: prompts with their candidates and answers; sampled negatives are among them.
      digest: SHA-256 of the questions and of what they were drawn from.
    """

    name: str
    dataset: Dataset
    task: Task
    examples: list[RankingExample]
    digest: str


def frozen_questions(suite: Suite, size: Size, dataset: Dataset, surface_task: SurfaceTask) -> FrozenQuestions:
    """The questions of a task: read if they were frozen, else drawn and frozen.

    Args:
      suite: that asks them.
      size: how many there are, "quick" or "full".
      dataset: the tables of the surface.
      surface_task: one of the surface's.

    Returns:
      The questions.

    Raises:
      ConfigError: they were frozen from other tables, another task file or another draw; or there is none to ask.
    """
    task, path = surface_task.task, questions_path(suite, size, surface_task)
    origin = {
        "tables": hash_dataset(dataset.path),
        "task": task.model_dump(mode="json", by_alias=True, exclude_defaults=True),  # as a file would say it
        "draw": suite.draws[size].model_dump(mode="json"),
        "list_size": suite.list_size,
        "seed": suite.seed,
    }
    if not path.exists():
        examples = draw_questions(dataset, task, suite.draws[size], suite.list_size, suite.seed)
        _write(path, dataset, examples, origin)
    frozen, rows, digest = read_frozen(path)
    if changed := [key for key in origin if origin[key] != frozen.get(key)]:
        raise ConfigError(
            f"{path}: the questions of {surface_task.name}, version {surface_task.entry.version}, were frozen from "
            f"another {' and '.join(changed)}; put the old ones back, or raise the task's 'version' in the suite"
        )
    return FrozenQuestions(surface_task.name, dataset, task, [_example(task, row) for row in rows], digest)


def read_frozen(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """A file of frozen questions: what they were drawn from, a row for each example, and the digest of both."""
    table = pq.read_table(path)
    frozen, rows = json.loads(table.schema.metadata[ORIGIN]), table.to_pylist()
    return frozen, rows, hash_json([frozen, rows])


def questions_path(suite: Suite, size: Size, surface_task: SurfaceTask) -> Path:
    """Where the questions of a task lie."""
    name = f"{surface_task.task.name}.v{surface_task.entry.version}.parquet"
    return suite.folder / size / "questions" / surface_task.surface / name


def draw_questions(dataset: Dataset, task: Task, draw: Draw, list_size: int, seed: int) -> list[RankingExample]:
    """Whole lists of the test period in random order, until there are enough; all of them where there are not.

    A list is a request, or all that a member is asked in the period, of which at most `list_size` questions are drawn.

    Raises:
      ConfigError: no list has different answers, so that no ranking of it is better than another.
    """
    lists: dict[int, list[RankingExample]] = {}
    for example in build_examples(dataset, task, "test", seed):
        lists.setdefault(example.request if task.questions.per_request else -1 - example.member, []).append(example)
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    keys = np.array(sorted(lists))
    selected: list[RankingExample] = []
    questions = rankable = 0
    for key in keys[rng.permutation(len(keys))]:
        if questions >= draw.questions and rankable >= draw.lists:
            break
        examples = lists[int(key)]
        if not task.questions.per_request:
            examples = [*_cut(rng, examples, list_size)]
        selected += examples
        questions += sum(len(example.candidates) for example in examples)
        rankable += len(set(np.concatenate([example.labels for example in examples]).tolist())) > 1
    if not rankable:
        raise task.error("no list of the test period has different answers, so none can be ranked", "split")
    return sorted(selected, key=lambda example: (example.member, example.cutoff_time, example.request))


def _cut(rng: np.random.Generator, examples: Sequence[RankingExample], size: int) -> Iterator[RankingExample]:
    """Random examples of a list, and of the last as many questions as `size` leaves room for."""
    for index in rng.permutation(len(examples)):
        example = examples[index]
        if len(example.candidates) > size:
            example = example.select(np.sort(rng.permutation(len(example.candidates))[:size]))
        size -= len(example.candidates)
        yield example
        if not size:
            return


def _write(path: Path, dataset: Dataset, examples: Sequence[RankingExample], origin: dict[str, Any]) -> None:
    rows: list[dict[str, Any]] = [
        {name: np.asarray(getattr(example, name)).tolist() for name in EXAMPLE}
        | {"member_hash": int(dataset.member_hash[example.member])}
        for example in examples
    ]
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({ORIGIN: json.dumps(origin)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)


def _example(task: Task, row: dict[str, Any]) -> RankingExample:
    return RankingExample(
        task.name,
        row["member"],
        row["cutoff_time"],
        np.array(row["history"], np.int64),
        row["num_past_events"],
        np.array(row["candidates"], np.int32),
        np.array(row["labels"], np.int32),
        np.array(row["exposures"], np.int64),
        row["request"],
    )


def first_moments(moments: Sequence[tuple[int, int]]) -> list[int]:
    """Which examples are of their member's first moment: what cold starts are asked about.

    Args:
      moments: member and cutoff time of each example.
    """
    first: dict[int, int] = {}
    for member, cutoff_time in moments:
        first[member] = min(first.get(member, cutoff_time), cutoff_time)
    return [index for index, (member, cutoff_time) in enumerate(moments) if cutoff_time == first[member]]


@functools.lru_cache(maxsize=1)  # several predictors in a row are asked the same
def cut_history(questions: FrozenQuestions, past_events: int) -> FrozenQuestions:
    """The questions of `first_moments`, as if their members had only had their latest `past_events` events before.

    The older events are gone from the tables, so that no fact, of the member or of an item, knows of them: a cold start
    of the same members with the same questions. What they did after the moment stays.
    """
    dataset = questions.dataset
    moments = [(example.member, example.cutoff_time) for example in questions.examples]
    examples = [questions.examples[index] for index in first_moments(moments)]
    keep = np.ones(len(dataset.events), bool)
    for example in examples:
        start, stop = _past(dataset, example)
        keep[start : max(start, stop - past_events)] = False
    row = np.cumsum(keep) - 1  # of each event that is left, among these
    cut = []
    for example in examples:
        start, stop = _past(dataset, example)
        cut.append(
            dataclasses.replace(
                example,
                history=row[example.history[keep[example.history]]],
                exposures=np.where(example.exposures >= 0, row[np.maximum(example.exposures, 0)], -1),
                num_past_events=int(keep[start:stop].sum()),
            )
        )
    events = dataset.events.filter(pa.array(keep))
    return dataclasses.replace(questions, dataset=dataclasses.replace(dataset, events=events), examples=cut)


def _past(dataset: Dataset, example: RankingExample) -> tuple[int, int]:
    """The rows of the events of an example's member before its moment, from the first to before the second."""
    start, end = dataset.member_offsets[example.member : example.member + 2]
    return int(start), int(start + np.searchsorted(dataset.event_time[start:end], example.cutoff_time, side="left"))
