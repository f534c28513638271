"""Records of contrastive training: a member's text, items that the member went on to, and items passed over.

The texts of a record are pieces that see only themselves, so one pass embeds them all. Which items they are stands in a
table beside each shard, from which a batch is labelled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
from jaxtyping import Array, Float, Int

from brewjax.config import Config, Seed
from brewjax.data.prompts.sides import SideConfig, Sides
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.loader import TokenBatch
from brewjax.data.records.provenance import Provenance, example_rng, provenance, training_examples
from brewjax.data.records.shards import TABLE, Shards, shard_files, shard_folders
from brewjax.data.tables.partition import WHOLE, Partition
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import NO_TARGET
from pallas_kernels.token_labels import PADDING, SELF

MEMBER, POSITIVE, NEGATIVE, MISSING = 0, 1, 2, 3  # roles of texts


class MinedNegatives(Config):
    """Hard negatives that an encoder takes for what the member goes on to: items near the member."""

    encoder: str
    """The stage whose encoder finds them, or the folder of an encoder; of the same task."""
    count: int = pydantic.Field(default=2, gt=0)
    """The most of them in a record, chosen at random."""
    depth: int = pydantic.Field(default=100, gt=0)
    """How many of the nearest items they are chosen from."""
    margin: float = pydantic.Field(default=0.95, gt=0, le=1)
    """What is more similar to the member than this fraction of the mean of the example's positives is left out: most
    likely it is a positive that the member was never shown."""


class ContrastiveConfig(SideConfig):
    """The data of contrastive training."""

    repeats: int = pydantic.Field(default=1, gt=0)
    """How many times every example is used, each time with another choice of its items."""
    max_examples: int | None = pydantic.Field(default=None, gt=0)
    """The most examples of each repeat, chosen at random if there are more; by default all."""
    positives: int = pydantic.Field(default=8, gt=0)
    """The most items of the best label in a record, chosen at random. They share the member's text."""
    hard_negatives: int = pydantic.Field(default=2, ge=0)
    """The most items of other labels in a record, chosen at random: events of the member, not sampled negatives."""
    mined_negatives: MinedNegatives | None = None
    """More hard negatives, mined from an encoder's index of all items before training; by default none."""
    ranker: str | None = None
    """The stage whose model, or the folder of a ranker, whose scores of a record's items are learnt besides
    (`loss.ranker_weight`). Hard negatives may then be sampled negatives of the task, which the ranker tells apart."""
    seed: Seed = 0
    """Seed of the choices."""


@dataclasses.dataclass(frozen=True)
class ContrastiveExample:
    """A member's text and items' texts as token ids.

    Attributes:
      member: row of the member.
      items: rows of the items, those that the member went on to first.
      num_positives: how many of the items these are.
      texts: tokens of the member's text, then of each item's.
      log_odds: of the best label of each item by a ranker, NaN where it has not answered; None without a ranker.
    """

    member: int
    items: list[int]
    num_positives: int
    texts: list[list[int]]
    log_odds: list[float] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.texts))

    def split(self, capacity: int) -> list[ContrastiveExample]:
        """This example, without its last items where they do not fit: hard negatives go first.

        Raises:
          ValueError: the member's text and one item exceed the capacity.
        """
        ends = np.cumsum([len(text) for text in self.texts])
        fitting = int(np.searchsorted(ends, capacity, side="right"))
        if fitting < 2:
            raise ValueError(
                f"a member's text of {len(self.texts[0])} tokens and an item's of {len(self.texts[1])} do not fit in a "
                f"row of {capacity} tokens; raise seq_len, or lower prompts.max_tokens"
            )
        items = self.items[: fitting - 1]
        log_odds = None if self.log_odds is None else self.log_odds[: fitting - 1]
        num_positives = min(self.num_positives, len(items))
        return [ContrastiveExample(self.member, items, num_positives, self.texts[:fitting], log_odds)]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The fields of `TokenBatch` by name, each [T]; there are no targets."""
        lengths = [len(text) for text in self.texts]
        fields = {
            "tokens": np.concatenate(self.texts),
            "positions": np.concatenate([np.arange(length) for length in lengths]),
            "piece_id": np.repeat(np.arange(len(lengths)), lengths),
            "visibility": np.full(len(self), SELF),
            "targets": np.full(len(self), NO_TARGET),
            "preference": np.zeros(len(self)),
        }
        return {name: field.astype(np.int32) for name, field in fields.items()} | {
            "weights": np.zeros(len(self), np.float32)
        }


LookUp = Callable[[RankingExample], np.ndarray]  # of an example's array, which was computed before


def choose_items(
    example: RankingExample, task: Task, config: ContrastiveConfig, mined: LookUp | None = None
) -> tuple[np.ndarray, int]:
    """Chooses the items of an example's record; the example's seed decides.

    Args:
      example: of the training period.
      task: whose best label makes an item a positive.
      config: how many positives and hard negatives a record has.
      mined: gives the rows of the items that `mined_negatives` are chosen from.

    Returns:
      int64 [items], rows of the items, each once, the positives first; and how many these are.
    """
    rng, best = example_rng(example, task), int(np.argmax(task.values))
    positives = rng.permutation(np.unique(example.candidates[example.labels == best]))[: config.positives]
    negatives = np.setdiff1d(example.candidates[example.labels != best], positives)
    if task.questions.sampled_negatives and not config.ranker:  # those of a batch are as good, and cost nothing
        negatives = negatives[:0]
    items = np.concatenate([positives, rng.permutation(negatives)[: config.hard_negatives]]).astype(int)
    if mined and config.mined_negatives:
        nearest = rng.permutation(np.setdiff1d(mined(example), items))
        items = np.concatenate([items, nearest[: config.mined_negatives.count]])
    return items, len(positives)


def contrastive_records(
    verbalizer: Verbalizer,
    task: Task,
    prompts: PromptConfig,
    config: ContrastiveConfig,
    partition: Partition = WHOLE,
    mined: LookUp | None = None,
    ranked: LookUp | None = None,
) -> Iterator[tuple[ContrastiveExample, Provenance]]:
    """Makes the records of a task's training period, for `write_shard` with an `ItemTableWriter`.

    They are in order of the hashes of the members' ids, then of cutoff time, and the seed decides each by itself. An
    item is described as of the example's cutoff time, as the member is.

    Args:
      verbalizer: of the dataset.
      task: whose best label makes an item a positive, and any other one a hard negative, unless it is sampled.
      prompts: the style (`score_style`) and the most tokens of a text.
      config: how many positives and hard negatives a record has, and the instructions.
      partition: only the records of its members.
      mined: gives the rows of the items that `mined_negatives` are chosen from.
      ranked: gives the `log_odds` of the items of `choose_items`.

    Yields:
      Each record with its provenance.

    Raises:
      ValueError: a member's profile alone is longer than `prompts.max_tokens`.
    """
    sides, style = Sides(verbalizer, task, prompts, config), prompts.score_style
    for example in training_examples(verbalizer.dataset, task, config, partition, config.repeats):
        items, num_positives = choose_items(example, task, config, mined)
        if num_positives:
            texts = [sides.member(example), *sides.items(items, example.cutoff_time)]
            log_odds = ranked(example).tolist() if ranked else None
            record = ContrastiveExample(example.member, items.tolist(), num_positives, texts, log_odds)
            yield record, provenance(verbalizer, task, example, style)


class ItemTableWriter:
    """Collects which items the texts of a shard's records are."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []  # record, role, item, member of each text
        self._log_odds: list[float] = []  # of each text, where a ranker gave any
        self._records, self._shortest = 0, np.iinfo(np.int32).max

    def add(self, record: Any) -> None:
        """Adds a record, a `ContrastiveExample`."""
        self._rows.append((self._records, MEMBER, -1, record.member))
        for number, item in enumerate(record.items):
            role = POSITIVE if number < record.num_positives else NEGATIVE
            self._rows.append((self._records, role, item, record.member))
        if record.log_odds is not None:
            self._log_odds += [math.nan, *record.log_odds]
        self._shortest = min(self._shortest, *map(len, record.texts))
        self._records += 1

    def write(self, path: Path) -> None:
        """Writes the table to `path`, an .npz file: record, role, item and member of each text, int32 [texts]; and its
        `log_odds`, float32 [texts], where a ranker gave any."""
        record, role, item, member = np.array(self._rows, np.int32).reshape(-1, 4).T
        shortest, records = np.int64(self._shortest), np.int64(self._records)
        columns: dict[str, Any] = {"record": record, "role": role, "item": item, "member": member}
        if self._log_odds:
            columns["log_odds"] = np.array(self._log_odds, np.float32)
        np.savez(path, **columns, shortest=shortest, records=records)

    def counts(self) -> dict[str, int]:
        """Counts the items of the records.

        Returns:
          How many texts are "positives" and "negatives".
        """
        roles = [role for _, role, _, _ in self._rows]
        return {"positives": roles.count(POSITIVE), "negatives": roles.count(NEGATIVE)}


class TextLabels(NamedTuple):
    """What the texts of a batch are: [rows, N], in the order in which they stand in a row.

    Attributes:
      record: of the shards, which one member's text shares with its items; -1 where a row has fewer texts.
      role: MEMBER, POSITIVE, NEGATIVE or MISSING.
      item: row of the item; -1 for a member's text.
      member: row of the record's member.
      log_share: log of the item's share of all items in the records: how likely a batch has it.
      log_odds: of the best label by a ranker; NaN where it has not answered. None where records have no ranker.
    """

    record: Int[Array, "B N"]
    role: Int[Array, "B N"]
    item: Int[Array, "B N"]
    member: Int[Array, "B N"]
    log_share: Float[Array, "B N"]
    log_odds: Float[Array, "B N"] | None = None


MISSING_LABELS = TextLabels(-1, MISSING, -1, -1, 0, math.nan)  # type: ignore[arg-type]  # of a text that is not there


class ItemTable:
    """Which items the texts of shards are, as `ItemTableWriter` wrote it.

    Raises:
      ValueError: a shard has no table, or none of them has a record.
    """

    def __init__(self, shards: Shards):
        columns: dict[str, list[np.ndarray]] = {name: [] for name in TextLabels._fields}
        first, self._shortest = 0, np.iinfo(np.int32).max
        for folder in shard_folders(shards):
            tables = [_load_table(path) for path in shard_files(folder, TABLE)]
            items = np.concatenate([table["item"] for table in tables])
            log_counts = np.log(np.maximum(np.bincount(items[items >= 0], minlength=1), 1) / (items >= 0).sum())
            for table in tables:
                table["record"] += first
                table["log_share"] = np.where(table["item"] >= 0, log_counts[table["item"]], 0).astype(np.float32)
                first += int(table["records"])
                self._shortest = min(self._shortest, int(table["shortest"]))
                for name, values in columns.items():
                    values += [table[name]] if name in table else []
        if not first:
            raise ValueError(f"{shards}: no example of the training period has an item of the task's best label")
        self._columns = {name: np.concatenate(values) for name, values in columns.items() if values}
        self._starts = np.searchsorted(self._columns["record"], np.arange(first))

    def look_up(self, batch: TokenBatch) -> TextLabels:
        """Looks up what the texts of a batch are.

        Args:
          batch: of records of these shards, as numpy arrays [B, T].

        Returns:
          Labels [B, N]; no row has more than N texts, which depends on T and the shortest text of the shards alone.
        """
        example_id, piece_id = (np.asarray(x) for x in batch.token_labels[:2])
        changes = (np.diff(example_id, prepend=PADDING) != 0) | (np.diff(piece_id, prepend=-1) != 0)
        starts = changes & (example_id != PADDING)
        row, column = np.nonzero(starts)
        number = np.cumsum(starts, 1)[row, column] - 1
        text = self._starts[batch.source[row, column]] + piece_id[row, column]
        shape = len(example_id), example_id.shape[1] // self._shortest
        labels = {}
        for name, column in self._columns.items():
            labels[name] = np.full(shape, getattr(MISSING_LABELS, name), column.dtype)
            labels[name][row, number] = column[text]
        return TextLabels(**labels)  # type: ignore[arg-type]  # numpy until it is placed


def _load_table(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: missing; are these records of contrastive training?")
    with np.load(path) as file:
        return dict(file)
