"""Contrastive training of a dual encoder: members and items as vectors, near where a member went on to an item.

Axis letters: A micro-batches, B rows, T tokens, N texts of a row, S texts of the batch, D model dimension
(docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pydantic
from jaxtyping import Array, Float

from brewjax.config import Config
from brewjax.data.records.contrastive import MEMBER, MISSING, POSITIVE, TextLabels
from brewjax.data.records.loader import TokenBatch
from brewjax.model.decoder import Decoder
from brewjax.model.params import Params
from brewjax.model.pooling import Pooling, pool, unit
from brewjax.train.objectives import AuxInputs, WeightedSum

ITEMS = "items"  # name of the texts' labels among the auxiliary inputs
MAX_SCALE = 100.0  # of the logits: a smaller temperature is unstable (CLIP, Radford et al. 2021, section 2.5)
MASKED = -1e30


class Embedded(NamedTuple):
    """The texts of a batch, or of a micro-batch (without A).

    Attributes:
      vectors: float32, pooled; neither truncated nor of length 1.
      balance: the experts' load-balancing loss.
    """

    vectors: Float[Array, "A B N D"]
    balance: Float[Array, " A"]


class Contrastive(Config):
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) over all items of a global batch.

    For a member u and an item i that it went on to, the loss is -log(exp(s(u, i)) / sum over items j of exp(s(u, j))),
    where s(u, j) = cos(u, j) / temperature - log q(j), and q(j) is how often records have item j (Yi et al. 2019,
    "Sampling-bias-corrected neural modeling", eq. 3): without it, popular items are pushed away for being in more
    batches. Left out of the sum are other copies of item i, and other items that the same member went on to.

    Where records have the scores of a ranker, the encoder learns its distribution p over the items of a record as well,
    by KL(p || softmax(s)) with s(i) = cos(u, i) / temperature. Each p(i) is in proportion to the ranker's odds of i, as
    if one of them is taken. (A dual encoder learns from a cross-encoder: Ren et al. 2021, arXiv 2110.07367.)

    It is no sum over micro-batches, for every item is a negative of every member: see `cached_grads`.
    """

    pooling: Pooling = "mean"
    """How a text's tokens become a vector: their mean, or the last one."""
    dimensions: tuple[pydantic.PositiveInt, ...] = ()
    """Sizes that vectors may be truncated to, besides d_model; the loss is the mean over all sizes (Matryoshka)."""
    temperature: float = pydantic.Field(default=0.05, ge=1 / MAX_SCALE, le=1)
    """The temperature at the first step; it is learnt, and stays above 0.01."""
    logq_correction: bool = True
    """Subtracts the log of how often records have an item from its logit."""
    ranker_weight: float = pydantic.Field(default=1.0, ge=0)
    """Weight of the divergence from `data.ranker`, if there is one, as a mean over records; that of InfoNCE, as a mean
    over positives, is 1."""

    def init(self) -> Params:
        """Makes the parameters that are the loss's own.

        Returns:
          `logit_scale`, the log of the inverse temperature.
        """
        return {"logit_scale": jnp.array(-math.log(self.temperature), jnp.float32)}

    def check_model(self, d_model: int) -> None:
        """Checks that the model's vectors have every size of `dimensions`.

        Args:
          d_model: of the model.

        Raises:
          ConfigError: a size is not less than `d_model`; names its line.
        """
        for index, size in enumerate(self.dimensions):
            if size >= d_model:
                raise self.error(f"{size} is not less than the model's d_model, {d_model}", "dimensions", index)

    def embed(self, decoder: Decoder, batch: TokenBatch, aux: AuxInputs) -> tuple[Embedded, TextLabels]:
        """Computes the vectors of a micro-batch's texts.

        Args:
          decoder: the model in training.
          batch: arrays [rows, T]; each piece of a row is a text.
          aux: "items", the labels of the texts.

        Returns:
          The vectors, float32 [rows, texts, d_model], with the experts' load-balancing loss; and the texts' labels.

        Raises:
          ValueError: there are no "items".
        """
        labels = aux.get(ITEMS)
        if not isinstance(labels, TextLabels):
            raise ValueError("contrastive needs to know its items: give train() an ItemTable as aux_models['items']")
        hidden, balance = decoder.forward_with_aux_loss(batch.tokens, batch.positions, batch.token_labels)
        vectors = pool(decoder, hidden, batch.token_labels, labels.record.shape[1], self.pooling)
        return Embedded(vectors, balance), labels

    def loss(
        self, params: Params, embedded: Embedded, labels: TextLabels
    ) -> tuple[Float[Array, ""], dict[str, WeightedSum]]:
        """Computes the loss of all texts of a batch: InfoNCE, each positive against every item of the batch.

        Args:
          params: the loss's own (see `init`).
          embedded: the vectors of all micro-batches.
          labels: of the texts.

        Returns:
          The loss, summed over the positives, and metrics by name; "loss" is the loss itself.
        """
        scale = jnp.minimum(jnp.exp(params["logit_scale"]), MAX_SCALE)
        sizes = [*self.dimensions, embedded.vectors.shape[-1]]
        by_size = [self._compare(unit(embedded.vectors, size), labels, scale) for size in sizes]
        weight, best = by_size[-1].positives, by_size[-1].best
        loss = sum(sums.info_nce for sums in by_size) / len(sizes) + jnp.mean(embedded.balance) * weight
        metrics = {"accuracy": WeightedSum(best, weight), "temperature": WeightedSum(weight / scale, weight)}
        if labels.log_odds is not None:
            total = jnp.sum(jnp.stack([sums.divergence for sums in by_size])) / len(sizes)
            divergence = WeightedSum(total, by_size[-1].ranked)
            loss += self.ranker_weight * weight * divergence.total / jnp.maximum(divergence.weight, 1)
            metrics["divergence"] = divergence
        return loss, {"loss": WeightedSum(loss, weight), **metrics}

    def loss_of_positives(
        self, positive: Float[Array, "A B N"], negatives: Float[Array, "A B N S"]
    ) -> Float[Array, "A B N"]:
        """Computes InfoNCE.

        Args:
          positive: the logit of each item for the member of its record.
          negatives: those of all texts for that member; `MASKED` where a text is none of its negatives.

        Returns:
          The loss of each item, as a positive.
        """
        return jnp.logaddexp(positive, jax.nn.logsumexp(negatives, -1)) - positive

    def _compare(self, vectors: Float[Array, "A B N D"], labels: TextLabels, scale: Array) -> _BatchSums:
        is_member = (labels.role == MEMBER).astype(jnp.float32)
        same_record = labels.record[..., :, None] == labels.record[..., None, :]
        own_member = same_record * is_member[..., None, :]
        own_member /= jnp.maximum(jnp.sum(own_member, -1, keepdims=True), 1)  # a row may have a record twice
        members = _product("abnm,abmd->abnd", own_member, vectors)
        items = _everywhere(vectors).reshape(-1, vectors.shape[-1])
        of_item = jax.tree.map(lambda x: _everywhere(x).reshape(-1), labels)
        correction = labels.log_share if self.logq_correction else jnp.zeros_like(labels.log_share)
        logits = _product("abnd,sd->abns", members, items) * scale - _everywhere(correction).reshape(-1)
        score = jnp.sum(members * vectors, -1) * scale  # of each item for the member of its own record
        positive = score - correction
        is_item = (of_item.role != MEMBER) & (of_item.role != MISSING)
        same_item = labels.item[..., None] == of_item.item
        also_positive = (labels.member[..., None] == of_item.member) & (of_item.role == POSITIVE)
        negatives = jnp.where(is_item & ~same_item & ~also_positive, logits, MASKED)
        is_positive = labels.role == POSITIVE
        losses = self.loss_of_positives(positive, negatives)
        best = positive >= jnp.max(negatives, -1)
        nothing = jnp.zeros(())
        ranked = (nothing, nothing) if labels.log_odds is None else _diverge(score, labels.log_odds, same_record)
        return _BatchSums(
            jnp.sum(jnp.where(is_positive, losses, 0)),
            jnp.sum(1.0 * is_positive),
            jnp.sum(1.0 * (is_positive & best)),
            *ranked,
        )


class _BatchSums(NamedTuple):
    """Of a batch: the loss of its positives, how many they are, and of how many no other item has a higher score; the
    divergence of its records from a ranker, and how many have its scores: 0 without a ranker."""

    info_nce: Array
    positives: Array
    best: Array
    divergence: Array
    ranked: Array


def _diverge(
    scores: Float[Array, "A B N"], log_odds: Float[Array, "A B N"], same_record: Float[Array, "A B N N"]
) -> tuple[Array, Array]:
    """The summed divergence of the softmax of `scores` over each record's items from that of `log_odds`, and the number
    of records; items whose log-odds are NaN are left out."""
    known = ~jnp.isnan(log_odds)
    among = same_record & known[..., None, :]

    def log_shares(logits: Array) -> Array:
        total = jax.nn.logsumexp(jnp.where(among, logits[..., None, :], MASKED), -1)
        return jnp.where(known, logits - total, MASKED)

    target, predicted = log_shares(jnp.where(known, log_odds, 0)), log_shares(scores)
    share = jnp.exp(target)
    return jnp.sum(share * (target - predicted)), jnp.sum(share)


def _product(axes: str, x: Array, y: Array) -> Array:
    return jnp.einsum(axes, x, y, precision=jax.lax.Precision.HIGHEST)


def _everywhere(x: Array) -> Array:
    """The whole of an array [A, B, ..] on every device. Its gradient is summed over the devices."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, jax.P())
