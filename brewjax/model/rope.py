"""Rotary position embedding (Su et al. 2021), and its scalings for longer inputs than a model was first trained on.

Axis letters: B rows, T tokens, H heads, E size of a head (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Float, Int

from brewjax.config import Config

if TYPE_CHECKING:
    from brewjax.model.config import ModelConfig  # it imports this module


class Llama3Scaling(Config):
    """Llama 3.1's scaling: low frequencies are divided by `factor`.

    With t = original_length / wavelength, the frequency is divided by `factor` if t < low, kept if t > high, and
    interpolated linearly in t in between.
    """

    type: Literal["llama3"] = "llama3"
    """The kind of scaling."""
    factor: float = pydantic.Field(ge=1)
    """Divisor of low frequencies."""
    low: float = pydantic.Field(default=1.0, gt=0)
    """Turns in `original_length` tokens below which a frequency is divided by `factor`."""
    high: float = pydantic.Field(default=4.0, gt=0)
    """Turns in `original_length` tokens above which a frequency is kept."""
    original_length: int = pydantic.Field(default=8192, gt=0)
    """Tokens of the inputs that the model was first trained on."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        return self

    def multipliers(self, frequencies: Float[np.ndarray, " E/2"], base: float) -> np.ndarray:
        """Factors of the frequencies base ** (-2 i / E)."""
        turns = self.original_length * frequencies / (2 * math.pi)
        unscaled = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return unscaled + (1 - unscaled) / self.factor


class LinearScaling(Config):
    """Divides every frequency by `factor` (position interpolation, Chen et al. 2023, arXiv 2306.15595)."""

    type: Literal["linear"]
    """The kind of scaling."""
    factor: float = pydantic.Field(ge=1)
    """Divisor of every frequency."""

    def multipliers(self, frequencies: Float[np.ndarray, " E/2"], base: float) -> np.ndarray:
        """Factors of the frequencies base ** (-2 i / E)."""
        return np.full_like(frequencies, 1 / self.factor)


class YarnScaling(Config):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): low frequencies are divided by `factor`, and scores are sharpened.

    Between the two limits the divisor is interpolated linearly in the index of the frequency.
    """

    type: Literal["yarn"]
    """The kind of scaling."""
    factor: float = pydantic.Field(ge=1)
    """Divisor of low frequencies."""
    fast: float = pydantic.Field(default=32.0, gt=0)
    """Turns in `original_length` tokens above which a frequency is kept."""
    slow: float = pydantic.Field(default=1.0, gt=0)
    """Turns in `original_length` tokens below which a frequency is divided by `factor`."""
    original_length: int = pydantic.Field(gt=0)
    """Tokens of the inputs that the model was first trained on."""
    attention: float | None = pydantic.Field(default=None, gt=0)
    """Factor on queries and on keys; null: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Rounds the limits of the interpolation to whole indices of frequencies."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> YarnScaling:
        if self.slow >= self.fast:
            raise ValueError(f"slow ({self.slow}) must be less than fast ({self.fast})")
        return self

    @property
    def attention_factor(self) -> float:
        """Factor on queries and on keys."""
        return 0.1 * math.log(self.factor) + 1 if self.attention is None else self.attention

    def multipliers(self, frequencies: Float[np.ndarray, " E/2"], base: float) -> np.ndarray:
        """Factors of the frequencies base ** (-2 i / E)."""
        count = len(frequencies)
        first, last = (  # indices of the frequencies that make so many turns
            count * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * count - 1)
        slowed = np.clip((np.arange(count) - first) / (last - first or 0.001), 0, 1)
        return 1 - slowed + slowed / self.factor


class FactorsScaling(Config):
    """Divides each frequency by its own factor, as GGUF files list them."""

    type: Literal["factors"]
    """The kind of scaling."""
    factors: tuple[Annotated[float, pydantic.Field(gt=0)], ...]
    """Divisor of each of the head_dim / 2 frequencies."""

    def multipliers(self, frequencies: Float[np.ndarray, " E/2"], base: float) -> np.ndarray:
        """Factors of the frequencies base ** (-2 i / E)."""
        return 1 / np.array(self.factors)


def _type(scaling: Any) -> str:
    return scaling.get("type", "llama3") if isinstance(scaling, dict) else getattr(scaling, "type", "")


RopeScaling = Annotated[
    Annotated[Llama3Scaling, pydantic.Tag("llama3")]
    | Annotated[LinearScaling, pydantic.Tag("linear")]
    | Annotated[YarnScaling, pydantic.Tag("yarn")]
    | Annotated[FactorsScaling, pydantic.Tag("factors")],
    pydantic.Discriminator(
        _type, custom_error_type="rope_type", custom_error_message="type must be llama3, linear, yarn or factors"
    ),
]


def rotary(positions: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T 1 E"]:
    """Computes rotations for `rotate` (RoPE, Su et al. 2021, arXiv 2104.09864).

    Args:
      positions: of the tokens in their example, from 0.
      config: `rope_theta`, `rope_scaling` and `head_dim` are read.

    Returns:
      float32 cosines of a head's E / 2 angles, then sines.
    """
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling, attention = config.rope_scaling, 1.0
    if scaling:
        exact = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        frequencies *= scaling.multipliers(exact, config.rope_theta).astype(np.float32)
        attention = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return attention * jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rotate(x: Float[Array, "B T H E"], rotation: Float[Array, "B T 1 E"]) -> Float[Array, "B T H E"]:
    """`x` rotated, in the half-split layout of Hugging Face's Llama (the first half of a head against the second)."""
    cos, sin = jnp.split(rotation, 2, -1)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
