"""Examples on an excerpt of a dataset: the events of their candidates, and the scales of numbers, which are stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brewjax.data.tables.dataset import Dataset, hash_dataset
from brewjax.data.tables.excerpt import with_items
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import RankingExample, history_before
from brewjax.data.tasks.task import Task
from brewjax.fingerprint import hash_json
from brewjax.paths import user_cache, write_text


def read_candidates(
    dataset: Dataset, task: Task, examples: Sequence[RankingExample]
) -> tuple[Dataset, list[RankingExample]]:
    """Reads the events of the candidates of examples without exposures, if the dataset is an excerpt.

    Args:
      dataset: an excerpt, or a whole dataset, which is returned as it is.
      task: what the examples ask.
      examples: as `unanswered` makes them of `dataset`.

    Returns:
      The excerpt with these events, and the examples, whose histories are rows of it.
    """
    if dataset.summary is None:
        return dataset, list(examples)
    dataset = with_items(dataset, np.unique(np.concatenate([example.candidates for example in examples])))
    histories = [history_before(dataset, task, example.member, example.cutoff_time)[0] for example in examples]
    return dataset, [
        dataclasses.replace(example, history=history) for example, history in zip(examples, histories, strict=True)
    ]


def training_scales(dataset: Dataset, task: Task) -> Scales:
    """`Scales.fit` before the task's validation period, on all events of the tables.

    Of an excerpt, they are those that `store_scales` stored; if there are none for these tables, they are read
    whole and stored.
    """
    if dataset.summary is None:
        return Scales.fit(dataset, task.boundaries(dataset)[0])
    path = _path(dataset, task)
    if path.is_file():
        return Scales(**json.loads(path.read_text()))
    return store_scales(Dataset.load(dataset.path), task)


def store_scales(dataset: Dataset, task: Task) -> Scales:
    """Fits the scales of tables before a task's validation period, and stores them in the user's cache.

    Args:
      dataset: all events, as they were just read.
      task: says when validation begins.

    Returns:
      What `training_scales` then finds for an excerpt of these tables.
    """
    scales = Scales.fit(dataset, task.boundaries(dataset)[0])
    path = _path(dataset, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, scales.model_dump_json())
    return scales


def _path(dataset: Dataset, task: Task) -> Path:
    fields = list(Scales.model_fields)  # other versions of brewjax stored others
    key = hash_json([hash_dataset(dataset.path), task.split.model_dump(mode="json"), fields])
    return user_cache() / "scales" / f"{key}.json"
