"""TODO."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task

Provenance = dict[str, Any]  # on where a record came from


def task_rng(seed: int, task: Task) -> np.random.Generator:
    """Random numbers of a task's own: its records do not depend on the tasks beside it."""
    return np.random.default_rng([seed, zlib.crc32(task.name.encode())])


def provenance(verbalizer: Verbalizer, task: Task, example: RankingExample, style: str) -> Provenance:
    """The note on a record that was made from an example."""
    dataset = verbalizer.dataset
    member = dataset.members[dataset.card.members.id][example.member].as_py()
    return {"task": task.name, "member": member, "cutoff_time": example.cutoff_time, "style": style}
