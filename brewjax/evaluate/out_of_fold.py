"""Probabilities of another ranker for training examples, which a model learns from besides the answers.

They must be out of fold: a ranker that was trained on an answer is certain of it, and teaches nothing but the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import UnreadableError, open_table, plain
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.evaluate.baselines import LightGBM
from brewjax.evaluate.features import CandidateRows, build_features

LIGHTGBM = "LightGBM"
FOLDS = 3
HELD_OUT = 8  # one of so many examples of a training fold stops the training


def predict_out_of_fold(
    dataset: Dataset, task: Task, examples: Sequence[RankingExample], folds: int = FOLDS
) -> list[np.ndarray]:
    """LightGBM's probabilities, each from trees that were trained on the examples of other members.

    Returns:
      For each example float32 [candidates, labels].

    Raises:
      ValueError: a fold has no question to train on.
    """
    sizes = [len(example.candidates) for example in examples]
    example = np.repeat(np.arange(len(examples)), sizes)  # of each question
    fold = (dataset.member_hash[[e.member for e in examples]] % np.uint64(folds)).astype(int)[example]
    features, label = build_features(dataset, task, examples), CandidateRows.from_examples(examples).label
    predicted = np.empty((len(label), len(task.words)), np.float32)
    for held_out in range(folds):
        stops = (fold != held_out) & (example % HELD_OUT == 0)
        train = (fold != held_out) & ~stops
        if not train.any() or not stops.any():
            raise ValueError(f"task {task.name}: too few members to predict any of them by trees of the others")
        training, stopping = (
            (dataclasses.replace(features, values=features.values[rows]), label[rows]) for rows in (train, stops)
        )
        trees = LightGBM.fit_features(task, training, stopping, settings=1)
        rows = fold == held_out
        if rows.any():
            predicted[rows] = trees.predict_features(task, features.values[rows])
    return np.split(predicted, np.cumsum(sizes)[:-1])


class OutOfFoldTable:
    """LightGBM's probabilities for the training examples of a task, in a file.

    Args:
      path: as `save` wrote it.
    """

    def __init__(self, path: Path):
        with np.load(path) as file:
            rows = np.split(file["probabilities"], file["offsets"][1:-1])
            self._by_seed = dict(zip(file["seeds"].tolist(), rows, strict=True))

    @staticmethod
    def save(path: Path, dataset: Dataset, task: Task, samples: Sequence[Sequence[RankingExample]]) -> None:
        """Predicts the examples of each sample by trees of that sample alone, and writes all probabilities.

        Args:
          path: of the .npz file.
          dataset: the tables.
          task: whose labels are predicted.
          samples: of training examples, which `look_up` tells apart by their seeds.

        Raises:
          ValueError: a sample has too few members.
        """
        predicted = [rows for examples in samples for rows in predict_out_of_fold(dataset, task, examples)]
        temporary = path.with_suffix(".tmp.npz")
        np.savez(
            temporary,
            seeds=np.array([example.seed for examples in samples for example in examples], np.uint64),
            offsets=np.cumsum([0, *map(len, predicted)]),
            probabilities=np.concatenate(predicted),
        )
        temporary.replace(path)

    def look_up(self, examples: Sequence[RankingExample]) -> list[np.ndarray]:
        """float32 [candidates, labels] each: the probabilities of each of `examples`, which must be of the samples."""
        return [self._by_seed[example.seed] for example in examples]


class PredictionTable:
    """Another ranker's probabilities in a Parquet file: a row for each member, item and time.

    Args:
      path: columns with the ids and the time of the event under their names in the card, and one for each label word.

    Raises:
      ConfigError: the file is unreadable, or a column is missing.
    """

    def __init__(self, dataset: Dataset, task: Task, path: Path):
        card = dataset.card
        try:
            table, _ = open_table(path.parent, path.name)
        except UnreadableError as error:
            raise ConfigError(f"soft_labels: {error}") from None
        ids = [card.events.member, card.events.item, *([card.events.time] if card.events.time else [])]
        if missing := [column for column in (*ids, *task.words) if column not in table.column_names]:
            raise ConfigError(f"{path}: no column {', '.join(missing)}; there are: {', '.join(table.column_names)}")
        member_ids, item_ids = dataset.members[card.members.id], dataset.items[card.items.id]
        member = pc.index_in(plain(table[card.events.member]), value_set=member_ids.combine_chunks())
        item = pc.index_in(plain(table[card.events.item]), value_set=item_ids.combine_chunks())
        known = pc.and_(member.is_valid(), item.is_valid())
        member, item = (pc.fill_null(column, 0).to_numpy().astype(np.int64) for column in (member, item))
        time = np.zeros(len(table), np.int64)
        if card.events.time:
            time = plain(table[card.events.time]).cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
        self._dataset, self._task = dataset, task
        self._timed = card.events.time is not None
        self._probabilities = np.stack([table[word].cast(pa.float64()).to_numpy() for word in task.words], axis=1)
        keys = zip(member.tolist(), item.tolist(), time.tolist(), strict=True)
        self._rows = {
            key: row for row, (key, is_known) in enumerate(zip(keys, known.to_pylist(), strict=True)) if is_known
        }

    def look_up(self, examples: Sequence[RankingExample]) -> list[np.ndarray]:
        """float32 [candidates, labels] each: the probabilities of `examples`; where the table has no row, the answer
        is certain."""
        results = []
        for example in examples:
            soft = np.eye(len(self._task.words), dtype=np.float32)[example.labels]
            for index, (item, exposure) in enumerate(zip(example.candidates, example.exposures, strict=True)):
                time = int(self._dataset.event_time[exposure]) if self._timed else 0
                row = self._rows.get((example.member, int(item), time))
                if row is not None:
                    soft[index] = self._probabilities[row] / self._probabilities[row].sum()
            results.append(soft)
        return results
