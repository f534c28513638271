"""Hidden states and heads for the kernels' tests, and their log-sums in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

D = 64


def draw(N: int, V: int, hidden_dtype: Any = jnp.float32, head_dtype: Any = jnp.bfloat16, size: float = 3.0):
    """Logits are about as large as `size`."""
    random = np.random.default_rng(0)
    hidden, head = random.standard_normal((N, D)), random.standard_normal((V, D)) * size * D**-0.5
    return np.asarray(hidden, hidden_dtype), np.asarray(head, head_dtype)


def exact(hidden: np.ndarray, head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 logits, and log-sums."""
    logits = np.float64(hidden) @ np.float64(head).T
    top = logits.max(-1)
    return logits, top + np.log(np.exp(logits - top[:, None]).sum(-1))


def ulps(actual: Any, expected: np.ndarray) -> np.ndarray:
    """Errors in units of the last place of float32."""
    return np.abs(np.float64(actual) - expected) / np.spacing(np.abs(expected).astype(np.float32))


def check_parts(log_sum_exp: Callable[[np.ndarray, np.ndarray, int], Any]) -> None:
    """Checks how far off the log-sums of one part, two and three are, beside XLA's of the highest precision."""
    hidden, head = draw(256, 4000)
    _, expected = exact(hidden, head)
    errors = {parts: ulps(log_sum_exp(hidden, head, parts), expected) for parts in (1, 2, 3)}
    highest = jax.nn.logsumexp(jnp.matmul(hidden, head.astype(jnp.float32).T, precision="highest"), -1)
    assert errors[2].mean() < 5
    assert errors[2].max() < 32
    assert errors[3].max() <= ulps(highest, expected).max() + 2
    assert errors[1].mean() > 1000
