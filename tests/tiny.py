"""A model that compiles in a second, and random prompts for it."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from brewjax.data.tokens import EncodedPrompt, HistoryLayout
from brewjax.model.config import ModelConfig
from brewjax.model.params import Params, abstract_params
from brewjax.model.sharding import MeshConfig
from pallas_kernels.segments import PADDING, Segments

MODEL = ModelConfig(name="tiny", vocab_size=64, d_model=16, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=32)
YES, NO = 1, 2  # the label words; other tokens are from 3


def params(model: ModelConfig = MODEL, seed: int = 0) -> Params:
    """Random parameters by NumPy: JAX takes seconds to compile their random numbers."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * random.standard_normal(leaf.shape), leaf.dtype),
        abstract_params(model, MeshConfig().build()),
    )


def prompt(
    random: np.random.Generator,
    center: int = 6,
    events: Iterable[int] = (4, 3, 5),
    questions: Iterable[int] = (3, 5, 4),
    layout: HistoryLayout = "dense",
) -> EncodedPrompt:
    """Random tokens and answers, in pieces of these lengths."""
    piece = lambda length: random.integers(3, MODEL.vocab_size, length).tolist()  # noqa: E731
    asked = [piece(length) for length in questions]
    answers = random.integers(2, size=len(asked)).tolist()
    return EncodedPrompt([piece(center), *map(piece, events)], asked, [YES, NO], answers, layout)


def pack(prompts: Iterable[EncodedPrompt], length: int) -> tuple[np.ndarray, np.ndarray, Segments]:
    """Tokens, positions and segments [length] of prompts that share a row."""
    parts = [one.arrays | {"example": np.full(len(one), number)} for number, one in enumerate(prompts, 1)]
    row = {}
    for name in ("tokens", "positions", "example", "segment", "reach"):
        row[name] = np.full(length, PADDING, np.int32)
        joined = np.concatenate([part[name] for part in parts])
        row[name][: len(joined)] = joined
    return row["tokens"], row["positions"], Segments(row["example"], row["segment"], row["reach"])
