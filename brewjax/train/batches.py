"""Global batches on a mesh: each process reads the rows that its devices compute, in an order that no mesh changes."""

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

BATCH_SPEC = jax.P(None, BATCH_AXES, None)  # of arrays [micro-batch, row, token]: batches and their lookups
BatchLookup = Callable[[TokenBatch], Any]  # rows of numpy arrays -> a pytree of arrays [rows, ..] for them


class ShardedBatches:
    """An endless iterator of global batches on a mesh.

    The data order is split into `num_data_shards` shards. Shard s always supplies the same block of rows of each
    micro-batch, on every mesh. A process reads only the shards whose rows lie on its devices; a checkpoint stores one
    iterator state per shard, so training may resume on another mesh or number of processes.

    Each item is this process's rows as numpy arrays; the global batch [micro-batch, row, token] on the mesh; and by
    name the results of `lookups` for it, laid out in the same way.

    Args:
      shards: folders of records.
      mesh: the devices.
      num_micro_batches: micro-batches in a batch.
      batch_size: rows of a batch, over all micro-batches and devices.
      seq_len: tokens of a row.
      num_data_shards: shards of the data order; it divides the rows of a micro-batch.
      seed: of the order of records.
      lookups: by name, functions of a batch's rows.

    Attributes:
      reads: the shards that this process reads.
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

            shape = (*self._shape[:2], *leaves[0].shape[1:])
            return jax.make_array_from_callback(shape, self._sharding, read_block)

        batches = list(read.values())
        local = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        return local, jax.tree.map(place, *batches), jax.tree.map(place, *looked_up)

    async def save(self, directory: Any) -> Awaitable[None]:
        """For Orbax: takes the iterators' states now, and writes them while training goes on."""
        states = {shard: json.dumps(self._iterators[shard].get_state()) for shard in self._saves}

        async def write() -> None:
            folder = Path(await directory.await_creation())
            for shard, state in states.items():
                (folder / _name(shard, self._num_data_shards)).write_text(state)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """For Orbax: restores the iterators' states."""

        async def read() -> None:
            for shard, iterator in self._iterators.items():
                iterator.set_state(json.loads((Path(directory) / _name(shard, self._num_data_shards)).read_text()))

        return read()


def _name(shard: int, num_data_shards: int) -> str:
    return f"shard-{shard}-of-{num_data_shards}.json"
