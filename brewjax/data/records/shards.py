"""TODO."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from brewjax.data.text.encode import NO_TARGET, EncodedPrompt, Text
from brewjax.paths import write_text

FIELDS = ("tokens", "positions", "piece_id", "visibility", "targets", "weights", "preference", "source")


SOURCES, COUNTS = "sources.jsonl", "counts.json"


Shards = Path | Mapping[Path, float]  # a folder of shards, or several with their shares of all tokens


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


def read_counts(folder: Path) -> dict[str, int]:
    """What `write_shards` counted; ValueError where it has not finished."""
    if not (folder / COUNTS).is_file():
        raise ValueError(f"{folder}: no training shards there, or not all of them; run the recipe again")
    counts: dict[str, int] = json.loads((folder / COUNTS).read_text())
    return counts


def shard_folders(shards: Shards) -> list[Path]:
    return [shards] if isinstance(shards, Path) else list(shards)
