"""What an index keeps on disk: a snapshot, and the changes since, each on disk before it is acknowledged.

A folder holds `snapshot-N` and segments `changes-M.arrows` with M >= N, in the order in which they are applied. Every
start opens a new segment, so nothing is ever appended behind a write that a crash cut short. Segment N begins before
snapshot N is written, and is applied to it. A snapshot is complete when its folder is renamed; only then are the
segments before it removed.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from brewjax.paths import atomic_folder

SNAPSHOT, SEGMENT = "snapshot-", "changes-"


class Change(NamedTuple):
    """Rows that are put into an index, or taken out of it (`vectors` is None).

    Attributes:
      ids: int64 or text, as the index has them.
      vectors: float32 [n, D].
      attributes: int32 [n].
    """

    ids: pa.Array
    vectors: np.ndarray | None
    attributes: np.ndarray | None


class ChangeLog:
    """The changes of an index in a folder, and its snapshots.

    Args:
      dimensions: D of the vectors.
      id_type: of the ids.
    """

    def __init__(self, folder: Path, dimensions: int, id_type: pa.DataType):
        self._folder, self._dimensions = folder, dimensions
        vector = pa.list_(pa.float32(), dimensions)
        self._schema = pa.schema({"id": id_type, "vector": vector, "attributes": pa.int32()})
        self._number = max((_number(path) for path in _numbered(folder)), default=-1) + 1
        self._open()

    def replay(self) -> Iterator[Change]:
        """The snapshot, then the changes since, in order. Ends a segment at a change that a crash cut short."""
        snapshots = sorted(self._folder.glob(f"{SNAPSHOT}*"), key=_number)
        start = 0
        if snapshots:
            start = _number(snapshots[-1])
            for batch in pq.ParquetFile(snapshots[-1] / "rows.parquet").iter_batches(1 << 16):
                yield self._change(batch)
        for path in sorted(self._folder.glob(f"{SEGMENT}*"), key=_number):
            if start <= _number(path) < self._number:
                yield from self._read(path)

    def append(self, change: Change) -> None:
        """Writes a change; when this returns it is on disk."""
        batch = self.batch(change)
        self._writer.write_batch(batch, custom_metadata={"crc": str(_checksum(batch))})
        self._file.flush()
        os.fsync(self._file.fileno())

    def begin_segment(self) -> int:
        """Ends the segment, and writes what follows to another one.

        Returns:
          The number of the new segment.
        """
        self.close()
        self._number += 1
        self._open()
        return self._number

    def write_snapshot(self, segment: int, rows: Iterable[Change]) -> None:
        """Replaces all that was written before a segment. Changes may be appended meanwhile.

        Args:
          segment: number of the segment that goes on from the snapshot.
          rows: all of the index, each as it was at any time since the segment began: it is replayed on top of them.
        """
        with (
            atomic_folder(self._folder / f"{SNAPSHOT}{segment:08d}") as building,
            pq.ParquetWriter(building / "rows.parquet", self._schema) as writer,
        ):
            for change in rows:
                writer.write_batch(self.batch(change))
        for path in _numbered(self._folder):
            if _number(path) < segment:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Ends the segment; again does nothing."""
        if not self._file.closed:
            self._writer.close()
            self._file.close()

    def _open(self) -> None:
        self._file = open(self._folder / f"{SEGMENT}{self._number:08d}.arrows", "wb")  # noqa: SIM115 (see close)
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def batch(self, change: Change) -> pa.RecordBatch:
        """A change as columns id, vector and attributes."""
        n = len(change.ids)
        if change.vectors is None:
            vectors = pa.nulls(n, self._schema.field("vector").type)
            return pa.record_batch([change.ids, vectors, pa.nulls(n, pa.int32())], schema=self._schema)
        values = pa.array(np.ascontiguousarray(change.vectors, np.float32).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(values, self._dimensions)
        return pa.record_batch([change.ids, vectors, pa.array(change.attributes, pa.int32())], schema=self._schema)

    def _change(self, batch: pa.RecordBatch) -> Change:
        if batch.num_rows and batch["vector"].null_count == batch.num_rows:
            return Change(batch["id"], None, None)
        vectors = batch["vector"].flatten().to_numpy().reshape(-1, self._dimensions)
        return Change(batch["id"], vectors, batch["attributes"].to_numpy())

    def _read(self, path: Path) -> Iterator[Change]:
        with path.open("rb") as file:
            try:
                reader = pa.ipc.open_stream(file)
            except pa.ArrowInvalid:  # not even its schema was written
                return
            while True:
                try:
                    batch, metadata = reader.read_next_batch_with_custom_metadata()
                except (StopIteration, pa.ArrowInvalid, OSError):
                    return
                if metadata is None or int(metadata["crc"]) != _checksum(batch):
                    return
                yield self._change(batch)


def _numbered(folder: Path) -> list[Path]:
    return [*folder.glob(f"{SNAPSHOT}*"), *folder.glob(f"{SEGMENT}*")]


def _number(path: Path) -> int:
    return int(path.name.removesuffix(".arrows").rpartition("-")[2])


def _checksum(batch: pa.RecordBatch) -> int:
    """CRC-32 of a batch's values, not of padding between them."""
    checksum = zlib.crc32(repr(batch["id"].to_pylist()).encode())
    if batch["vector"].null_count < batch.num_rows:
        for values in (batch["vector"].flatten(), batch["attributes"]):
            checksum = zlib.crc32(np.ascontiguousarray(values.to_numpy()).data, checksum)
    return checksum
