"""Vectors for the fact `similarity`: of members and items over time, by encoders that had not learnt what came next.

The time axis is cut where the encoders' training ended. What is asked in a period is stated by the encoder that was
trained on what is before it, so that no similarity knows the answer of the question that states it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from brewjax.config import ConfigError
from brewjax.console import track
from brewjax.data.tables.card import Card
from brewjax.data.tables.dataset import FOREVER, Dataset
from brewjax.data.tables.neighbors import PERIODS
from brewjax.data.tables.union import included_folders
from brewjax.data.tables.vectors import ITEM, MEMBER, SCHEMA, VECTORS
from brewjax.data.tasks.examples import build_examples, example_at
from brewjax.paths import write_table
from brewjax.retrieve.encoder import Encoder


def write_vectors(dataset: Dataset, encoders: Mapping[str, Encoder]) -> int:
    """Writes the file `VECTORS` into the dataset's folder.

    It has a vector of each member as of each question of the encoder's task, and of each item as of the beginning of
    each of `PERIODS` of equally many events; and of all of both as of the last event, to serve. Each is by the encoder
    with the latest end of training that is not after it; before the first end there are none.

    Args:
      dataset: the tables.
      encoders: by version, each trained on these tables until another time.

    Returns:
      How many vectors there are.

    Raises:
      ConfigError: an encoder does not say until when it was trained, or its card describes other tables; or the dataset
        is a union, which reads the vectors of the datasets that it includes.
    """
    if included := included_folders(dataset.path):
        folders = " or ".join(map(str, included.values()))
        raise ConfigError(f"{dataset.path}: a union has no vectors of its own; give {folders}")
    dataset = dataclasses.replace(dataset, card=_without_similarities(dataset.card))
    by_end = sorted((_end_of_training(encoder, version, dataset), version) for version, encoder in encoders.items())
    now = dataset.last_event_time + 1
    grid = np.quantile(dataset.event_time, np.arange(PERIODS) / PERIODS).astype(np.int64)
    tables = []
    for (begin, version), (end, _) in zip(track(by_end, "encoders"), [*by_end[1:], (FOREVER, "")], strict=True):
        encoder = encoders[version]
        moments = np.unique([begin, *grid[(grid >= begin) & (grid < end)], *([now] if now < end else [])])
        examples = [
            example
            for split in ("train", "validation", "test")
            for example in build_examples(dataset, encoder.task, split)
            if begin <= example.cutoff_time < end
        ]
        if now < end:
            examples += [example_at(dataset, encoder.task, member, now) for member in range(len(dataset.members))]
        members = np.array([example.member for example in examples], np.int64)
        times = np.array([example.cutoff_time for example in examples], np.int64)
        tables.append(_table(dataset, MEMBER, members, times, version, encoder.embed_members(dataset, examples)))
        every = np.flatnonzero(dataset.items_of(encoder.task.questions.actions[0]))
        for moment in moments.tolist():
            vectors = encoder.embed_items(dataset, every, moment)
            tables.append(_table(dataset, ITEM, every, np.full(len(every), moment), version, vectors))
    table = pa.concat_tables(tables)
    write_table(dataset.path / VECTORS, table)
    return len(table)


def _end_of_training(encoder: Encoder, version: str, dataset: Dataset) -> int:
    """Microseconds since 1970, before which everything is that the encoder was trained on."""
    if key := _without_similarities(encoder.surface.card).differing_part(dataset.card):
        raise ConfigError(f"{version}: the encoder was trained on tables with other '{key}' in their card")
    training = encoder.bundle.training
    ends = [data.until for data in training.data if data.dataset == dataset.card.name] if training else []
    if not ends:
        raise ConfigError(f"{version}: does not say until when it was trained on '{dataset.card.name}'")
    return max(ends)


def _without_similarities(card: Card) -> Card:
    """The card without facts that the vectors themselves would be needed for; no text of a side states them."""
    pairs = tuple(fact for fact in card.facts.pairs if not fact.similarity)
    return card.model_copy(update={"facts": card.facts.model_copy(update={"pairs": pairs})})


def _table(
    dataset: Dataset, side: str, rows: np.ndarray, times: np.ndarray, version: str, vectors: np.ndarray
) -> pa.Table:
    table, part = (dataset.members, dataset.card.members) if side == MEMBER else (dataset.items, dataset.card.items)
    columns = {
        "side": pa.array([side] * len(rows)),
        "id": table[part.id].take(pa.array(rows)).cast(pa.string()),
        "time": pa.array(times, pa.timestamp("us")),
        "encoder": pa.array([version] * len(rows)),
    }
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return pa.table({**{name: column.cast(SCHEMA[name]) for name, column in columns.items()}, "vector": lists})
