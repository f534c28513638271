"""Batches of packed token rows for training: Grain shuffles, mixes, packs and batches ArrayRecord shards.

The position in the data can be saved and restored to the row.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from brewjax.data.records.shards import FIELDS, RECORDS, Shards, provenance_lines, read_counts, shard_files
from brewjax.data.text.encode import NO_TARGET
from pallas_kernels.token_labels import TokenLabels


class TokenBatch(NamedTuple):
    """The data of a training step: rows of packed examples. B is rows, T is tokens.

    Attributes:
      tokens: ids.
      positions: for RoPE; they restart with every example, and for every question where its history ends.
      token_labels: which tokens attend to which.
      targets: the token that follows, `NO_TARGET` where there is no loss.
      weights: loss weight of each target, 0 where there is none. A step's loss is sum(weight * loss) / sum(weight).
      preference: +l at the targets of the chosen candidate of list l of its example, -l at those of a rejected one, 0
        elsewhere. Lists are numbered from 1 within an example; a candidate is one piece.
      source: index of the record that a token came from, through all folders in their order; -1 for padding.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    token_labels: TokenLabels
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    preference: Int[Array, "B T"]
    source: Int[Array, "B T"]


def load_batches(
    shards: Shards, batch_size: int, seq_len: int, seed: int, process: int = 0, processes: int = 1
) -> grain.IterDataset:
    """An endless, checkpointable stream of batches.

    Every record is read once per epoch by exactly one process, and each epoch is shuffled anew. Several folders of
    shards are mixed record by record, each in its own epochs, so that they have the given shares of all tokens.

    Args:
      shards: a folder, or folders with their shares of all tokens.
      batch_size: rows of a batch.
      seq_len: tokens of a row.
      seed: of the order.
      process: which of the `processes` readers this is; each reads a disjoint part of the records.
      processes: number of readers.

    Returns:
      A Grain dataset of `TokenBatch` with numpy arrays [batch_size, seq_len].

    Raises:
      ValueError: a folder is incomplete, or has fewer records than there are processes.
    """
    folders = {shards: 1.0} if isinstance(shards, Path) else shards
    datasets, record_weights, first_record = [], [], 0
    for folder_index, (folder, share) in enumerate(folders.items()):
        counts = read_counts(folder)
        source = grain.sources.ArrayRecordDataSource([str(path) for path in shard_files(folder, RECORDS)])
        if len(source) < processes:
            raise ValueError(f"{folder}: {len(source)} examples are too few for {processes} processes")
        parse = functools.partial(_parse_record, first_record, len(source))
        numbered = grain.MapDataset.source(source).map_with_index(parse)
        datasets.append(numbered.seed(seed + folder_index)[process::processes].shuffle().repeat())
        record_weights.append(share * counts["records"] / counts["tokens"])
        first_record += counts["records"]
    mixed = grain.MapDataset.mix(datasets, record_weights) if len(datasets) > 1 else datasets[0]
    packed = grain.experimental.BestFitPackIterDataset(
        mixed.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)),
        length_struct={name: seq_len for name in (*FIELDS, "source")},
        num_packing_bins=max(16, batch_size),
        seed=seed,
        padding_struct={name: NO_TARGET if name in ("targets", "source") else 0 for name in (*FIELDS, "source")},
    )
    return packed.batch(batch_size, drop_remainder=True).map(_to_batch)


def _parse_record(first_record: int, count: int, index: int, record: bytes) -> dict[str, np.ndarray]:
    """The arrays of record `index` of a folder of `count` records; indices go on through the epochs. All folders before
    it have `first_record` records."""
    arrays = dict(zip(FIELDS, np.frombuffer(record, np.int32).reshape(len(FIELDS), -1), strict=True))
    source = np.full(len(arrays["tokens"]), first_record + index % count, np.int32)
    return arrays | {"weights": arrays["weights"].view(np.float32), "source": source}


def _to_batch(packed: dict[str, np.ndarray]) -> TokenBatch:
    token_labels = TokenLabels(packed["tokens_segment_ids"], packed["piece_id"], packed["visibility"])
    fields = {name: packed[name] for name in TokenBatch._fields if name != "token_labels"}
    return TokenBatch(token_labels=token_labels, **fields)  # type: ignore[arg-type]  # numpy until it is placed


def describe_sources(shards: Shards, batch: TokenBatch) -> list[str]:
    """Says which examples are in a batch, for an error message.

    Args:
      shards: that the batch was loaded from.
      batch: of packed records.

    Returns:
      The provenance of each record in the batch, as JSON, by ascending number.
    """
    records = np.unique(jax.device_get(batch.source))
    return list(provenance_lines(shards, records[records >= 0].tolist()))
