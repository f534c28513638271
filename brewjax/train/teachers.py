"""Frozen models for an objective: inside the step, on a mesh of their own, or as a cache of their outputs.

Axis letters: T tokens of a row, k words of a teacher, n tokens of a record (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from rich.progress import Progress

from brewjax import distributed
from brewjax.data.records.contrastive import ItemTable
from brewjax.data.records.loader import NO_TARGET, TokenBatch
from brewjax.data.records.shards import RECORDS, TABLE, Shards, read_counts, shard_files, shard_folders
from brewjax.data.records.soft_labels import SoftLabelTable
from brewjax.model.config import ModelConfig
from brewjax.model.params import Params, abstract_params, bind
from brewjax.model.sharding import MeshConfig, data_parallel_size
from brewjax.train.batches import BATCH_SPEC, ShardedBatches
from brewjax.train.objectives import TopK, per_token
from pallas_kernels.distillation import linear_top_k

CARD, BEGUN = "cache.json", "begun.json"  # the description of a complete cache, and of an incomplete one
PART_WORDS = 1 << 22  # words in a part of the cache, about


class CacheError(ValueError):
    """A cache of a teacher's outputs does not belong to this data, this teacher or these settings."""


class FrozenModel(NamedTuple):
    """A model that is not trained, and runs inside the training step."""

    model: ModelConfig
    params: Params

    def on(self, mesh: Mesh) -> Params:
        """Its parameters, laid out on `mesh`."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(self.model, mesh))
        return jax.device_put(self.params, shardings)


class TeacherOnMesh:
    """A teacher on another mesh over the student's devices; its outputs are moved to the student's mesh."""

    def __init__(self, teacher: FrozenModel, mesh: Mesh, k: int, temperature: float):
        self._mesh, self._params = mesh, teacher.on(mesh)
        self._answer = jax.jit(functools.partial(_compute_top_k, teacher.model, k, temperature))

    def __call__(self, placed: TokenBatch) -> TopK:
        """The teacher's words [micro-batch, row, T, k], on its mesh, for a batch [micro-batch, row, T] on any mesh."""
        _check_rows(placed.tokens.shape[1], self._mesh)
        on_teacher_mesh = jax.device_put(placed, NamedSharding(self._mesh, BATCH_SPEC))
        with jax.set_mesh(self._mesh):
            return self._answer(self._params, on_teacher_mesh)


def _check_rows(rows: int, mesh: Mesh) -> None:
    if rows % data_parallel_size(mesh):
        raise ValueError(
            f"{rows} rows at a time do not divide over the {data_parallel_size(mesh)} devices along data, fsdp and "
            "expert of the teacher's mesh"
        )


def _compute_top_k(model: ModelConfig, k: int, temperature: float, params: Params, micro_batches: TokenBatch) -> TopK:
    decoder = bind(model, params)

    def answer_batch(batch: TokenBatch) -> TopK:
        hidden = decoder(batch.tokens, batch.positions, batch.token_labels)
        ids, log_probs = per_token(
            decoder.sharding,
            functools.partial(linear_top_k, k=k, temperature=temperature),
            [(hidden, decoder.lm_head)],
            batch.targets != NO_TARGET,
        )
        return TopK(ids, log_probs)

    return jax.lax.map(answer_batch, micro_batches)


class TeacherCache:
    """A teacher's outputs, written by `write_cache`: for each record of the shards, in the order of its targets.

    Args:
      folder: of the cache.

    Raises:
      CacheError: if there is no complete cache.
    """

    def __init__(self, folder: Path):
        if not (folder / CARD).exists():
            raise CacheError(f"{folder}: no complete cache of a teacher's outputs there")
        self.folder, self.card = folder, json.loads((folder / CARD).read_text())
        self._parts = [_Part.open(path) for path in _part_folders(folder)]
        self._place = {record: (part, n) for part in self._parts for n, record in enumerate(part.records.tolist())}

    def look_up(self, batch: TokenBatch) -> TopK:
        """Looks up a teacher's outputs.

        Args:
          batch: numpy arrays [rows, T], of the shards that the cache is of.

        Returns:
          int32 words and float32 log-probabilities, [rows, T, k] each; -1 and -inf where a token has no target.

        Raises:
          CacheError: if the batch has a record, or targets of a record, that the cache lacks.
        """
        shape = (*batch.tokens.shape, self.card["k"])
        ids, log_probs = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
        for (row, record), positions in _targets(batch):
            if record not in self._place:
                raise CacheError(f"{self.folder}: has no outputs for record {record} of these shards")
            part, n = self._place[record]
            answers = slice(part.offsets[n], part.offsets[n + 1])
            if len(positions) != answers.stop - answers.start:
                raise CacheError(
                    f"{self.folder}: record {record} has {len(positions)} targets, and the cache has outputs for "
                    f"{answers.stop - answers.start}"
                )
            ids[row, positions], log_probs[row, positions] = part.ids[answers], part.log_probs[answers]
        return TopK(ids, log_probs)  # type: ignore[arg-type]  # numpy until it is placed


class SoftLabels:
    """Another ranker's probabilities at the targets of shards, as a teacher's outputs (`write_shards` wrote them)."""

    def __init__(self, shards: Shards):
        paths = [path for folder in shard_folders(shards) for path in shard_files(folder, TABLE)]
        self._offsets, self._ids, self._log_probs = SoftLabelTable.load(paths)

    def look_up(self, batch: TokenBatch) -> TopK:
        """As `TeacherCache.look_up`."""
        shape = (*batch.tokens.shape, self._ids.shape[1])
        ids, log_probs = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
        for (row, record), positions in _targets(batch):
            answers = np.arange(self._offsets[record], self._offsets[record + 1])
            answers = np.tile(answers, len(positions) // len(answers))  # of small data, a row holds a record twice
            ids[row, positions], log_probs[row, positions] = self._ids[answers], self._log_probs[answers]
        return TopK(ids, log_probs)  # type: ignore[arg-type]  # numpy until it is placed


# What gives an objective's auxiliary inputs.
AuxModel = FrozenModel | TeacherOnMesh | TeacherCache | SoftLabels | ItemTable


class _Part(NamedTuple):
    """A part of a cache: record numbers, each record's first row (and the last one's end), and words [n, k]."""

    records: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> _Part:
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls._fields))

    @classmethod
    def of(cls, answers: dict[int, TopK]) -> _Part:
        counts = [len(record_answers.ids) for record_answers in answers.values()]
        ids, log_probs = (np.concatenate(arrays) for arrays in zip(*answers.values(), strict=True))
        return cls(np.array(list(answers), np.int64), np.cumsum([0, *counts]), ids, log_probs)

    def write(self, folder: Path) -> None:
        """Writes the part to a temporary folder and renames it, so that it is complete or absent."""
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, array in self._asdict().items():
            np.save(temporary / f"{name}.npy", array)
        temporary.rename(folder)


def _part_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("part-*") if not path.suffix)


def _targets(batch: TokenBatch) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """(row, record) and the indices of that record's targets in the row, in order."""
    for row in range(len(batch.tokens)):
        positions = np.flatnonzero(batch.targets[row] != NO_TARGET)
        records = batch.source[row, positions]
        for record in np.unique(records):
            yield (row, int(record)), positions[records == record]


def write_cache(
    folder: Path,
    shards: Shards,
    teacher: FrozenModel,
    mesh: MeshConfig,
    rows: int,
    seq_len: int,
    k: int,
    temperature: float = 1.0,
) -> None:
    """Writes the teacher's k likeliest words at every target of the shards, unless the cache is complete.

    If a run is killed, the next one continues its cache.

    Args:
      folder: of the cache.
      shards: folders of records.
      teacher: the model.
      mesh: its devices.
      rows, seq_len: shape of the teacher's batches, over all devices of the mesh.
      k: words of each target.
      temperature: divides the logits.

    Raises:
      CacheError: if `folder` has outputs for other data, of another teacher, or with other settings.
      ValueError: if the rows do not divide over the mesh.
    """
    devices = mesh.build()
    _check_rows(rows, devices)
    card = {"teacher": fingerprint(teacher, devices), "k": k, "temperature": temperature}
    done = distributed.run_on_process_zero(functools.partial(_begin, folder, shards, card))
    if done is None:
        return
    seen, answer = set(done), TeacherOnMesh(teacher, devices, k, temperature)
    counts = {shard_folder: read_counts(shard_folder) for shard_folder in shard_folders(shards)}
    records = sum(folder_counts["records"] for folder_counts in counts.values())
    # Each folder weighted by its size, whatever its share in training: the first epochs of all end together.
    batches = ShardedBatches(
        {shard_folder: folder_counts["tokens"] for shard_folder, folder_counts in counts.items()},
        devices,
        1,
        rows,
        seq_len,
        1,
        seed=0,
    )
    waiting: dict[int, TopK] = {}
    with Progress(disable=not distributed.is_process_zero()) as progress:
        bar = progress.add_task("teacher", total=records, completed=len(seen))
        while len(seen) < records:
            _, placed, _ = next(batches)
            batch = _on_host(placed)
            new_records = {
                record: (row, np.flatnonzero((batch.source[row] == record) & (batch.targets[row] != NO_TARGET)))
                for row in range(rows)
                for record in np.unique(batch.source[row]).tolist()
                if record >= 0 and record not in seen
            }
            if new_records:
                outputs = _on_host(answer(placed))
                waiting |= {
                    record: TopK(outputs.ids[row, positions], outputs.log_probs[row, positions])
                    for record, (row, positions) in new_records.items()
                }
                seen |= set(new_records)
            if distributed.is_process_zero() and (
                len(seen) == records or sum(answers.ids.size for answers in waiting.values()) >= PART_WORDS
            ):
                _Part.of(waiting).write(folder / f"part-{len(_part_folders(folder)):05d}")
                waiting = {}
            progress.update(bar, completed=len(seen))
    distributed.run_on_process_zero(lambda: (folder / BEGUN).replace(folder / CARD) and None)


def _begin(folder: Path, shards: Shards, card: dict) -> list[int] | None:
    """The records that an incomplete cache has; None if the cache is complete. Creates the folder if there is none."""
    card = {"shards": hash_shards(shards), **card}
    for path in (folder / CARD, folder / BEGUN):
        if not path.exists():
            continue
        stored = json.loads(path.read_text())
        if mismatches := [
            f"{name} {stored[name]}, not {value}" for name, value in card.items() if stored[name] != value
        ]:
            raise CacheError(
                f"{folder}: has a teacher's outputs for {'; '.join(mismatches)}. Delete it, or name another folder"
            )
        return (
            None
            if path.name == CARD
            else [n for part in _part_folders(folder) for n in _Part.open(part).records.tolist()]
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "begun.tmp"
    temporary.write_text(json.dumps(card))
    temporary.replace(folder / BEGUN)
    return []


def _on_host(placed: Any) -> Any:
    """A placed batch, or outputs for it, as numpy arrays without the micro-batch axis; the same in every process."""
    if jax.process_count() > 1:
        placed = multihost_utils.process_allgather(placed, tiled=True)
    return jax.tree.map(lambda x: x[0], jax.device_get(placed))


def hash_shards(shards: Shards) -> str:
    """SHA-256 of the shards' files, in the order in which their records are numbered."""
    digest = hashlib.sha256()
    for folder in shard_folders(shards):
        for path in shard_files(folder, RECORDS):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fingerprint(model: FrozenModel, mesh: Mesh) -> str:
    """SHA-256 of a model's config and sums over every bit of its weights; it does not depend on the mesh."""
    with jax.set_mesh(mesh):
        sums = jax.device_get(jax.jit(lambda params: jax.tree.map(_bit_sums, params))(model.on(mesh)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(sums)
    digest = hashlib.sha256(model.model.model_dump_json().encode())
    for path, leaf in leaves:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf}".encode())
    return digest.hexdigest()


def _bit_sums(x: jax.Array) -> jax.Array:
    """Two sums of the bits, weighted by index, modulo 2^32. The weights are odd: changing any number changes both."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
        axis_index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
        index = index * jnp.uint32(size) + axis_index
    mixed = (index ^ (index >> 16)) * jnp.uint32(0x45D9F3B)
    factors = 2 * index + 1, 2 * (mixed ^ (mixed >> 16)) + 1
    return jnp.stack([jnp.sum(bits * factor, dtype=jnp.uint32) for factor in factors])
