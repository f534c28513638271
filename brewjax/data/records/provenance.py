"""Where a training record came from, and the random numbers that made it: shared by all makers of records."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task

Provenance = dict[str, Any]  # names where a record came from; a line of its shards' sources.jsonl


def task_rng(seed: int, task: Task) -> np.random.Generator:
    """A generator of the task's own: its records do not depend on which other tasks a run has."""
    return np.random.default_rng([seed, zlib.crc32(task.name.encode())])


def provenance(verbalizer: Verbalizer, task: Task, example: RankingExample, style: str) -> Provenance:
    """The provenance of a record made from an example: task, member id, cutoff time and style."""
    dataset = verbalizer.dataset
    member = dataset.members[dataset.card.members.id][example.member].as_py()
    return {"task": task.name, "member": member, "cutoff_time": example.cutoff_time, "style": style}
