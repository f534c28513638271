"""`Index`: vectors by id, searched exhaustively, with another filter for each query, while they are updated."""

from __future__ import annotations

import collections
import fcntl
import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pydantic

from brewjax.config import Config
from brewjax.distributed import Leader
from brewjax.paths import atomic_folder
from brewjax.retrieve.device_rows import DeviceRows
from brewjax.retrieve.log import Change, ChangeLog
from pallas_kernels.search import ALIVE

CONFIG = "index.yaml"
REPLAYED = 100_000  # rows that a start may read from changes, besides two for each that is there
ID_TYPES = {"int64": pa.int64(), "text": pa.string()}
Id = int | str


class IndexConfig(Config):
    """The shape of an index."""

    dimensions: int = pydantic.Field(gt=0)
    """Dimensions of the vectors."""
    ids: Literal["int64", "text"] = "int64"
    """The type of the ids."""
    model: str = ""
    """Name and version of the encoder that made the vectors; empty where that is not known."""


class Hits(NamedTuple):
    """What a search found for one query, best first.

    Attributes:
      ids: at most k; fewer where the filter admits fewer.
      scores: float32 [ids], inner products.
    """

    ids: list[Id]
    scores: np.ndarray


class VectorError(ValueError):
    """A vector, an id or a folder that an index cannot take."""


class Index:
    """Vectors by id. Searches see every change that was acknowledged before they began, and no part of a later one.

    Thread-safe. Scores are inner products in float32; equal scores come in the order of slots.

    Args:
      folder: as `create` made it; all changes in it are read.
      device: held while a program for several devices is dispatched, because those of two threads must reach all
        devices in one order.
      leader: where the devices of all processes share the rows: this is process zero, and the others are in
        `device_rows.follow`. By default those of this process do.
    """

    def __init__(self, folder: Path, device: threading.Lock | None = None, leader: Leader | None = None):
        self._lock = threading.Lock()
        self._writing_snapshot = threading.Lock()
        self._snapshot_thread: threading.Thread | None = None
        self.config = IndexConfig.load(folder / CONFIG)
        self._open = open(folder / CONFIG)  # noqa: SIM115 (see close)
        try:
            fcntl.flock(self._open, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VectorError(f"{folder} is open elsewhere: two writers would lose each other's changes") from None
        self._slots: dict[Hashable, int] = {}
        self._ids: list[Id | None] = []
        self._free: list[int] = []
        # Slots of deleted ids, with the number of the newest search that may still find them.
        self._retired: collections.deque[tuple[int, int]] = collections.deque()
        self._searches = 0
        self._running: set[int] = set()
        self._rows = DeviceRows(self.config.dimensions, jax.devices() if leader else _devices(), device, leader)
        self._log = ChangeLog(folder, self.config.dimensions, ID_TYPES[self.config.ids])
        self._num_replayed = 0  # rows that a start would read
        for change in self._log.replay():
            self._apply(change)
        self._snapshot_when_due()

    @classmethod
    def create(
        cls, folder: Path, config: IndexConfig, device: threading.Lock | None = None, leader: Leader | None = None
    ) -> Index:
        """Makes an empty index.

        Args:
          folder: of the index; must not exist, or be empty.
          config: its settings, which stay.
          device: as of the class.
          leader: as of the class.

        Returns:
          The index, open.

        Raises:
          ValueError: the folder is taken.
        """
        with atomic_folder(folder) as building:
            config.save(building / CONFIG)
        return cls(folder, device, leader)

    def __len__(self) -> int:
        return len(self._slots)

    def upsert(self, ids: Sequence[Id], vectors: np.ndarray, attributes: np.ndarray | None = None) -> None:
        """Adds vectors, or replaces those of ids that are there. When this returns, they are on disk and found.

        Args:
          ids: one for each vector, of the kind that the index has.
          vectors: [n, dimensions], as they are to be multiplied: of length 1 for cosines.
          attributes: int32 [n], bits that filters require or ban; bit 0 belongs to the index.

        Raises:
          VectorError: names the row that cannot be taken; then none is.
        """
        change = self._check(ids, vectors, attributes)
        with self._lock:
            self._log.append(change)
            self._apply(change)
            self._snapshot_when_due()

    def delete(self, ids: Sequence[Id]) -> int:
        """Takes ids out. When this returns, no later search finds them.

        Args:
          ids: which need not be there.

        Returns:
          How many of them were there.
        """
        with self._lock:
            present = [id_ for id_ in dict.fromkeys(ids) if id_ in self._slots]
            if present:
                change = Change(pa.array(present, ID_TYPES[self.config.ids]), None, None)
                self._log.append(change)
                self._apply(change)
                self._snapshot_when_due()
        return len(present)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        required: int | Sequence[int] = 0,
        banned: int | Sequence[int] = 0,
        exclude: Sequence[Iterable[Id]] | None = None,
    ) -> list[Hits]:
        """Finds the k ids with the largest inner products for each query.

        Args:
          queries: float32 [Q, dimensions].
          k: how many; fewer are returned where a filter admits fewer.
          required: attribute bits that a row must have: for all queries, or one for each.
          banned: attribute bits that a row must not have, likewise.
          exclude: ids that are left out, for each query: what a member has seen.

        Returns:
          For each query, ids and scores, the best first.
        """
        queries = self._check_vectors(queries)
        excluded = [{*ids} for ids in exclude] if exclude is not None else [set()] * len(queries)
        bits = np.stack([np.broadcast_to(bits, len(queries)) for bits in (required, banned)], 1).astype(np.int32)
        with self._lock:
            self._searches += 1
            number = self._searches
            self._running.add(number)
            searches = self._rows.search(queries, bits, k + max(map(len, excluded), default=0))
        try:
            hits: list[Hits] = [Hits([], np.zeros(0, np.float32))] * len(queries)
            for search in searches:
                for query, scores, slots in search.collect():
                    hits[query] = self._hits(scores, slots, excluded[query], k)
            return hits
        finally:
            with self._lock:
                self._running.discard(number)

    def share_admitted(self, required: int = 0, banned: int = 0) -> float:
        """Computes how selective a filter is.

        Args:
          required: attribute bits that a row must have.
          banned: attribute bits that a row must not have.

        Returns:
          The share of all rows that the filter admits; 0 where there are none.
        """
        with self._lock:
            count, size = self._rows.count(required, banned), len(self)
        return int(count) / max(size, 1)

    def snapshot(self) -> None:
        """Writes all rows anew, so that the next start replays only what is changed from now on. Searches and changes
        go on meanwhile."""
        with self._writing_snapshot:
            with self._lock:
                segment, count = self._log.begin_segment(), len(self._ids)
                self._num_replayed = len(self)
            self._log.write_snapshot(segment, self._chunks(count))

    def _snapshot_when_due(self) -> None:
        """Begins a snapshot where a start would read much more than there is. Called with the lock held."""
        running = self._snapshot_thread is not None and self._snapshot_thread.is_alive()
        if self._num_replayed > 2 * len(self) + REPLAYED and not running:
            self._snapshot_thread = threading.Thread(target=self.snapshot, name="snapshot")
            self._snapshot_thread.start()

    def _chunks(self, count: int) -> Iterator[Change]:
        """The rows of the first `count` slots, each chunk as it is when it is read. A row that was moved meanwhile is
        in two, or in none: then the changes since say where it is."""
        for chunk in self._rows.chunks(count):
            with self._lock:
                change = self._read(chunk, count)
            yield change

    def rows(self) -> pa.Table:
        """Reads the whole index.

        Returns:
          All ids, vectors and attributes, in the order of slots.
        """
        with self._lock:
            count = len(self._ids)
            batches = [self._log.batch(self._read(chunk, count)) for chunk in self._rows.chunks(count)]
            return pa.Table.from_batches(batches, self._log.schema)

    def _read(self, chunk: range, count: int) -> Change:
        """What is in a chunk, of the first `count` slots."""
        alive = [slot for slot in chunk[: count - chunk.start] if self._slots.get(self._ids[slot]) == slot]
        vectors, attributes = self._rows.read(chunk, alive)
        ids = pa.array([self._ids[slot] for slot in alive], ID_TYPES[self.config.ids])
        return Change(ids, vectors, attributes & ~ALIVE)

    def is_at(self, folder: Path) -> bool:
        """Whether a folder is the one that this index was opened in, by whatever path.

        Args:
          folder: of any index.

        Returns:
          True if it is; False too where another has been put in its place.
        """
        return os.path.samestat(os.stat(folder / CONFIG), os.fstat(self._open.fileno()))

    def close(self) -> None:
        """Closes the files, after a snapshot that is being written; the index cannot be changed any more."""
        if self._snapshot_thread is not None:
            self._snapshot_thread.join()
        with self._lock:
            self._log.close()
            self._open.close()

    def _check_vectors(self, vectors: np.ndarray) -> np.ndarray:
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.config.dimensions:
            raise VectorError(f"vectors of shape {vectors.shape}; expected [n, {self.config.dimensions}]")
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
            raise VectorError(f"row {row}: not all numbers are finite")
        return vectors

    def _check(self, ids: Sequence[Id], vectors: np.ndarray, attributes: np.ndarray | None) -> Change:
        vectors = self._check_vectors(vectors)
        attributes = np.zeros(len(ids), np.int32) if attributes is None else np.asarray(attributes)
        if not len(ids) == len(vectors) == len(attributes):
            raise VectorError(f"{len(ids)} ids, {len(vectors)} vectors and {len(attributes)} attributes")
        if len({*ids}) < len(ids):
            twice = next(id_ for id_, count in collections.Counter(ids).items() if count > 1)
            raise VectorError(f"id {twice!r} is given twice")
        try:
            array = pa.array(ids, ID_TYPES[self.config.ids])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise VectorError(f"ids of this index are {self.config.ids}: {error}") from None
        if attributes.size and (attributes & ALIVE).any():
            raise VectorError("attributes: bit 0 belongs to the index")
        return Change(array, vectors, attributes.astype(np.int32))

    def _apply(self, change: Change) -> None:
        ids = change.ids.to_pylist()
        self._num_replayed += len(ids)
        if change.vectors is None or change.attributes is None:
            slots = [self._slots.pop(id_) for id_ in ids if id_ in self._slots]  # a snapshot may not have had them
            self._retired += [(slot, self._searches) for slot in slots]
            self._rows.write(slots, np.zeros(len(slots), np.int32), None)
            return
        self._rows.write([self._slot(id_) for id_ in ids], change.attributes | ALIVE, change.vectors)

    def _slot(self, id_: Id) -> int:
        """The slot of an id; a free or a new one for an id that is not there."""
        if id_ in self._slots:
            return self._slots[id_]
        oldest = min(self._running, default=self._searches + 1)
        while self._retired and self._retired[0][1] < oldest:
            self._free.append(self._retired.popleft()[0])
        if self._free:
            slot = self._free.pop()
            self._ids[slot] = id_
        else:
            slot = len(self._ids)
            self._ids.append(id_)
        self._slots[id_] = slot
        return slot

    def _hits(self, scores: np.ndarray, slots: np.ndarray, excluded: set[Id], k: int) -> Hits:
        ids: list[Id] = []
        hit_scores: list[float] = []
        for score, slot in zip(scores.tolist(), slots.tolist(), strict=True):
            if slot < 0 or len(ids) == k:
                break
            id_ = self._ids[slot]
            if id_ is not None and id_ not in excluded:
                ids.append(id_)
                hit_scores.append(score)
        return Hits(ids, np.array(hit_scores, np.float32))


def _devices() -> list[jax.Device]:
    """The devices of this process that an index is on. Of a CPU one, whatever JAX divides it into: filters read its
    arrays in place, and would copy those of several devices for each search."""
    return jax.local_devices()[:1] if jax.default_backend() == "cpu" else jax.local_devices()
