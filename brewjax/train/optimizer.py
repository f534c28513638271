"""The optimiser: gradient clipping, then AdamW or Muon with a warm-up and a schedule of the learning rate."""

from __future__ import annotations

from typing import Literal

import jax
import optax
import pydantic

from brewjax.config import Config
from brewjax.model.weights import MATRIX_AXES

UPDATE_RMS = 0.2  # of Muon's updates, in learning rates: that of AdamW's, see Liu et al., section 2.2


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019), or Muon."""

    method: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the momentum of the layers' matrices (Jordan et al. 2024), with updates of the size of
    AdamW's, so that its learning rates fit (Liu et al. 2025, arXiv 2502.16982); all other weights, adapters among them,
    get AdamW with Nesterov momentum. It learns more from a step. Devices share the layers where their number divides
    that of the layers; otherwise, and of all other weights, each device holds the whole state and computes all of it,
    so it is for models that fit a device."""
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
            optax.clip_by_global_norm(self.clip), self._muon(steps) if self.method == "muon" else self._adamw(steps)
        )

    def _adamw(self, steps: int) -> optax.GradientTransformation:
        return optax.adamw(self.rate(steps), self.b1, self.b2, weight_decay=self.weight_decay, mask=_matrices)

    def _muon(self, steps: int) -> optax.GradientTransformation:
        muon = optax.contrib.muon(
            self.rate(steps),
            weight_decay=self.weight_decay,
            weight_decay_mask=_matrices,
            adam_b1=self.b1,
            adam_b2=self.b2,
            adam_weight_decay=self.weight_decay,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=UPDATE_RMS,
        )

        def update(grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> tuple:
            updates, state = muon.update(_split_layers(grads), state, _split_layers(params))
            return _as_laid_out(updates, grads), state

        return optax.GradientTransformation(lambda params: muon.init(_split_layers(params)), update)


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "_bias")), params)


def _muon_axes(params: optax.Params) -> optax.Params:
    """For each matrix of the layers, the axes that are summed over and the output axes; None for what AdamW updates."""

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = path[-1].key
        if name not in MATRIX_AXES:
            return None
        inputs, outputs = MATRIX_AXES[name]
        first = leaf.ndim - inputs - outputs
        middle = first + inputs
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def _as_laid_out(updates: optax.Updates, grads: optax.Updates) -> optax.Updates:
    """The updates on the devices that `grads` are on."""
    if jax.sharding.get_abstract_mesh().empty:
        return updates
    return jax.tree.map(
        lambda update, grad: jax.sharding.reshard(update, jax.typeof(grad).sharding.spec), updates, grads
    )


def _split_layers(tree: optax.Params) -> optax.Params:
    """Matrices whole, those of some layers on each device of the mesh in context, if there is one; optax orthogonalises
    no shards of a matrix. Where the devices do not divide the layers, and for other weights: every array whole on every
    device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def split(path: tuple, leaf: jax.Array) -> jax.Array:
        layers = path[-1].key in MATRIX_AXES and leaf.shape[0] % mesh.size == 0
        return jax.sharding.reshard(leaf, jax.P(mesh.axis_names) if layers else jax.P())

    return jax.tree_util.tree_map_with_path(split, tree)
