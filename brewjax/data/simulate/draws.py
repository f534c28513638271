"""Random numbers that depend on a seed, a purpose and ids alone, and not on what was drawn before."""

from __future__ import annotations

import zlib

import numpy as np
from scipy.special import ndtri

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """A counter-based generator (Salmon et al., SC 2011), with splitmix64 (Steele et al., OOPSLA 2014) as its function:
    member 17 gets the same numbers alone or among a million, in any block and any order.

    Every method takes a purpose, which keeps draws apart, and ids: integer arrays that broadcast against each other.
    """

    def __init__(self, seed: int):
        self._seed = seed

    def bits(self, purpose: str, *ids: np.ndarray | int) -> np.ndarray:
        """uint64: 64 random bits."""
        purpose_bits = np.uint64(zlib.crc32(purpose.encode())) << np.uint64(32)
        state = np.asarray(np.uint64(self._seed % 2**64) ^ purpose_bits)
        with np.errstate(over="ignore"):
            for part in (0, *ids):
                state = (state ^ np.asarray(part).astype(np.uint64)) + GOLDEN
                state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                state = state ^ (state >> np.uint64(31))
        return state

    def uniform(self, purpose: str, *ids: np.ndarray | int) -> np.ndarray:
        """float64, above 0 and below 1."""
        return ((self.bits(purpose, *ids) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, purpose: str, *ids: np.ndarray | int) -> np.ndarray:
        """float64, with mean 0 and deviation 1."""
        return ndtri(self.uniform(purpose, *ids))

    def integer(self, purpose: str, below: np.ndarray | int, *ids: np.ndarray | int) -> np.ndarray:
        """int64, from 0 and below a bound."""
        return (self.uniform(purpose, *ids) * below).astype(np.int64)

    def choice(self, purpose: str, shares: np.ndarray, *ids: np.ndarray | int) -> np.ndarray:
        """int64: an index of `shares`, each with its share; they sum to 1."""
        ends = np.cumsum(shares)
        return np.searchsorted(ends[:-1], self.uniform(purpose, *ids), side="right")
