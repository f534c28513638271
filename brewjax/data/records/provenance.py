"""Which examples are training records, where each came from, and its random numbers: for all makers of records."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.partition import Partition
from brewjax.data.tasks.examples import RankingExample, SplitExamples
from brewjax.data.tasks.task import Task

Provenance = dict[str, Any]  # names where a record came from; a line of its shard's .jsonl file
RECORDS_STREAM = 1  # of an example's random numbers; its negatives have another


class SampleConfig(Protocol):
    """Settings that choose examples."""

    @property
    def max_examples(self) -> int | None:
        """The most examples of a task and repeat."""

    @property
    def seed(self) -> int:
        """Of the choice."""


def training_examples(
    dataset: Dataset, task: Task, config: SampleConfig, partition: Partition, repeats: int = 1
) -> Iterator[RankingExample]:
    """Yields the examples of the training period, each repeat with a seed of its own, in order of the hashes of the
    members' ids, then of cutoff time, then of repeats."""
    split = SplitExamples.of(dataset, task, "train")
    passes = [split.build(config.max_examples, config.seed + repeat, partition) for repeat in range(repeats)]
    yield from heapq.merge(*passes, key=lambda example: (dataset.member_hash[example.member], example.cutoff_time))


def example_rng(example: RankingExample, task: Task) -> np.random.Generator:
    """A generator of the example's own: its record depends on no other example, and on no other task of a run."""
    return np.random.default_rng([example.seed, zlib.crc32(task.name.encode()), RECORDS_STREAM])


def provenance(verbalizer: Verbalizer, task: Task, example: RankingExample, style: str) -> Provenance:
    """The provenance of a record made from an example: task, member id, cutoff time and style."""
    dataset = verbalizer.dataset
    member = dataset.members[dataset.card.members.id][example.member].as_py()
    return {"task": task.name, "member": member, "cutoff_time": example.cutoff_time, "style": style}
