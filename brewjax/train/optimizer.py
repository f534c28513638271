"""The optimiser: gradient clipping, then AdamW with a warm-up and a schedule of the learning rate."""

from __future__ import annotations

from typing import Literal

import jax
import optax
import pydantic

from brewjax.config import Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019)."""

    learning_rate: float = pydantic.Field(default=1e-3, gt=0, le=1)
    """Learning rate after the warm-up: about how far a step moves each weight."""
    warmup: int = pydantic.Field(default=100, ge=0)
    """Steps in which the rate rises from 0 to `learning_rate`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Rate from the warm-up to the last step: a cosine or a straight line down to a tenth, or constant."""
    weight_decay: float = pydantic.Field(default=0.1, ge=0, le=10)
    """Decoupled weight decay, on matrices only, not on norms and biases."""
    b1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    b2: float = pydantic.Field(default=0.95, ge=0, lt=1)
    """Decay of Adam's second moment."""
    clip: float = pydantic.Field(default=1.0, gt=0)
    """Largest global norm of the gradient; a larger gradient is scaled down to it."""

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate by step, of a run of `steps`."""
        rest = max(1, steps - self.warmup)
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest, alpha=0.1),
            "linear": optax.linear_schedule(self.learning_rate, self.learning_rate / 10, rest),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        return optax.join_schedules([optax.linear_schedule(0, self.learning_rate, self.warmup), after], [self.warmup])

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `steps`."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.rate(steps), self.b1, self.b2, weight_decay=self.weight_decay, mask=_matrices),
        )


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "_bias")), params)
