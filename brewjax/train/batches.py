"""Batches on a mesh: each process reads the rows that its devices compute, the same rows on any number of them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from brewjax.data.records.loader import TokenBatch, load_batches
from brewjax.data.records.shards import Shards
from brewjax.model.sharding import BATCH_AXES

BATCH_SPEC = jax.P(None, BATCH_AXES, None)  # how a batch [parts, rows, tokens] lies on a mesh, and what is beside it
BatchLookup = Callable[[TokenBatch], Any]  # rows of numpy arrays to arrays [rows, ..] that belong to them


class ShardedBatches:
    """An endless iterator of batches: this process's rows as numpy arrays, the placed [parts, rows, tokens], and what
    each of `beside` finds for them, placed alike.

    Stream s of `streams` fills the s-th block of each part's rows, whatever the mesh. A process reads the streams that
    its devices have rows of. Saved with a checkpoint, stream by stream, it goes on exactly on another mesh or on
    another number of processes.

    Attributes:
      reads: the streams of this process.
    """

    def __init__(
        self,
        shards: Shards,
        mesh: Mesh,
        parts: int,
        rows: int,
        seq_len: int,
        streams: int,
        seed: int,
        beside: Mapping[str, BatchLookup] = {},
    ):
        self._beside = beside
        self._shape, self._block, self._streams = (parts, rows // parts, seq_len), rows // parts // streams, streams
        self._sharding = NamedSharding(mesh, BATCH_SPEC)
        readers: dict[int, set[int]] = {}
        places: Any = self._sharding.devices_indices_map(self._shape)
        for device, index in places.items():
            for stream in self._streams_of(index[1]):
                readers.setdefault(stream, set()).add(device.process_index)
        here = jax.process_index()
        self.reads = [stream for stream in sorted(readers) if here in readers[stream]]
        self._iterators = {
            stream: iter(load_batches(shards, rows // streams, seq_len, seed, stream, streams)) for stream in self.reads
        }
        self._saves = [stream for stream in self.reads if min(readers[stream]) == here]

    def _streams_of(self, rows: slice) -> range:
        start, stop, _ = rows.indices(self._shape[1])
        return range(start // self._block, -(-stop // self._block))

    def __iter__(self) -> ShardedBatches:
        return self

    def __next__(self) -> tuple[TokenBatch, TokenBatch, dict[str, Any]]:
        read = {stream: next(iterator) for stream, iterator in self._iterators.items()}
        found = [{name: look_up(rows) for name, look_up in self._beside.items()} for rows in read.values()]
        order = {stream: place for place, stream in enumerate(read)}

        def place(*leaves: np.ndarray) -> jax.Array:
            parts = [leaf.reshape(self._shape[0], self._block, *leaf.shape[1:]) for leaf in leaves]

            def of_device(index: Any) -> np.ndarray:  # a slice of each axis
                streams = self._streams_of(index[1])
                start, stop, _ = index[1].indices(self._shape[1])
                whole = (
                    np.concatenate([parts[order[s]] for s in streams], 1)
                    if len(streams) > 1
                    else parts[order[streams[0]]]
                )
                return whole[:, start - streams[0] * self._block : stop - streams[0] * self._block]

            shape = (*self._shape, *leaves[0].shape[2:])
            return jax.make_array_from_callback(shape, self._sharding, of_device)

        batches = list(read.values())
        local = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        return local, jax.tree.map(place, *batches), jax.tree.map(place, *found)

    async def save(self, directory: Any) -> Awaitable[None]:
        """For Orbax: what to save is taken now, and written while training goes on."""
        states = {stream: json.dumps(self._iterators[stream].get_state()) for stream in self._saves}

        async def write() -> None:
            folder = Path(await directory.await_creation())
            for stream, state in states.items():
                (folder / _name(stream, self._streams)).write_text(state)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """For Orbax: goes on where `save` was."""

        async def read() -> None:
            for stream, iterator in self._iterators.items():
                iterator.set_state(json.loads((Path(directory) / _name(stream, self._streams)).read_text()))

        return read()


def _name(stream: int, streams: int) -> str:
    return f"stream-{stream}-of-{streams}.json"
