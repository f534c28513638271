"""Token rows for training: ArrayRecord shards shuffled, mixed, packed and batched by Grain, resumable to the row."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from brewjax.data.records.shards import FIELDS, SOURCES, Shards, read_counts, shard_folders
from brewjax.data.text.encode import NO_TARGET
from pallas_kernels.token_labels import TokenLabels


class TokenBatch(NamedTuple):
    """What a step takes: rows of packed examples.

    Attributes:
      positions: for RoPE; restart with every example, and with every question where its history ends.
      targets: the token that follows, `NO_TARGET` where there is no loss.
      weights: of each target's loss, 0 where there is none. A step's loss is sum(weight x loss) / sum(weight).
      preference: +l at the targets of the candidate that list l of its example prefers, -l at those of one that it
        rejects, 0 elsewhere. Lists are numbered from 1 within an example; a candidate is one segment.
      source: which record a token came from, a line of the shards' sources.jsonl, those of all folders one after the
        other; -1 for padding.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    token_labels: TokenLabels
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    preference: Int[Array, "B T"]
    source: Int[Array, "B T"]


def load_batches(
    shards: Shards, rows: int, seq_len: int, seed: int, process: int = 0, processes: int = 1
) -> grain.IterDataset:
    """An endless, checkpointable stream of TokenBatch of numpy arrays [rows, seq_len].

    Every record is read once an epoch by exactly one process; each epoch is shuffled anew. Several folders of shards
    are mixed record by record, each folder in its own epochs, so that their shares of all tokens are as asked.
    """
    folders = {shards: 1.0} if isinstance(shards, Path) else shards
    records, per_token, before = [], [], 0
    for number, (folder, share) in enumerate(folders.items()):
        counts = read_counts(folder)
        source = grain.sources.ArrayRecordDataSource(sorted(str(path) for path in folder.glob("part-*.array_record")))
        if len(source) < processes:
            raise ValueError(f"{folder}: {len(source)} examples are too few for {processes} processes")
        own = grain.MapDataset.source(source).seed(seed + number)[process::processes].shuffle().repeat()
        records.append(own.map(functools.partial(_parse, before=before)))
        per_token.append(share * counts["records"] / counts["tokens"])
        before += counts["records"]
    mixed = grain.MapDataset.mix(records, per_token) if len(records) > 1 else records[0]
    packed = grain.experimental.BestFitPackIterDataset(
        mixed.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)),
        length_struct={name: seq_len for name in FIELDS},
        num_packing_bins=max(16, rows),
        seed=seed,
        padding_struct={name: NO_TARGET if name in ("targets", "source") else 0 for name in FIELDS},
    )
    return packed.batch(rows, drop_remainder=True).map(_to_batch)


def _parse(record: bytes, before: int) -> dict[str, np.ndarray]:
    """`before`: how many records the folders before this one have."""
    arrays = dict(zip(FIELDS, np.frombuffer(record, np.int32).reshape(len(FIELDS), -1), strict=True))
    return arrays | {"weights": arrays["weights"].view(np.float32), "source": arrays["source"] + np.int32(before)}


def _to_batch(packed: dict[str, np.ndarray]) -> TokenBatch:
    token_labels = TokenLabels(packed["tokens_segment_ids"], packed["piece_id"], packed["visibility"])
    fields = {name: packed[name] for name in TokenBatch._fields if name != "token_labels"}
    return TokenBatch(token_labels=token_labels, **fields)  # type: ignore[arg-type]  # numpy until it is placed


def describe_sources(shards: Shards, batch: TokenBatch) -> list[str]:
    """The notes of every example in a batch, for an error message."""
    lines = [line for folder in shard_folders(shards) for line in (folder / SOURCES).read_text().splitlines()]
    return [lines[index] for index in np.unique(jax.device_get(batch.source)) if index >= 0]
