"""Token rows for training: ArrayRecord shards in, shuffled, packed and batched by Grain, resumable to the row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Array, Float, Int

from brewjax.data.tokens import NO_TARGET, EncodedPrompt
from pallas_kernels.segments import Segments

FIELDS = ("tokens", "positions", "segment", "reach", "targets", "weights", "preference", "source")
SOURCES = "sources.jsonl"


class TokenBatch(NamedTuple):
    """What a step takes: rows of packed examples.

    Attributes:
      positions: for RoPE; restart with every example, and with every question where its history ends.
      targets: the token that follows, `NO_TARGET` where there is no loss.
      weights: of each target's loss, 0 where there is none. A step's loss is sum(weight x loss) / sum(weight).
      preference: +l at the targets of the candidate that list l of its example prefers, -l at those of one that it
        rejects, 0 elsewhere. Lists are numbered from 1 within an example; a candidate is one segment.
      source: which record a token came from, a line of the shards' sources.jsonl; -1 for padding.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Segments
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    preference: Int[Array, "B T"]
    source: Int[Array, "B T"]


def write_shards(folder: Path, examples: Iterable[tuple[EncodedPrompt, dict]], capacity: int, shards: int = 4) -> dict:
    """Writes examples, each with a note on where it came from, as ArrayRecord shards of at most `capacity` tokens each.

    Prompts that are longer are split by questions, so nothing is lost. Returns counts of records, questions, tokens.
    """
    shutil.rmtree(folder, ignore_errors=True)  # no shard of an earlier writing may stay
    folder.mkdir(parents=True)
    writers = [ArrayRecordWriter(str(folder / f"part-{n:03d}.array_record"), "group_size:1") for n in range(shards)]
    counts = {"records": 0, "questions": 0, "tokens": 0}
    with open(folder / SOURCES, "w") as sources:
        for whole, note in examples:
            for encoded in whole.split(capacity):
                arrays = encoded.arrays
                arrays["source"] = np.full(len(encoded), counts["records"], np.int32)
                record = b"".join(arrays[name].tobytes() for name in FIELDS)
                writers[counts["records"] % shards].write(record)
                sources.write(json.dumps(note) + "\n")
                counts["records"] += 1
                counts["questions"] += len(encoded.questions)
                counts["tokens"] += len(encoded)
    for writer in writers:
        writer.close()
    return counts


def load_batches(
    folder: Path, rows: int, row_tokens: int, seed: int, process: int = 0, processes: int = 1
) -> grain.IterDataset:
    """An endless, checkpointable stream of TokenBatch of numpy arrays [rows, row_tokens].

    Every record is read once an epoch by exactly one process; each epoch is shuffled anew.
    """
    paths = sorted(str(path) for path in folder.glob("part-*.array_record"))
    if not paths:
        raise ValueError(f"{folder}: no training shards there; run `brewjax prepare` first")
    source = grain.sources.ArrayRecordDataSource(paths)
    if len(source) < processes:
        raise ValueError(f"{folder}: {len(source)} examples are too few for {processes} processes")
    records = grain.MapDataset.source(source).seed(seed)[process::processes].shuffle().repeat().map(_parse)
    packed = grain.experimental.BestFitPackIterDataset(
        records.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)),
        length_struct={name: row_tokens for name in FIELDS},
        num_packing_bins=max(16, rows),
        seed=seed,
        padding_struct={name: NO_TARGET if name in ("targets", "source") else 0 for name in FIELDS},
    )
    return packed.batch(rows, drop_remainder=True).map(_to_batch)


def _parse(record: bytes) -> dict[str, np.ndarray]:
    arrays = dict(zip(FIELDS, np.frombuffer(record, np.int32).reshape(len(FIELDS), -1), strict=True))
    return arrays | {"weights": arrays["weights"].view(np.float32)}


def _to_batch(packed: dict[str, np.ndarray]) -> TokenBatch:
    segments = Segments(packed["tokens_segment_ids"], packed["segment"], packed["reach"])
    fields = {name: packed[name] for name in TokenBatch._fields if name != "segments"}
    return TokenBatch(segments=segments, **fields)  # type: ignore[arg-type]  # numpy until it is placed


def describe_sources(folder: Path, batch: TokenBatch) -> list[str]:
    """The notes of every example in a batch, for an error message."""
    lines = (folder / SOURCES).read_text().splitlines()
    return [lines[index] for index in np.unique(jax.device_get(batch.source)) if index >= 0]
