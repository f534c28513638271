"""The rows of an index on devices: of one process, or of all, each of which makes the calls that process zero makes."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from brewjax.distributed import Leader, messages
from pallas_kernels.search import ALIVE, AXIS, BINS, BestRows, Filter, Rows, admitted, jitted_top_k, rows_of, slots_of

GATHERED_SHARE = 0.05  # of the rows, under which those that a filter admits are gathered
CHUNK_ROWS = 1 << 16  # that are read at a time
OPEN = "open"  # the name of the message that begins an index; others have the names of methods
T = TypeVar("T")


def _on_every_process(method: Callable[..., T]) -> Callable[..., T]:
    """A method that dispatches a program: the programs of all threads reach all devices in one order, so it holds
    `device`; and where other processes have some of the devices, they make the same call."""

    @functools.wraps(method)
    def dispatch(self: DeviceRows, *arguments: Any) -> T:
        with self._device:
            if self._leader:
                self._leader.send((id(self), method.__name__, arguments))
            return method(self, *arguments)

    return dispatch


class DeviceRows:
    """Vectors and attribute bits by slot, on devices, in rows of which there are twice as many when a slot has none.

    Thread-safe, except that `search` may gather rows, and nothing may be written meanwhile.

    Args:
      dimensions: of the vectors.
      devices: that share the rows.
      device: held while a program for several devices is dispatched, because those of two threads must reach all
        devices in one order.
      leader: of the other processes that have some of the devices; each of them is in `follow`.
    """

    def __init__(
        self,
        dimensions: int,
        devices: Sequence[jax.Device],
        device: threading.Lock | None = None,
        leader: Leader | None = None,
    ):
        self._dimensions, self._device, self._leader = dimensions, device or threading.Lock(), leader
        self._mesh = jax.make_mesh((len(devices),), (AXIS,), devices=devices)
        lanes = 128 if jax.default_backend() == "tpu" else 1  # of which a TPU stores whole ones
        with self._device:
            if leader:
                leader.send((id(self), OPEN, (dimensions,)))
            self._rows = _empty(-(-dimensions // lanes) * lanes, self._mesh)

    def __len__(self) -> int:
        """How many slots have a row."""
        return len(self._rows.vectors)

    @_on_every_process
    def write(self, slots: Sequence[int], attributes: np.ndarray, vectors: np.ndarray | None) -> None:
        """Gives slots other values, in twice as many rows where a slot has none.

        Args:
          slots: no two alike.
          attributes: int32 [slots].
          vectors: float32 [slots, dimensions]; None leaves those that they have.
        """
        while max(slots, default=0) >= len(self):
            self._rows = _grow(self._rows, self._mesh)
        extra = _round_up(len(slots)) - len(slots)
        nowhere = np.iinfo(np.int32).max  # the slot of what pads to a power of two
        padded_slots = np.pad(np.array(slots, np.int32), (0, extra), constant_values=nowhere)
        padded_vectors = None if vectors is None else self._pad(vectors, extra)
        self._rows = _write(self._rows, padded_slots, np.pad(attributes, (0, extra)), padded_vectors, self._mesh)

    @_on_every_process
    def top_k(self, queries: np.ndarray, bits: np.ndarray, k: int, certain: bool) -> BestRows:
        """Searches all rows.

        Args:
          queries: float32 [Q, dimensions].
          bits: int32 [Q, 2]: the attribute bits that each query requires, and bans.
          k: how many; the next power of two is found, or all rows.
          certain: in the way whose results are always exact.

        Returns:
          What is found, whole on every device.
        """
        k = min(_round_up(k), len(self))
        return jitted_top_k(self._pad(queries), self._rows, Filter(*bits.T), k=k, mesh=self._mesh, certain=certain)

    @_on_every_process
    def count(self, required: int, banned: int) -> jax.Array:
        """Counts the rows that are there and have, and have not, some attribute bits: int32 []."""
        return _count(self._rows, Filter(*np.array([[required], [banned]], np.int32)))

    @_on_every_process
    def _copy(self, start: int, count: int) -> Rows:
        return _copy_rows(self._rows, start, count, self._mesh)

    def chunks(self, count: int) -> Iterator[range]:
        """Divides the first `count` slots, and some behind them, into those that `read` reads at once."""
        devices = self._mesh.size
        # A power of two, as is the number of rows on a device, so that every chunk is a whole one.
        size = min(1 << (CHUNK_ROWS // devices).bit_length() - 1, len(self) // devices) * devices
        return (range(start, start + size) for start in range(0, count, size))

    def read(self, chunk: range, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Reads rows.

        Args:
          chunk: one of `chunks`.
          slots: some of it.

        Returns:
          Their vectors, float32 [slots, dimensions], and attribute bits, int32 [slots].
        """
        devices, rows_each = self._mesh.size, len(chunk) // self._mesh.size
        rows = self._copy(chunk.start // devices, rows_each)
        chosen = rows_of(np.array(slots, np.int64) - chunk.start, rows_each, devices)
        return np.asarray(rows.vectors)[chosen, : self._dimensions], np.asarray(rows.attributes)[chosen]

    def search(self, queries: np.ndarray, bits: np.ndarray, k: int) -> list[Search]:
        """Starts searches.

        On a CPU, where a filter admits few rows these are gathered first: most of the time is reading rows.

        Args:
          queries: float32 [Q, dimensions].
          bits: int32 [Q, 2]: the attribute bits that each query requires, and bans.
          k: how many rows to find, at least.

        Returns:
          One search or several, for other queries each.
        """
        searches, whole = [], np.ones(len(queries), bool)
        if jax.default_backend() == "cpu" and not self._mesh.is_multi_process:
            attributes = np.asarray(self._rows.attributes)
            for required, banned in np.unique(bits, axis=0):
                needed = required | ALIVE
                rows = np.flatnonzero(((attributes & needed) == needed) & ((attributes & banned) == 0))
                if len(rows) < GATHERED_SHARE * len(attributes):
                    numbers = np.flatnonzero((bits == (required, banned)).all(1))
                    whole[numbers] = False
                    searches.append(self._search_gathered(rows, queries[numbers], numbers, k))
        if whole.any():
            numbers = np.flatnonzero(whole)
            again = functools.partial(self.top_k, queries[numbers], bits[numbers], k)
            searches.append(Search(numbers, None, again(False), functools.partial(again, True)))
        return searches

    def _search_gathered(self, rows: np.ndarray, queries: np.ndarray, numbers: np.ndarray, k: int) -> Search:
        """A search of some rows, and of others that are not alive up to a power of two, so that few programs are
        compiled."""
        devices, rows_each = self._mesh.size, len(self) // self._mesh.size
        slots = np.sort(slots_of(rows, rows_each, devices))
        size = max(BINS, _round_up(len(slots)))
        vectors = np.zeros((size, self._rows.vectors.shape[1]), np.float32)
        vectors[: len(slots)] = np.asarray(self._rows.vectors)[rows_of(slots, rows_each, devices)]
        alive = np.arange(size, dtype=np.int32) < len(slots)
        gathered = Rows(jnp.asarray(vectors), jnp.asarray(alive * np.int32(ALIVE)))
        filters = Filter(*np.zeros((2, len(queries)), np.int32))
        again = functools.partial(jitted_top_k, self._pad(queries), gathered, filters, k=min(_round_up(k), size))
        return Search(numbers, slots, again(), functools.partial(again, certain=True))

    def _pad(self, vectors: np.ndarray, rows: int = 0) -> np.ndarray:
        """Vectors as they are stored, and some more."""
        return np.pad(vectors, ((0, rows), (0, self._rows.vectors.shape[1] - self._dimensions)))


@dataclasses.dataclass(frozen=True)
class Search:
    """A search under way, for queries that share its rows.

    Attributes:
      numbers: of the queries.
      slots: of the rows, where only those that the filter admits were gathered; None where all were searched.
      again: the whole search once more, where what a TPU's kernel dropped, or a device kept back, could have mattered.
    """

    numbers: np.ndarray
    slots: np.ndarray | None
    result: BestRows
    again: Callable[[], BestRows]

    def collect(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Waits, and yields each query's number, scores and slots; -1 behind the last slot."""
        scores, rows, exact = jax.device_get(self.result)
        if not exact.all():
            scores, rows, _ = jax.device_get(self.again())
        for number, query_scores, query_rows in zip(self.numbers.tolist(), scores, rows, strict=True):
            yield number, query_scores, query_rows if self.slots is None else np.append(self.slots, -1)[query_rows]


def follow() -> None:
    """Holds this process's share of the rows of the indices that process zero leads, until it is done with all of them.

    Raises:
      DistributedError: process zero cannot be reached, or failed.
    """
    rows: dict[int, DeviceRows] = {}  # by `id` of process zero's, which another may have when that is gone
    for number, name, arguments in messages():
        if name == OPEN:
            (dimensions,) = arguments
            rows[number] = DeviceRows(dimensions, jax.devices())
        else:
            getattr(rows[number], name)(*arguments)


def _empty(width: int, mesh: Mesh) -> Rows:
    """`BINS` rows on each device, none of them alive."""
    count = BINS * mesh.size
    make = lambda: Rows(jnp.zeros((count, width), jnp.float32), jnp.zeros(count, jnp.int32))  # noqa: E731
    return jax.jit(make, out_shardings=NamedSharding(mesh, jax.P(AXIS)))()


@functools.partial(jax.jit, static_argnums=1)
def _grow(rows: Rows, mesh: Mesh) -> Rows:
    """Twice as many rows on each device."""
    double = lambda shard: Rows(*(jnp.concatenate([x, jnp.zeros_like(x)]) for x in shard))  # noqa: E731
    return jax.shard_map(double, mesh=mesh, in_specs=(jax.P(AXIS),), out_specs=jax.P(AXIS))(rows)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write(rows: Rows, slots: jax.Array, attributes: jax.Array, vectors: jax.Array | None, mesh: Mesh) -> Rows:
    def write(shard: Rows, slots: jax.Array, attributes: jax.Array, vectors: jax.Array | None) -> Rows:
        """Each device writes what is in its slots; a row behind all is dropped."""
        is_here = slots % mesh.size == jax.lax.axis_index(AXIS)
        index = jnp.where(is_here, slots // mesh.size, len(shard.attributes))
        written = shard.vectors if vectors is None else shard.vectors.at[index].set(vectors, mode="drop")
        return Rows(written, shard.attributes.at[index].set(attributes, mode="drop"))

    specs = (jax.P(AXIS), jax.P(), jax.P(), jax.P())
    return jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=jax.P(AXIS))(rows, slots, attributes, vectors)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _copy_rows(rows: Rows, start: int, count: int, mesh: Mesh) -> Rows:
    """`count` rows of each device, from `start` on, which later writes do not touch; whole on every device where these
    are of several processes, none of which could read the others' shares."""

    def copy(shard: Rows, start: Any) -> Rows:
        rows = Rows(*(jax.lax.dynamic_slice_in_dim(x, start, count) for x in shard))
        return Rows(*(jax.lax.all_gather(x, AXIS, tiled=True) for x in rows)) if mesh.is_multi_process else rows

    out_specs = jax.P() if mesh.is_multi_process else jax.P(AXIS)
    specs = (jax.P(AXIS), jax.P())
    return jax.shard_map(copy, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(rows, start)


@jax.jit
def _count(rows: Rows, filters: Filter) -> jax.Array:
    return jnp.sum(admitted(rows, filters))


def _round_up(count: int) -> int:
    """The next power of two, so that few programs are compiled."""
    return 1 << max(count - 1, 0).bit_length()
