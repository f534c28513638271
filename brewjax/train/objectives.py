"""Objectives: their type, what several of them share, and supervised fine-tuning.

An objective is a pure function of a decoder, a batch and auxiliary inputs. It returns weighted sums, not means, so that
neither gradient accumulation nor unevenly filled rows change the means.

Axis letters: B rows, T tokens, N tokens of a device, D model dimension, V vocabulary, k words of a teacher
(docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from brewjax.data.records.contrastive import TextLabels
from brewjax.data.records.loader import TokenBatch
from brewjax.model.decoder import Decoder
from brewjax.model.sharding import Sharding
from pallas_kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.linear_loss import HiddenAndHead


class WeightedSum(NamedTuple):
    """A mean in the making: a sum, and the weight to divide it by once all rows are summed."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


class TopK(NamedTuple):
    """A teacher's k likeliest words at each target of a batch, the likeliest first; -1 and -inf at other tokens."""

    ids: Int[Array, "B T k"]
    log_probs: Float[Array, "B T k"]


BASE = "base"  # name of the weights that LoRA adapts, among the auxiliary inputs
AuxInputs = Mapping[str, Decoder | TopK | TextLabels]  # by name: frozen models, or what is known of this batch
# (decoder, batch, aux) -> (loss, metrics by name)
Objective = Callable[[Decoder, TokenBatch, AuxInputs], tuple[WeightedSum, dict[str, WeightedSum]]]


def supervised(decoder: Decoder, batch: TokenBatch, aux: AuxInputs) -> tuple[WeightedSum, dict[str, WeightedSum]]:
    """Weighted cross-entropy of the targets, in nats: the objective of pre-training and of supervised fine-tuning.

    The two differ in their targets only. A mixture of experts adds its load-balancing loss.

    Args:
      decoder: the model in training.
      batch: arrays [rows, T]; tokens without a target, or of weight 0, count for nothing.
      aux: not used.

    Returns:
      The loss, summed with its weight, and no metrics.
    """
    hidden, balance = decoder.forward_with_aux_loss(batch.tokens, batch.positions, batch.token_labels)
    loss = cross_entropy(decoder, hidden, batch)
    return WeightedSum(loss.total + balance * loss.weight, loss.weight), {}


def cross_entropy(decoder: Decoder, hidden: Float[Array, "B T D"], batch: TokenBatch) -> WeightedSum:
    """Cross-entropy of the batch's targets under the decoder's head, summed by the targets' weights."""
    models_and_heads = [(hidden, decoder.lm_head)]
    return token_sums(decoder.sharding, linear_cross_entropy, models_and_heads, batch.targets, batch.weights)


def token_sums(
    sharding: Sharding,
    loss: Callable[..., tuple[Array, Array]],
    models_and_heads: Sequence[HiddenAndHead],
    *fields: Array,
) -> WeightedSum:
    """The two sums that `loss` returns, computed by each device for its tokens and added over all devices.

    Args:
      loss: a fused loss of N tokens: of hidden states [N, D] and head [V, D] of each model, then of the fields.
      models_and_heads: hidden states [B, T, D] and head [V, D] of each model.
      fields: arrays [B, T, ..].
    """
    axes = (*sharding.rules["batch"], *sharding.rules["length"])
    return WeightedSum(
        *_map_over_devices(sharding, lambda *line: jax.lax.psum(loss(*line), axes), models_and_heads, fields, jax.P())
    )


def per_token(
    sharding: Sharding, function: Callable[..., Any], models_and_heads: Sequence[HiddenAndHead], *fields: Array
) -> Any:
    """As `token_sums`, for a function that returns arrays [N, ..]; they are returned as [B, T, ..]."""
    return _map_over_devices(sharding, function, models_and_heads, fields, sharding.spec("batch", "length"))


@jax.named_scope("head")
def _map_over_devices(
    sharding: Sharding,
    function: Callable,
    models_and_heads: Sequence[HiddenAndHead],
    fields: Sequence[Array],
    out: jax.P,
) -> Any:
    def local(hidden: list[Array], heads: list[Array], fields: list[Array]) -> Any:
        shape = hidden[0].shape[:2]
        flat_hidden = [x.reshape(-1, *x.shape[2:]) for x in hidden]
        hidden_and_heads = [x for pair in zip(flat_hidden, heads, strict=True) for x in pair]
        outputs = function(*hidden_and_heads, *(x.reshape(-1, *x.shape[2:]) for x in fields))
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), outputs) if len(out) else outputs

    rows = sharding.spec("batch", "length")
    return jax.shard_map(local, in_specs=(rows, jax.P(None, None), rows), out_specs=out, check_vma=False)(
        [hidden for hidden, _ in models_and_heads],
        [head.astype(hidden.dtype) for hidden, head in models_and_heads],
        [sharding.reshard(x, "batch", "length", *[None] * (x.ndim - 2)) for x in fields],
    )
