"""`Encoder`: members and items as unit vectors, by one decoder over packed rows of texts.

Axis letters: B rows, T tokens, N texts of a row, D model dimension (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from brewjax import distributed
from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.config import ConfigError
from brewjax.data.prompts.sides import SideConfig, Sides
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import FactSource
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.fingerprint import hash_folder
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL, Params, bind
from brewjax.model.pooling import Pooling, pool
from brewjax.model.sharding import BATCH_AXES, MeshConfig, data_parallel_size
from pallas_kernels.token_labels import ALL, PADDING, TokenLabels

ENCODER = "encoder.yaml"
SHORT_ROW, ROW_TOKENS, BATCH_TOKENS = 64, 1024, 8192  # of the shortest packed row, of a long one, and of a call
MIN_TOKENS = 8  # a row has a vector for each so many of its tokens; more texts go to the next row


class EncoderConfig(SideConfig):
    """How an encoder makes a vector of a text."""

    pooling: Pooling = "mean"
    """How a text's tokens become a vector: their mean, or the last one."""
    dimensions: tuple[pydantic.PositiveInt, ...] = ()
    """Sizes besides d_model that vectors may be truncated to, because training taught them."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model that embeds members and items.

    Attributes:
      bundle: the decoder, its tokenizer and how prompts are rendered; of one surface.
      config: the task, instructions and pooling.
    """

    bundle: Bundle
    config: EncoderConfig

    def save(self, folder: Path) -> None:
        """Writes a model folder, with `encoder.yaml` in it.

        Args:
          folder: is made if it is not there.
        """
        if distributed.is_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            self.config.save(folder / ENCODER)
        self.bundle.save(folder)

    @classmethod
    def load(cls, folder: str | Path, mesh: MeshConfig | None = None) -> Encoder:
        """Reads an encoder's folder.

        Args:
          folder: a model folder with `encoder.yaml`, as a stage `do: contrastive` writes it.
          mesh: the devices to place the parameters on; by default all devices, split by batch only.

        Returns:
          The encoder.

        Raises:
          ConfigError: the folder is no encoder's, or a file in it is wrong.
        """
        bundle = Bundle.load(folder, mesh)
        if not (Path(folder) / ENCODER).is_file():
            raise ConfigError(f"{folder}: no {ENCODER} there: a model, but not trained by a stage `do: contrastive`")
        return cls(bundle, EncoderConfig.load(Path(folder) / ENCODER))

    @classmethod
    def version(cls, folder: str | Path) -> str:
        """Names the encoder in a folder, for its vectors to carry.

        Args:
          folder: of the encoder.

        Returns:
          `NAME@HASH`, with a hash of all that the folder holds.
        """
        return f"{ModelConfig.load(Path(folder) / MODEL).name}@{hash_folder(Path(folder))[:8]}"

    @property
    def surface(self) -> Surface:
        """The surface whose members and items it embeds."""
        return self.bundle.surface()

    @property
    def task(self) -> Task:
        """The task whose history members' texts hold."""
        return self.config.choose({task.name: task for task in self.surface.tasks})

    def sides(self, dataset: Dataset, facts: FactSource | None = None) -> Sides:
        """Makes a writer of the texts of members and items as in training, with the scales of training.

        Args:
          dataset: the tables.
          facts: those that a request brings; by default they are computed from the dataset's events.

        Returns:
          The writer.
        """
        verbalizer = self.bundle.request_verbalizer(self.surface, dataset, facts)
        return Sides(verbalizer, self.task, self.bundle.prompts, self.config)

    def embed_members(
        self, dataset: Dataset, examples: Sequence[RankingExample], dimensions: int | None = None
    ) -> Float[np.ndarray, "N D"]:
        """Computes vectors of members.

        Args:
          dataset: the tables.
          examples: each a member as of its cutoff time.
          dimensions: what vectors are truncated to; by default d_model.

        Returns:
          float32 vectors of length 1, one for each example.

        Raises:
          ValueError: a profile does not fit, or vectors have no such size.
        """
        sides = self.sides(dataset)
        return self.embed([sides.member(example) for example in examples], dimensions)

    def embed_items(
        self, dataset: Dataset, rows: np.ndarray, time: int, dimensions: int | None = None
    ) -> Float[np.ndarray, "N D"]:
        """Computes vectors of items. Texts that are too long are truncated, and counted on stderr.

        Args:
          dataset: the tables.
          rows: int [items], rows of the items.
          time: as of which facts are computed, in microseconds since 1970.
          dimensions: what vectors are truncated to; by default d_model.

        Returns:
          float32 vectors of length 1, one for each item.

        Raises:
          ValueError: vectors have no such size.
        """
        sides = self.sides(dataset)
        texts = sides.items(rows, time)
        sides.overlong.print()
        return self.embed(texts, dimensions)

    def check_dimensions(self, dimensions: int | None) -> int:
        """Checks that training taught vectors of a size.

        Args:
          dimensions: the size; None for d_model.

        Returns:
          The size.

        Raises:
          ValueError: vectors have no such size; the message holds those that they have.
        """
        sizes = sorted({*self.config.dimensions, self.bundle.model.d_model})
        if dimensions is None:
            return self.bundle.model.d_model
        if dimensions not in sizes:
            raise ValueError(f"dimensions {dimensions}: this encoder's vectors have {', '.join(map(str, sizes))}")
        return dimensions

    def embed(self, texts: Sequence[Sequence[int]], dimensions: int | None = None) -> Float[np.ndarray, "N D"]:
        """Computes vectors of texts, each the same whatever the others are, up to rounding.

        Args:
          texts: token ids.
          dimensions: what vectors are truncated to; by default d_model.

        Returns:
          float32 vectors of length 1, one for each text.

        Raises:
          ValueError: a text is empty or longer than the model reads, or vectors have no such size.
        """
        size = self.check_dimensions(dimensions)
        for number, text in enumerate(texts, 1):
            if not len(text):
                raise ValueError(f"text {number} is empty")
            self.bundle.model.check_length(len(text), f"text {number}")
        pooled = np.zeros((len(texts), self.bundle.model.d_model), np.float32)
        if not len(texts):
            return pooled[:, :size]
        shares = data_parallel_size(self._mesh)
        lengths = np.array([len(text) for text in texts])
        row_tokens = max(_round_up(lengths.max()), min(ROW_TOKENS, _round_up(lengths.sum())), SHORT_ROW)
        packed = _pack(lengths, row_tokens, row_tokens // MIN_TOKENS)
        rows = min(_round_up(-(-len(packed) // shares)), max(1, BATCH_TOKENS // row_tokens // shares)) * shares
        pending = []  # the next call is dispatched before the last one's vectors are fetched
        for start in range(0, len(packed), rows):
            part = packed[start : start + rows]
            batch = _Rows.of([[texts[n] for n in numbers] for numbers in part], rows, row_tokens)
            pending.append((part, self._embed(batch)))
            if len(pending) > 1:
                _collect(pooled, *pending.pop(0))
        for call in pending:
            _collect(pooled, *call)
        return truncate(pooled, size)

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return self.bundle.mesh.build()

    def _embed(self, rows: _Rows) -> Float[Array, "B N D"]:
        with jax.set_mesh(self._mesh):
            placed = jax.device_put(rows, NamedSharding(self._mesh, jax.P(BATCH_AXES, None)))
            num_texts = rows.tokens.shape[1] // MIN_TOKENS
            return _embed_rows(self.bundle.model, self.config.pooling, num_texts, self.bundle.params, placed)


def truncate(vectors: Float[np.ndarray, "N D"], size: int) -> Float[np.ndarray, "N d"]:
    """The first `size` numbers of each of `vectors`, scaled to length 1; a vector of 0 stays 0."""
    beginnings = vectors[:, :size]
    lengths = np.linalg.norm(beginnings, axis=1, keepdims=True)
    return beginnings / np.where(lengths > 0, lengths, 1)


class _Rows(NamedTuple):
    """Packed texts, each an example: int32 [B, T]."""

    tokens: np.ndarray
    positions: np.ndarray
    example_id: np.ndarray

    @classmethod
    def of(cls, packed: Sequence[Sequence[Sequence[int]]], rows: int, row_tokens: int) -> _Rows:
        arrays = cls(*(np.full((rows, row_tokens), PADDING, np.int32) for _ in cls._fields))
        for row, texts in enumerate(packed):
            start = 0
            for number, text in enumerate(texts, 1):
                where = (row, slice(start, start + len(text)))
                arrays.tokens[where], arrays.positions[where] = text, np.arange(len(text))
                arrays.example_id[where] = number
                start += len(text)
        return arrays


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_rows(
    model: ModelConfig, pooling: Pooling, num_texts: int, params: Params, rows: _Rows
) -> Float[Array, "B N D"]:
    decoder = bind(model, params)
    example_id = jnp.asarray(rows.example_id)
    token_labels = TokenLabels(example_id, jnp.zeros_like(example_id), jnp.full_like(example_id, ALL))
    hidden = decoder(jnp.asarray(rows.tokens), jnp.asarray(rows.positions), token_labels)
    return pool(decoder, hidden, token_labels, num_texts, pooling)


def _collect(pooled: np.ndarray, packed: Sequence[Sequence[int]], embedded: Array) -> None:
    of_rows = np.asarray(embedded)
    for numbers, row in zip(packed, of_rows, strict=False):
        pooled[numbers] = row[: len(numbers)]


def _pack(lengths: np.ndarray, row_tokens: int, max_texts: int) -> list[list[int]]:
    """The texts of each row, by number: the longest first, each row filled while the next one fits."""
    rows: list[list[int]] = []
    room = 0
    for number in np.argsort(-lengths, kind="stable").tolist():
        if not rows or lengths[number] > room or len(rows[-1]) == max_texts:
            rows.append([])
            room = row_tokens
        rows[-1].append(number)
        room -= int(lengths[number])
    return rows


def _round_up(count: int) -> int:
    """The next power of two, so that few programs are compiled."""
    return 1 << max(int(count) - 1, 0).bit_length()
