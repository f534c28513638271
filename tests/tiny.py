"""A model that compiles in a second, and random prompts for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from brewjax.data.records.loader import TokenBatch
from brewjax.data.text.encode import NO_TARGET, EncodedPrompt, HistoryLayout
from brewjax.model.config import ModelConfig
from brewjax.model.params import Params, abstract_params
from brewjax.model.sharding import MeshConfig
from brewjax.train.lora import LoraConfig
from pallas_kernels.token_labels import PADDING, TokenLabels

MODEL = ModelConfig(name="tiny", vocab_size=64, d_model=16, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=32)
YES, NO = 1, 2  # the label words; other tokens are from 3


def params(model: ModelConfig = MODEL, seed: int = 0) -> Params:
    return _random(abstract_params(model, MeshConfig().build()), seed)


def adapters(lora: LoraConfig, model: ModelConfig = MODEL) -> Params:
    """Random, B too."""
    return _random(lora.abstract(abstract_params(model, MeshConfig().build())), seed=5)


def _random(abstract: Any, seed: int) -> Params:
    """By NumPy: JAX takes seconds to compile its random numbers."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.standard_normal(leaf.shape), leaf.dtype), abstract)


def prompt(
    random: np.random.Generator,
    preamble: int = 6,
    events: Iterable[int] = (4, 3, 5),
    questions: Iterable[int] = (3, 5, 4),
    layout: HistoryLayout = "dense",
) -> EncodedPrompt:
    """Random tokens and answers, in pieces of these lengths."""
    piece = lambda length: random.integers(3, MODEL.vocab_size, length).tolist()  # noqa: E731
    question_tokens = [piece(length) for length in questions]
    answers = random.integers(2, size=len(question_tokens)).tolist()
    return EncodedPrompt([piece(preamble), *map(piece, events)], question_tokens, [YES, NO], answers, layout)


def pack(prompts: Iterable[EncodedPrompt], length: int) -> tuple[np.ndarray, np.ndarray, TokenLabels]:
    """Tokens, positions and token labels [length] of prompts that share a row."""
    parts = [encoded.arrays | {"example": np.full(len(encoded), number)} for number, encoded in enumerate(prompts, 1)]
    row = {}
    for name in ("tokens", "positions", "example", "piece_id", "visibility"):
        row[name] = np.full(length, PADDING, np.int32)
        joined = np.concatenate([part[name] for part in parts])
        row[name][: len(joined)] = joined
    return row["tokens"], row["positions"], TokenLabels(row["example"], row["piece_id"], row["visibility"])


def batch_of(rows: Iterable[Iterable[EncodedPrompt]], length: int) -> TokenBatch:
    """Numpy arrays [rows, length]; the record that each prompt is, counted from 0, is its source."""
    packed, record = [], 0
    for prompts in map(list, rows):
        tokens, positions, token_labels = pack(prompts, length)
        arrays = [encoded.arrays | {"source": np.full(len(encoded), record + n)} for n, encoded in enumerate(prompts)]
        record += len(prompts)
        fields = {}
        for name, nothing in {"targets": NO_TARGET, "weights": 0, "preference": 0, "source": -1}.items():
            joined = np.concatenate([part[name] for part in arrays])
            fields[name] = np.pad(joined, (0, length - len(joined)), constant_values=nothing)
        packed.append(TokenBatch(tokens, positions, token_labels, **fields))
    return jax.tree.map(lambda *of_rows: np.stack(of_rows), *packed)
