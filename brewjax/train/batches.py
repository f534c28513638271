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
        num_micro_batches: int,
        batch_size: int,
        seq_len: int,
        num_data_shards: int,
        seed: int,
        lookups: Mapping[str, BatchLookup] = {},
    ):
        self._lookups = lookups
        self._shape = (num_micro_batches, batch_size // num_micro_batches, seq_len)
        self._block = batch_size // num_micro_batches // num_data_shards
        self._num_data_shards = num_data_shards
        self._sharding = NamedSharding(mesh, BATCH_SPEC)
        readers: dict[int, set[int]] = {}
        indices: Any = self._sharding.devices_indices_map(self._shape)
        for device, index in indices.items():
            for shard in self._shards_in(index[1]):
                readers.setdefault(shard, set()).add(device.process_index)
        process = jax.process_index()
        self.reads = [shard for shard in sorted(readers) if process in readers[shard]]
        self._iterators = {
            shard: iter(load_batches(shards, batch_size // num_data_shards, seq_len, seed, shard, num_data_shards))
            for shard in self.reads
        }
        self._saves = [shard for shard in self.reads if min(readers[shard]) == process]

    def _shards_in(self, rows: slice) -> range:
        start, stop, _ = rows.indices(self._shape[1])
        return range(start // self._block, -(-stop // self._block))

    def __iter__(self) -> ShardedBatches:
        return self

    def __next__(self) -> tuple[TokenBatch, TokenBatch, dict[str, Any]]:
        read = {shard: next(iterator) for shard, iterator in self._iterators.items()}
        looked_up = [{name: look_up(rows) for name, look_up in self._lookups.items()} for rows in read.values()]
        order = {shard: position for position, shard in enumerate(read)}

        def place(*leaves: np.ndarray) -> jax.Array:
            blocks = [leaf.reshape(self._shape[0], self._block, *leaf.shape[1:]) for leaf in leaves]

            def read_block(index: Any) -> np.ndarray:  # a slice of each axis
                block_shards = self._shards_in(index[1])
                start, stop, _ = index[1].indices(self._shape[1])
                joined = (
                    np.concatenate([blocks[order[s]] for s in block_shards], 1)
                    if len(block_shards) > 1
                    else blocks[order[block_shards[0]]]
                )
                return joined[:, start - block_shards[0] * self._block : stop - block_shards[0] * self._block]

            shape = (*self._shape, *leaves[0].shape[2:])
            return jax.make_array_from_callback(shape, self._sharding, read_block)

        batches = list(read.values())
        local = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        return local, jax.tree.map(place, *batches), jax.tree.map(place, *looked_up)

    async def save(self, directory: Any) -> Awaitable[None]:
        """For Orbax: what to save is taken now, and written while training goes on."""
        states = {shard: json.dumps(self._iterators[shard].get_state()) for shard in self._saves}

        async def write() -> None:
            folder = Path(await directory.await_creation())
            for shard, state in states.items():
                (folder / _name(shard, self._num_data_shards)).write_text(state)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """For Orbax: goes on where `save` was."""

        async def read() -> None:
            for shard, iterator in self._iterators.items():
                iterator.set_state(json.loads((Path(directory) / _name(shard, self._num_data_shards)).read_text()))

        return read()


def _name(shard: int, num_data_shards: int) -> str:
    return f"shard-{shard}-of-{num_data_shards}.json"
