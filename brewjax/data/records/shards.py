"""Training records on disk: folders of ArrayRecord shards, each record with its provenance.

A shard is what one partition of the data gives: three or four files with the partition's name, which are written once
and whole, the counts last. So a shard with counts is complete, and what was killed goes on with the shards that are
missing. A folder with counts is complete too, and its records are numbered through its shards, in their order.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from brewjax.data.records.provenance import Provenance
from brewjax.data.records.soft_labels import SoftLabelWriter
from brewjax.data.tables.partition import WHOLE, Partition
from brewjax.data.text.encode import NO_TARGET
from brewjax.paths import write_text

FIELDS = ("tokens", "positions", "piece_id", "visibility", "targets", "weights", "preference")
RECORDS, SOURCES, TABLE, COUNTS = ".array_record", ".jsonl", ".npz", ".counts.json"  # endings of a shard's files
FOLDER_COUNTS = "counts.json"

Shards = Path | Mapping[Path, float]  # a folder of shards, or several with their shares of all tokens


class Record(Protocol):
    """What a record is made of: an `EncodedPrompt`, a `Text` or a `ContrastiveExample`."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The fields of `TokenBatch` by name, each [T], of 32 bits."""

    def __len__(self) -> int:
        """The number of tokens T."""

    def split(self, capacity: int) -> list[Any]:
        """Divides a record that is longer than a row.

        Args:
          capacity: tokens of a row.

        Returns:
          Records of at most `capacity` tokens.

        Raises:
          ValueError: it cannot be divided so far.
        """


class TableWriter(Protocol):
    """Collects what a shard keeps beside its records."""

    def add(self, record: Any) -> None:
        """Adds what is kept of a `record`; records are added in their order."""

    def write(self, path: Path) -> None:
        """Writes the table to `path`, if there is anything to keep."""

    def counts(self) -> dict[str, int]:
        """Counts what the table keeps.

        Returns:
          Counts of its own by name, for those of the shard; empty if it has none.
        """


def is_written(folder: Path, partition: Partition) -> bool:
    """Whether the partition's shard in `folder` is complete."""
    return (folder / f"{partition.name}{COUNTS}").is_file()


def write_shard(
    folder: Path,
    partition: Partition,
    examples: Iterable[tuple[Record, Provenance]],
    capacity: int,
    table: TableWriter | None = None,
) -> None:
    """Writes a partition's examples as records of at most `capacity` tokens.

    A longer example is split, a prompt between questions, so nothing is lost. The files are written to the local disk
    and then copied, because ArrayRecord cannot write to a mounted bucket of objects.

    Args:
      folder: made if need be.
      examples: with their provenance.
      capacity: tokens of a record, the length of a packed row.
      table: what the shard keeps beside its records; soft labels by default.

    Raises:
      ValueError: an example cannot be split to fit; names its provenance.
    """
    table = SoftLabelWriter() if table is None else table
    counts = {"records": 0, "targets": 0, "tokens": 0}
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / partition.name
        writer = ArrayRecordWriter(f"{local}{RECORDS}", "group_size:1")
        with open(f"{local}{SOURCES}", "w", encoding="utf-8") as sources:
            for example, provenance in examples:
                for record in _split(example, capacity, provenance):
                    arrays = record.arrays
                    writer.write(b"".join(arrays[name].tobytes() for name in FIELDS))
                    sources.write(json.dumps(provenance) + "\n")
                    table.add(record)
                    counts["records"] += 1
                    counts["targets"] += int((arrays["targets"] != NO_TARGET).sum())
                    counts["tokens"] += len(record)
        writer.close()
        table.write(Path(f"{local}{TABLE}"))
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(scratch).iterdir()):
            temporary = folder / f".{file.name}.{os.getpid()}.tmp"
            shutil.copyfile(file, temporary)
            temporary.replace(folder / file.name)
    write_text(folder / f"{partition.name}{COUNTS}", json.dumps(counts | table.counts()))


def _split(example: Record, capacity: int, provenance: Provenance) -> list[Record]:
    try:
        return example.split(capacity)
    except ValueError as error:
        origin = ", ".join(f"{name} {value}" for name, value in provenance.items())
        raise ValueError(f"{origin}: {error}") from None


def finish_shards(folder: Path, count: int) -> dict[str, int]:
    """Sums up a folder whose shards are all complete, and marks it as such.

    Args:
      folder: with the shards of the partitions 0 to `count` - 1.
      count: how many shards there are.

    Returns:
      The counts of the folder, which are written too: "shards", "records", "targets", "tokens", and those of its
      tables.
    """
    total = {"shards": count}
    for index in range(count):
        for name, value in _read_json(folder / f"{Partition(index, count).name}{COUNTS}").items():
            total[name] = total.get(name, 0) + value
    for leftover in folder.glob(".*.tmp"):  # of a worker that was killed
        leftover.unlink(missing_ok=True)
    write_text(folder / FOLDER_COUNTS, json.dumps(total))
    return total


def write_shards(
    folder: Path, examples: Iterable[tuple[Record, Provenance]], capacity: int, table: TableWriter | None = None
) -> dict[str, int]:
    """Writes all records as one shard; see `write_shard` and `finish_shards`.

    Args:
      folder: that gets the files.
      examples: records, each with where it came from.
      capacity: tokens of a packed row; a longer record is split.
      table: gets each record too, for instance an `ItemTableWriter`.

    Returns:
      The counts of the folder: "shards", "records", "targets", "tokens", and those of the table.
    """
    write_shard(folder, WHOLE, examples, capacity, table)
    return finish_shards(folder, 1)


def read_counts(folder: Path) -> dict[str, int]:
    """Reads the counts that `finish_shards` wrote.

    Args:
      folder: of shards.

    Returns:
      What `finish_shards` returned.

    Raises:
      ValueError: the folder is missing or incomplete.
    """
    if not (folder / FOLDER_COUNTS).is_file():
        raise ValueError(f"{folder}: no training shards there, or not all of them; run the recipe again")
    return _read_json(folder / FOLDER_COUNTS)


def _read_json(path: Path) -> dict[str, int]:
    return json.loads(path.read_text())


def shard_folders(shards: Shards) -> list[Path]:
    """The folders of `shards`, in order."""
    return [shards] if isinstance(shards, Path) else list(shards)


def shard_files(folder: Path, ending: str) -> list[Path]:
    """The files of a complete folder that have an ending, in order of the shards.

    Args:
      folder: of shards.
      ending: RECORDS, SOURCES, TABLE or COUNTS.

    Returns:
      A path for each shard; a TABLE need not be there.

    Raises:
      ValueError: the folder is missing or incomplete.
    """
    count = read_counts(folder)["shards"]
    return [folder / f"{Partition(index, count).name}{ending}" for index in range(count)]


def provenance_lines(shards: Shards, records: Iterable[int]) -> Iterator[str]:
    """Yields the provenance of some records as JSON, by their numbers through all folders, ascending. Reads no shard
    that has none of them."""
    numbers, first = iter(records), 0
    record = next(numbers, None)
    for folder in shard_folders(shards):
        for path in shard_files(folder, COUNTS):
            count = _read_json(path)["records"]
            if record is not None and record < first + count:
                lines = path.with_name(path.name.removesuffix(COUNTS) + SOURCES).read_text("utf-8").split("\n")
                while record is not None and record < first + count:
                    yield lines[record - first]
                    record = next(numbers, None)
            first += count
