"""The optimiser: AdamW behind gradient clipping, on a warmed-up schedule."""

from __future__ import annotations

from typing import Literal

import jax
import optax
import pydantic

from brewjax.config import Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019)."""

    learning_rate: float = pydantic.Field(default=1e-3, gt=0, le=1)
    """About how far a step moves each weight."""
    warmup: int = pydantic.Field(default=100, ge=0)
    """Steps over which the rate rises from zero to `learning_rate`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What happens then, until the last step: a cosine or a straight line down to a tenth, or nothing."""
    weight_decay: float = pydantic.Field(default=0.1, ge=0, le=10)
    """On matrices only, not on norms and biases."""
    b1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    b2: float = pydantic.Field(default=0.95, ge=0, lt=1)
    clip: float = pydantic.Field(default=1.0, gt=0)
    """The largest global norm of the gradient."""

    def rate(self, steps: int) -> optax.Schedule:
        """Learning rate by step."""
        rest = max(1, steps - self.warmup)
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest, alpha=0.1),
            "linear": optax.linear_schedule(self.learning_rate, self.learning_rate / 10, rest),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        return optax.join_schedules([optax.linear_schedule(0, self.learning_rate, self.warmup), after], [self.warmup])

    def build(self, steps: int) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.rate(steps), self.b1, self.b2, weight_decay=self.weight_decay, mask=_matrices),
        )


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "_bias")), params)
