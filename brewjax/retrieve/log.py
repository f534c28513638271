"""What an index keeps on disk: a snapshot, and the changes since, each on disk before it is acknowledged.

A folder holds `snapshot-N` and segments `changes-M.log` with M >= N, in the order in which they are applied. Segment N
begins before snapshot N is written, and is applied to it. A snapshot is complete when its folder is renamed; only then
are the segments before it removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from brewjax.paths import atomic_folder

SNAPSHOT, SEGMENT = "snapshot-", "changes-"
HEADER = struct.Struct("<QI")  # bytes of a record, and their CRC-32


class DamagedError(ValueError):
    """A record that is not what was written, with others behind it."""


class Segment:
    """A file of records, each on disk before `append` returns, that is read from any position while it grows.

    Opening it cuts off what a crash cut short at its end, and was not acknowledged. Thread-safe; one process at a time.

    Args:
      path: of the file; made if there is none.

    Raises:
      BlockingIOError: it is open elsewhere.
      DamagedError: a record that is not the last is damaged.
    """

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (see close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = path.stat().st_size
            self._end = max((end for _, end in self.read()), default=0)
            self._file.truncate(self._end)
            _sync_folder(path.parent)  # else a loss of power could take a new file with it
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[bytes]) -> None:
        """Writes records; when this returns they are on disk.

        Args:
          records: none of them empty.

        Raises:
          OSError: they could not be written; nothing of them is left.
        """
        data = b"".join(HEADER.pack(len(record), zlib.crc32(record)) + record for record in records)
        with self._lock:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(self._end)  # nothing is appended behind a part of a record
                raise
            self._end += len(data)

    def read(self, position: int = 0) -> Iterator[tuple[bytes, int]]:
        """Reads the records from a position on.

        Args:
          position: where another record ended, in bytes.

        Returns:
          An iterator over the records that were acknowledged when it began, each with the position after it.

        Raises:
          DamagedError: a record that is not the last is damaged.
        """
        end = self._end
        with open(self._path, "rb") as file:
            file.seek(position)
            while position < end:
                header = file.read(HEADER.size)
                size, checksum = HEADER.unpack(header) if len(header) == HEADER.size else (end, 0)
                record_end = position + HEADER.size + size
                record = file.read(size) if record_end <= end else b""
                if not size or record_end > end or zlib.crc32(record) != checksum:
                    if record_end < end:
                        where = f"byte {position:,} of {end:,}"
                        raise DamagedError(f"{self._path}: damaged at {where}; restore the file, or cut it off there")
                    return
                position = record_end
                yield record, position

    def close(self) -> None:
        """Closes the file; again does nothing."""
        self._file.close()


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
        self.schema = pa.schema({"id": id_type, "vector": vector, "attributes": pa.int32()})
        self._number = max((_number(path) for path in _numbered(folder)), default=0)
        self._open()

    def replay(self) -> Iterator[Change]:
        """The snapshot, then the changes since, in order."""
        start = 0
        if snapshots := sorted(self._folder.glob(f"{SNAPSHOT}*"), key=_number):
            start = _number(snapshots[-1])
            for batch in pq.ParquetFile(snapshots[-1] / "rows.parquet").iter_batches(1 << 16):
                yield self._change(batch)
        for path in sorted(self._folder.glob(f"{SEGMENT}*"), key=_number):
            if start <= _number(path) < self._number:  # the snapshot that it ended for was not completed
                segment = Segment(path)
                yield from self._changes(segment)
                segment.close()
        yield from self._changes(self._segment)

    def _changes(self, segment: Segment) -> Iterator[Change]:
        for record, _ in segment.read():
            yield self._change(pa.ipc.read_record_batch(pa.py_buffer(record), self.schema))

    def append(self, change: Change) -> None:
        """Writes a change; when this returns it is on disk."""
        self._segment.append([self.batch(change).serialize().to_pybytes()])

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
            pq.ParquetWriter(building / "rows.parquet", self.schema) as writer,
        ):
            for change in rows:
                writer.write_batch(self.batch(change))
        for path in _numbered(self._folder):
            if _number(path) < segment:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Ends the segment; again does nothing."""
        self._segment.close()

    def _open(self) -> None:
        self._segment = Segment(self._folder / f"{SEGMENT}{self._number:08d}.log")

    def batch(self, change: Change) -> pa.RecordBatch:
        """A change as columns id, vector and attributes."""
        n = len(change.ids)
        if change.vectors is None:
            vectors = pa.nulls(n, self.schema.field("vector").type)
            return pa.record_batch([change.ids, vectors, pa.nulls(n, pa.int32())], schema=self.schema)
        values = pa.array(np.ascontiguousarray(change.vectors, np.float32).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(values, self._dimensions)
        return pa.record_batch([change.ids, vectors, pa.array(change.attributes, pa.int32())], schema=self.schema)

    def _change(self, batch: pa.RecordBatch) -> Change:
        if batch.num_rows and batch["vector"].null_count == batch.num_rows:
            return Change(batch["id"], None, None)
        vectors = batch["vector"].flatten().to_numpy().reshape(-1, self._dimensions)
        return Change(batch["id"], vectors, batch["attributes"].to_numpy())


def _numbered(folder: Path) -> list[Path]:
    return [*folder.glob(f"{SNAPSHOT}*"), *folder.glob(f"{SEGMENT}*")]


def _number(path: Path) -> int:
    return int(path.name.removesuffix(".log").rpartition("-")[2])


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
