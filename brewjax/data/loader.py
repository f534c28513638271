"""Token rows for training: ArrayRecord shards shuffled, mixed, packed and batched by Grain, resumable to the row."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
import pydantic
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Array, Float, Int

from brewjax.config import Config
from brewjax.data.tokens import NO_TARGET, EncodedPrompt, Text
from brewjax.paths import write_text
from pallas_kernels.token_labels import TokenLabels

FIELDS = ("tokens", "positions", "piece_id", "visibility", "targets", "weights", "preference", "source")
SOURCES, COUNTS = "sources.jsonl", "counts.json"
Shards = Path | Mapping[Path, float]  # a folder of shards, or several with their shares of all tokens


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


def write_shards(
    folder: Path, examples: Iterable[tuple[EncodedPrompt | Text, dict]], capacity: int, shards: int = 4
) -> dict[str, int]:
    """Writes examples, each with a note on where it came from, as ArrayRecord shards of at most `capacity` tokens each.

    What is longer is split, prompts by questions, so nothing is lost. Returns counts of records, targets and tokens,
    which it leaves in the folder too, last: a folder with counts is complete.
    """
    shutil.rmtree(folder, ignore_errors=True)  # no shard of an earlier writing may stay
    folder.mkdir(parents=True)
    writers = [ArrayRecordWriter(str(folder / f"part-{n:03d}.array_record"), "group_size:1") for n in range(shards)]
    counts = {"records": 0, "targets": 0, "tokens": 0}
    with open(folder / SOURCES, "w") as sources:
        for whole, note in examples:
            try:
                parts = whole.split(capacity)
            except ValueError as error:
                raise ValueError(f"{', '.join(f'{name} {value}' for name, value in note.items())}: {error}") from None
            for encoded in parts:
                arrays = encoded.arrays
                arrays["source"] = np.full(len(encoded), counts["records"], np.int32)
                record = b"".join(arrays[name].tobytes() for name in FIELDS)
                writers[counts["records"] % shards].write(record)
                sources.write(json.dumps(note) + "\n")
                counts["records"] += 1
                counts["targets"] += int((arrays["targets"] != NO_TARGET).sum())
                counts["tokens"] += len(encoded)
    for writer in writers:
        writer.close()
    write_text(folder / COUNTS, json.dumps(counts))
    return counts


class MixConfig(Config):
    """How sources of training data (tasks, texts) share a run's tokens: p_i ~ weight_i n_i^(1 / temperature).

    Attributes:
      temperature: 1 leaves each source its share, n_i tokens of all; a higher one evens them out (T5, arXiv
        1910.10683, section 3.5.2, where n_i are examples).
      weights: by a source's name; 1 for one that is not named, 0 leaves it out.
    """

    temperature: float = pydantic.Field(default=1.0, gt=0)
    weights: dict[str, pydantic.NonNegativeFloat] = {}

    def check_names(self, names: Iterable[str]) -> None:
        """ConfigError for a weight of a source that is not among `names`, and where all of these have weight 0."""
        for name in self.weights:
            if name not in names:
                raise self.error(f"no source '{name}'; sources: {', '.join(names)}", "weights", name)
        if not any(self.weights.get(name, 1.0) for name in names):
            raise self.error("every source has weight 0", "weights")

    def shares(self, folders: Mapping[str, Path]) -> dict[Path, float]:
        """The share of each named folder of shards, 1 in all. ConfigError for a weight of a name that is not there."""
        self.check_names(folders)
        sizes = {folder: read_counts(folder)["tokens"] ** (1 / self.temperature) for folder in folders.values()}
        weighed = {folder: self.weights.get(name, 1.0) * sizes[folder] for name, folder in folders.items()}
        return {folder: weight / sum(weighed.values()) for folder, weight in weighed.items() if weight}


def read_counts(folder: Path) -> dict[str, int]:
    """What `write_shards` counted; ValueError where it has not finished."""
    if not (folder / COUNTS).is_file():
        raise ValueError(f"{folder}: no training shards there, or not all of them; run the recipe again")
    counts: dict[str, int] = json.loads((folder / COUNTS).read_text())
    return counts


def shard_folders(shards: Shards) -> list[Path]:
    return [shards] if isinstance(shards, Path) else list(shards)


def load_batches(
    shards: Shards, rows: int, row_tokens: int, seed: int, process: int = 0, processes: int = 1
) -> grain.IterDataset:
    """An endless, checkpointable stream of TokenBatch of numpy arrays [rows, row_tokens].

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
        length_struct={name: row_tokens for name in FIELDS},
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
