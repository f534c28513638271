"""Training records on disk: folders of ArrayRecord shards, each record with its provenance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from brewjax.data.records.soft_labels import SoftLabelWriter
from brewjax.data.text.encode import NO_TARGET, EncodedPrompt, Text
from brewjax.paths import write_text

FIELDS = ("tokens", "positions", "piece_id", "visibility", "targets", "weights", "preference", "source")
SOURCES, COUNTS = "sources.jsonl", "counts.json"  # files of a folder: a line of provenance per record; totals

Shards = Path | Mapping[Path, float]  # a folder of shards, or several with their shares of all tokens


def write_shards(
    folder: Path, examples: Iterable[tuple[EncodedPrompt | Text, dict]], capacity: int, shards: int = 4
) -> dict[str, int]:
    """Writes examples with their provenance as records of at most `capacity` tokens.

    A longer example is split, a prompt between questions, so nothing is lost. The counts are written last: a folder
    with counts is complete.

    Args:
      folder: replaced if it exists.
      examples: encoded prompts or texts, each with its provenance.
      capacity: tokens of a record, the length of a packed row.
      shards: number of files.

    Returns:
      Counts of "records", "targets" and "tokens".

    Raises:
      ValueError: an example cannot be split to fit; names its provenance.
    """
    shutil.rmtree(folder, ignore_errors=True)  # a shard of an earlier call must not remain
    folder.mkdir(parents=True)
    paths = [folder / f"part-{index:03d}.array_record" for index in range(shards)]
    writers = [ArrayRecordWriter(str(path), "group_size:1") for path in paths]
    counts = {"records": 0, "targets": 0, "tokens": 0}
    soft_labels = SoftLabelWriter()
    with open(folder / SOURCES, "w") as sources:
        for example, provenance in examples:
            try:
                parts = example.split(capacity)
            except ValueError as error:
                origin = ", ".join(f"{name} {value}" for name, value in provenance.items())
                raise ValueError(f"{origin}: {error}") from None
            for encoded in parts:
                arrays = encoded.arrays
                arrays["source"] = np.full(len(encoded), counts["records"], np.int32)
                record = b"".join(arrays[name].tobytes() for name in FIELDS)
                writers[counts["records"] % shards].write(record)
                sources.write(json.dumps(provenance) + "\n")
                soft_labels.add(encoded, arrays["targets"])
                counts["records"] += 1
                counts["targets"] += int((arrays["targets"] != NO_TARGET).sum())
                counts["tokens"] += len(encoded)
    for writer in writers:
        writer.close()
    soft_labels.write(folder)
    write_text(folder / COUNTS, json.dumps(counts))
    return counts


def read_counts(folder: Path) -> dict[str, int]:
    """The counts that `write_shards` returned.

    Raises:
      ValueError: the folder is missing or incomplete.
    """
    if not (folder / COUNTS).is_file():
        raise ValueError(f"{folder}: no training shards there, or not all of them; run the recipe again")
    counts: dict[str, int] = json.loads((folder / COUNTS).read_text())
    return counts


def shard_folders(shards: Shards) -> list[Path]:
    """The folders of `shards`, in order."""
    return [shards] if isinstance(shards, Path) else list(shards)
