"""The gradients of a step: summed over micro-batches, or of a loss of all of them together.

Axis letters: A micro-batches (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from brewjax.data.records.contrastive import TextLabels
from brewjax.data.records.loader import TokenBatch
from brewjax.model.decoder import Decoder
from brewjax.model.params import Params
from brewjax.train.contrastive import Contrastive, Embedded
from brewjax.train.objectives import AuxInputs, Objective, TopK, WeightedSum

OBJECTIVE = "objective"  # of the parameters: those of the loss itself
AuxOutputs = Mapping[str, TopK | TextLabels]
BindAll = Callable[[Params, AuxOutputs], tuple[Decoder, AuxInputs]]  # parameters, outputs of frozen models
GradsAndSums = tuple[Params, dict[str, WeightedSum]]


def with_loss_params(params: Params, loss_params: Params) -> Params:
    """A decoder's parameters with those of the loss, if it has any."""
    return params | ({OBJECTIVE: loss_params} if loss_params else {})


def decoder_params(params: Params) -> Params:
    """The decoder's parameters alone."""
    return {name: value for name, value in params.items() if name != OBJECTIVE}


def compute_grads(
    objective: Objective | Contrastive,
    bind_all: BindAll,
    params: Params,
    micro_batches: tuple[TokenBatch, AuxOutputs],
) -> GradsAndSums:
    """Gradients of the summed loss of all micro-batches, and the sums of loss and metrics, which may still have axis A.

    Args:
      objective: the loss.
      bind_all: makes a decoder, and the objective's auxiliary inputs.
      params: of the decoder, or its adapters, with those of the loss.
      micro_batches: batches [A, B, T] and outputs of frozen models for them.
    """
    if isinstance(objective, Contrastive):
        return _contrast(objective, bind_all, params, micro_batches)
    return _accumulate(objective, bind_all, params, micro_batches)


def _accumulate(
    objective: Objective, bind_all: BindAll, params: Params, micro_batches: tuple[TokenBatch, AuxOutputs]
) -> GradsAndSums:
    """Summed gradients and sums of an objective that is a sum over micro-batches."""

    def loss_sum(params: Params, batch: TokenBatch, aux_outputs: AuxOutputs) -> tuple[Array, dict[str, WeightedSum]]:
        decoder, aux = bind_all(params, aux_outputs)
        loss, metrics = objective(decoder, batch, aux)
        return loss.total, {"loss": loss} | metrics

    def add(sums: Params, inputs: tuple[TokenBatch, AuxOutputs]) -> GradsAndSums:
        with jax.named_scope("forward_backward"):
            (_, means), grads = jax.value_and_grad(loss_sum, has_aux=True)(params, *inputs)
        return jax.tree.map(jnp.add, sums, grads), means

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    return jax.lax.scan(add, zeros, micro_batches)


def _contrast(
    objective: Contrastive, bind_all: BindAll, params: Params, micro_batches: tuple[TokenBatch, AuxOutputs]
) -> GradsAndSums:
    """As `_accumulate`, for an objective of all micro-batches together."""

    def embed(params: Params, inputs: tuple[TokenBatch, AuxOutputs]) -> tuple[Embedded, TextLabels]:
        decoder, aux = bind_all(params, inputs[1])
        return objective.embed(decoder, inputs[0], aux)

    def loss(params: Params, embedded: Embedded, labels: TextLabels) -> tuple[Array, dict[str, WeightedSum]]:
        return objective.loss(params[OBJECTIVE], embedded, labels)

    return cached_grads(embed, loss, params, micro_batches)


def cached_grads(
    embed: Callable[[Params, Any], tuple[Any, Any]],
    loss: Callable[[Params, Any, Any], tuple[Array, dict[str, WeightedSum]]],
    params: Params,
    micro_batches: Any,
) -> tuple[Params, dict[str, WeightedSum]]:
    """The gradient of a loss of all micro-batches together, in the memory of one (GradCache, Gao et al. 2021, arXiv
    2101.06983).

    All micro-batches are embedded; the loss's gradient is taken once, with respect to the vectors; then each
    micro-batch is embedded again and its share is carried on to the parameters.

    Args:
      embed: (params, micro-batch) -> (float arrays, labels).
      loss: (params, float arrays of all micro-batches, labels of all) -> (loss, metrics).
      params: the parameters.
      micro_batches: a pytree of arrays [A, ..].

    Returns:
      The gradient with respect to `params`, and the metrics.
    """
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    if len(jax.tree.leaves(micro_batches)[0]) == 1:  # nothing to save: one pass less

        def whole(params: Params) -> tuple[Array, dict[str, WeightedSum]]:
            outputs = embed(params, jax.tree.map(lambda x: x[0], micro_batches))
            return loss(params, *jax.tree.map(lambda x: x[None], outputs))

        return jax.grad(whole, has_aux=True)(params)

    with jax.named_scope("embed"):
        _, (arrays, labels) = jax.lax.scan(lambda _, batch: (None, embed(params, batch)), None, micro_batches)
    (grads, cotangents), metrics = gradient(params, arrays, labels)

    def replay(sums: Params, inputs: tuple[Any, Any]) -> tuple[Params, None]:
        batch, cotangent = inputs
        with jax.named_scope("forward_backward"):
            _, pull_back, _ = jax.vjp(lambda params: embed(params, batch), params, has_aux=True)
            (share,) = pull_back(cotangent)
        return jax.tree.map(jnp.add, sums, share), None

    grads, _ = jax.lax.scan(replay, grads, (micro_batches, cotangents))
    return grads, metrics
