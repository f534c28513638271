"""`Index`: vectors by id, searched exhaustively, with another filter for each query, while they are updated."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import functools
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pydantic
from jax.sharding import Mesh, NamedSharding

from brewjax.config import Config
from brewjax.paths import atomic_folder
from brewjax.retrieve.log import Change, ChangeLog
from pallas_kernels.search import ALIVE, AXIS, BINS, BestRows, Filter, Rows, admitted, jitted_top_k, rows_of, slots_of

CONFIG = "index.yaml"
GATHERED_SHARE = 0.05  # of the rows, under which those that a filter admits are gathered
REPLAYED = 100_000  # rows that a start may read from changes, besides two for each that is there
SNAPSHOT_ROWS = 1 << 16  # that a snapshot copies at a time, while no change is made
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
    """

    def __init__(self, folder: Path, device: threading.Lock | None = None):
        self._lock = threading.Lock()
        devices = _devices()
        self._mesh = jax.make_mesh((len(devices),), (AXIS,), devices=devices)
        self._device = device or threading.Lock()
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
        self._rows = _empty(self._width, self._mesh)
        self._log = ChangeLog(folder, self.config.dimensions, ID_TYPES[self.config.ids])
        self._num_replayed = 0  # rows that a start would read
        for change in self._log.replay():
            self._apply(change)
        self._snapshot_when_due()

    @classmethod
    def create(cls, folder: Path, config: IndexConfig, device: threading.Lock | None = None) -> Index:
        """Makes an empty index.

        Args:
          folder: of the index; must not exist, or be empty.
          config: its settings, which stay.
          device: as of the class.

        Returns:
          The index, open.

        Raises:
          ValueError: the folder is taken.
        """
        with atomic_folder(folder) as building:
            config.save(building / CONFIG)
        return cls(folder, device)

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
        queries = self._pad(np.asarray(queries, np.float32))
        excluded = [{*ids} for ids in exclude] if exclude is not None else [set()] * len(queries)
        bits = np.stack([np.broadcast_to(bits, len(queries)) for bits in (required, banned)], 1).astype(np.int32)
        with self._lock:
            self._searches += 1
            number = self._searches
            self._running.add(number)
            rows = self._rows
            limit = k + max(map(len, excluded), default=0)
            with self._device:
                dispatched = _dispatch(rows, queries, bits, limit, self._mesh)
        try:
            hits: list[Hits] = [Hits([], np.zeros(0, np.float32))] * len(queries)
            for search in dispatched:
                for query, scores, slots in search.collect(self._search_by_blocks):
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
        filters = Filter(*(jnp.array([bits], jnp.int32) for bits in (required, banned)))
        with self._lock, self._device:
            count, size = _count(self._rows, filters), len(self)
        return int(count) / max(size, 1)

    def _search_by_blocks(self, search: _Search) -> BestRows:
        """A whole search once more, where what a TPU's kernel dropped, or a device kept back, could have mattered."""
        with self._lock, self._device:
            rows, mesh = self._rows, self._mesh
            return jitted_top_k(search.queries, rows, search.filters, k=search.k, mesh=mesh, certain=True)

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
        devices = self._mesh.size
        # A power of two, as is the number of rows on a device, so that every chunk is a whole one.
        rows_each = min(1 << (SNAPSHOT_ROWS // devices).bit_length() - 1, len(self._rows.vectors) // devices)
        for start in range(0, count, rows_each * devices):
            with self._lock:
                slots = range(start, min(start + rows_each * devices, count))
                alive = [slot for slot in slots if self._slots.get(self._ids[slot]) == slot]
                with self._device:
                    rows = _read(self._rows, start // devices, rows_each, self._mesh)
                change = self._alive(rows, start, alive)
            yield change

    def rows(self) -> pa.Table:
        """Reads the whole index.

        Returns:
          All ids, vectors and attributes, in the order of slots.
        """
        with self._lock:
            change = self._alive(self._rows, 0, sorted(self._slots.values()))
            return pa.Table.from_batches([self._log.batch(change)])

    def _alive(self, rows: Rows, start: int, slots: list[int]) -> Change:
        """What is in some slots, of rows that begin at slot `start`."""
        devices = self._mesh.size
        chosen = rows_of(np.array(slots, np.int64) - start, len(rows.vectors) // devices, devices)
        vectors = np.asarray(rows.vectors)[chosen, : self.config.dimensions]
        ids = pa.array([self._ids[slot] for slot in slots], ID_TYPES[self.config.ids])
        return Change(ids, vectors, np.asarray(rows.attributes)[chosen] & ~ALIVE)

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

    @property
    def _width(self) -> int:
        """Dimensions as stored: whole lanes on a TPU."""
        lanes = 128 if jax.default_backend() == "tpu" else 1
        return -(-self.config.dimensions // lanes) * lanes

    def _pad(self, vectors: np.ndarray) -> np.ndarray:
        if vectors.ndim != 2 or vectors.shape[1] != self.config.dimensions:
            raise VectorError(f"vectors of shape {vectors.shape}; expected [n, {self.config.dimensions}]")
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
            raise VectorError(f"row {row}: not all numbers are finite")
        return np.pad(vectors, ((0, 0), (0, self._width - self.config.dimensions)))

    def _check(self, ids: Sequence[Id], vectors: np.ndarray, attributes: np.ndarray | None) -> Change:
        vectors = np.asarray(vectors, np.float32)
        self._pad(vectors)
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
            with self._device:
                self._rows = _write(self._rows, slots, np.zeros(len(slots), np.int32), None, self._mesh)
            return
        slots = [self._slot(id_) for id_ in ids]  # before self._rows is read: it may grow
        with self._device:
            attributes, vectors = change.attributes | ALIVE, self._pad(change.vectors)
            self._rows = _write(self._rows, slots, attributes, vectors, self._mesh)

    def _slot(self, id_: Id) -> int:
        """The slot of an id; a new one, in rows twice as many where all are taken, for an id that is not there."""
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
            if slot == len(self._rows.vectors):
                with self._device:
                    self._rows = _grow(self._rows, self._mesh)
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


@dataclasses.dataclass(frozen=True)
class _Search:
    """A search under way, for queries that share its rows.

    Attributes:
      numbers: of the queries.
      slots: of the rows, where only those that the filter admits were gathered; None where all were searched.
    """

    numbers: np.ndarray
    queries: jax.Array
    filters: Filter
    k: int
    slots: np.ndarray | None
    result: BestRows

    @classmethod
    def start(
        cls,
        rows: Rows,
        queries: np.ndarray,
        bits: np.ndarray,
        numbers: np.ndarray,
        k: int,
        slots: np.ndarray | None = None,
        mesh: Mesh | None = None,
    ) -> _Search:
        """Starts a search of gathered rows, which are in `slots`, or of all rows, on the devices of `mesh`."""
        filters = Filter(*(jnp.asarray(column) for column in bits[numbers].T))
        chosen, k = jnp.asarray(queries[numbers]), min(_round_up(k), len(rows.vectors))
        return cls(numbers, chosen, filters, k, slots, jitted_top_k(chosen, rows, filters, k=k, mesh=mesh))

    def collect(self, again: Callable[[_Search], BestRows]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Waits, and yields each query's number, scores and slots; `again` searches another way where some result is
        not surely exact."""
        scores, rows, exact = jax.device_get(self.result)
        if not exact.all():
            scores, rows, _ = jax.device_get(again(self))
        for number, query_scores, query_rows in zip(self.numbers.tolist(), scores, rows, strict=True):
            yield number, query_scores, query_rows if self.slots is None else np.append(self.slots, -1)[query_rows]


def _dispatch(rows: Rows, queries: np.ndarray, bits: np.ndarray, k: int, mesh: Mesh) -> list[_Search]:
    """Starts searches for queries [Q, D] with filters [Q, 2] of required and banned bits.

    On a CPU, where a filter admits few rows these are gathered first: most of the time is reading rows.
    """
    searches, whole = [], np.ones(len(queries), bool)
    if jax.default_backend() == "cpu":
        attributes = np.asarray(rows.attributes)
        for required, banned in np.unique(bits, axis=0):
            needed = required | ALIVE
            admitted = np.flatnonzero(((attributes & needed) == needed) & ((attributes & banned) == 0))
            if len(admitted) < GATHERED_SHARE * len(attributes):
                numbers = np.flatnonzero((bits == (required, banned)).all(1))
                whole[numbers] = False
                slots = np.sort(slots_of(admitted, len(attributes) // mesh.size, mesh.size))
                gathered = _gather(rows, rows_of(slots, len(attributes) // mesh.size, mesh.size))
                searches.append(_Search.start(gathered, queries, np.zeros_like(bits), numbers, k, slots))
    if whole.any():
        searches.append(_Search.start(rows, queries, bits, np.flatnonzero(whole), k, mesh=mesh))
    return searches


def _gather(rows: Rows, chosen: np.ndarray) -> Rows:
    """Some rows, and others that are not alive up to a power of two, so that few programs are compiled."""
    size = max(BINS, _round_up(len(chosen)))
    vectors = np.zeros((size, rows.vectors.shape[1]), np.float32)
    vectors[: len(chosen)] = np.asarray(rows.vectors)[chosen]
    attributes = np.zeros(size, np.int32)
    attributes[: len(chosen)] = ALIVE
    return Rows(jnp.asarray(vectors), jnp.asarray(attributes))


def _devices() -> list[jax.Device]:
    """The devices of the host that an index is on. Of a CPU one, whatever JAX divides it into: filters read its arrays
    in place, and would copy those of several devices for each search."""
    return jax.local_devices()[:1] if jax.default_backend() == "cpu" else jax.local_devices()


def _empty(width: int, mesh: Mesh) -> Rows:
    """`BINS` rows on each device, none of them alive."""
    count = BINS * mesh.size
    make = lambda: Rows(jnp.zeros((count, width), jnp.float32), jnp.zeros(count, jnp.int32))  # noqa: E731
    return jax.jit(make, out_shardings=NamedSharding(mesh, jax.P(AXIS)))()


@functools.partial(jax.jit, static_argnums=(2, 3))
def _read(rows: Rows, start: int, count: int, mesh: Mesh) -> Rows:
    """`count` rows of each device, from `start` on; a copy, which later writes do not touch."""
    read = lambda shard, start: Rows(*(jax.lax.dynamic_slice_in_dim(x, start, count) for x in shard))  # noqa: E731
    return jax.shard_map(read, mesh=mesh, in_specs=(jax.P(AXIS), jax.P()), out_specs=jax.P(AXIS))(rows, start)


@functools.partial(jax.jit, static_argnums=1)
def _grow(rows: Rows, mesh: Mesh) -> Rows:
    """Twice as many rows on each device."""
    double = lambda shard: Rows(*(jnp.concatenate([x, jnp.zeros_like(x)]) for x in shard))  # noqa: E731
    return jax.shard_map(double, mesh=mesh, in_specs=(jax.P(AXIS),), out_specs=jax.P(AXIS))(rows)


@jax.jit
def _count(rows: Rows, filters: Filter) -> jax.Array:
    return jnp.sum(admitted(rows, filters))


def _round_up(count: int) -> int:
    """The next power of two, so that few programs are compiled."""
    return 1 << max(count - 1, 0).bit_length()


def _write(rows: Rows, slots: list[int], attributes: np.ndarray, vectors: np.ndarray | None, mesh: Mesh) -> Rows:
    """The rows with other values in `slots`; with the vectors that they have where `vectors` is None."""
    extra = _round_up(len(slots)) - len(slots)
    nowhere = np.iinfo(np.int32).max  # the slot of what pads to a power of two
    padded_slots = np.pad(np.array(slots, np.int32), (0, extra), constant_values=nowhere)
    padded_vectors = None if vectors is None else np.pad(vectors, ((0, extra), (0, 0)))
    return _write_padded(rows, padded_slots, np.pad(attributes, (0, extra)), padded_vectors, mesh)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write_padded(rows: Rows, slots: jax.Array, attributes: jax.Array, vectors: jax.Array | None, mesh: Mesh) -> Rows:
    def write(shard: Rows, slots: jax.Array, attributes: jax.Array, vectors: jax.Array | None) -> Rows:
        """Each device writes what is in its slots; a row behind all is dropped."""
        is_here = slots % mesh.size == jax.lax.axis_index(AXIS)
        index = jnp.where(is_here, slots // mesh.size, len(shard.attributes))
        written = shard.vectors if vectors is None else shard.vectors.at[index].set(vectors, mode="drop")
        return Rows(written, shard.attributes.at[index].set(attributes, mode="drop"))

    specs = (jax.P(AXIS), jax.P(), jax.P(), jax.P())
    return jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=jax.P(AXIS))(rows, slots, attributes, vectors)
