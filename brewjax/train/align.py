"""Alignment: the policy learns to prefer what members chose, held to a reference (DPO, and its form for lists)."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import pydantic
from jaxtyping import Array, Float

from brewjax.config import Config
from brewjax.data.records.loader import NO_TARGET, TokenBatch
from brewjax.model.decoder import Decoder
from brewjax.train.objectives import BASE, AuxInputs, WeightedSum, per_token
from pallas_kernels.cross_entropy import linear_log_probs

REFERENCE = "reference"


class Align(Config):
    """Direct preference optimisation over the lists of a batch (see `TokenBatch.preference`); an objective.

    A candidate's score s is log pi(its targets) - log pi_reference(its targets). A list costs
    softplus(log sum over rejected of exp(beta s) - beta s of the preferred): S-DPO (Chen et al. 2024, arXiv 2406.09215,
    eq. 8), which for lists of two is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). A list weighs what its
    preferred candidate's targets do on the average. One that a split left without a preferred candidate, or without
    any rejected, counts for nothing, as do targets in no list.

    The reference is `given["reference"]`, or else the policy without its LoRA.

    Attributes:
      against: the preferred candidate is held against all rejected of its list together, or against each alone:
        DPO's mean over pairs.
      sft: weight of the preferred candidate's mean -log pi per target, which keeps it likely (RPO, Pang et al.
        2024, arXiv 2404.19733, eq. 1).
    """

    beta: float = pydantic.Field(default=0.1, gt=0)
    """How firmly the reference holds."""
    loss_type: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=0.5)
    """The chance that a preference is the wrong way round (conservative DPO, Mitchell 2023)."""
    rpo_alpha: float = pydantic.Field(default=0.0, ge=0)

    def __call__(
        self, decoder: Decoder, batch: TokenBatch, given: AuxInputs
    ) -> tuple[WeightedSum, dict[str, WeightedSum]]:
        reference = given.get(REFERENCE, given.get(BASE))
        if not isinstance(reference, Decoder):
            raise ValueError(
                "align needs a reference to hold the policy to: give train() a frozen 'reference', or set train.lora"
            )
        hidden, balance = decoder.forward_with_aux_loss(batch.tokens, batch.positions, batch.token_labels)
        policy = candidate_log_probs(decoder, hidden, batch)
        held_to = candidate_log_probs(reference, reference(batch.tokens, batch.positions, batch.token_labels), batch)
        sharding = decoder.sharding
        rows, axes = sharding.spec("batch", None), sharding.rules["batch"]
        token_labels = batch.token_labels
        labels = (token_labels.example_id, token_labels.piece_id, batch.preference)
        fields = [policy, jax.lax.stop_gradient(held_to), batch.weights, *map(jnp.asarray, labels)]

        def local(*fields: Array) -> dict[str, WeightedSum]:
            of_rows = jax.vmap(self.lists)(*fields)
            return jax.tree.map(lambda x: jax.lax.psum(jnp.sum(x), axes), of_rows)

        means = jax.shard_map(local, in_specs=rows, out_specs=jax.P(), check_vma=False)(
            *(sharding.reshard(field, "batch", None) for field in fields)
        )
        loss = means["loss_dpo"].total + self.rpo_alpha * means["loss_sft"].total + balance * means["loss_dpo"].weight
        return WeightedSum(loss, means["loss_dpo"].weight), means

    def lists(
        self,
        policy: Float[Array, " T"],
        reference: Float[Array, " T"],
        weights: Array,
        example: Array,
        segment: Array,
        preference: Array,
    ) -> dict[str, WeightedSum]:
        """The losses and metrics of one row's lists, summed by the weights of the lists.

        Args:
          policy, reference: log-probabilities of the targets.
        """
        T = len(policy)
        places = jnp.arange(T)
        inside = preference != 0
        total = functools.partial(jax.ops.segment_sum, num_segments=T + 1)

        # Tokens -> candidates: runs of one segment. Tokens -> lists: equal (example, list), numbered in their order.
        runs = jnp.append(False, (example[1:] != example[:-1]) | (segment[1:] != segment[:-1]))
        candidate = jnp.cumsum(runs)
        order = jnp.lexsort((jnp.abs(preference), example))
        keys = jnp.stack([example, jnp.abs(preference)])[:, order]
        numbers = jnp.cumsum(jnp.append(False, jnp.any(keys[:, 1:] != keys[:, :-1], 0)))
        list_of_token = jnp.where(inside, jnp.zeros(T, numbers.dtype).at[order].set(numbers), T)  # T: in no list
        list_of = jax.ops.segment_min(list_of_token, candidate, T + 1)
        list_of = jnp.where((list_of >= 0) & (list_of < T), list_of, T)

        score = self.beta * total(jnp.where(inside, policy - reference, 0), candidate)
        preferred = jax.ops.segment_max(preference, candidate, T + 1) > 0
        rejected = (jax.ops.segment_min(preference, candidate, T + 1) < 0) & (list_of < T)
        preferred &= list_of < T

        of_preferred = preference > 0
        targets = jnp.maximum(total(of_preferred.astype(jnp.float32), list_of_token), 1)
        others = total(rejected.astype(jnp.float32), list_of)
        whole = (total(preferred.astype(jnp.float32), list_of) == 1) & (others > 0) & (jnp.append(places, T) < T)
        others = jnp.maximum(others, 1)
        weight = jnp.where(whole, total(jnp.where(of_preferred, weights, 0), list_of_token) / targets, 0)

        chosen = total(jnp.where(preferred, score, 0), list_of)
        if self.loss_type == "softmax":
            top = jax.lax.stop_gradient(jax.ops.segment_max(jnp.where(rejected, score, -jnp.inf), list_of, T + 1))
            top = jnp.where(jnp.isfinite(top), top, 0)
            shares = total(jnp.where(rejected, jnp.exp(jnp.where(rejected, score - top[list_of], 0)), 0), list_of)
            loss = self._cost(chosen - top - jnp.log(jnp.where(whole, shares, 1)))
        else:
            loss = total(jnp.where(rejected, self._cost(chosen[list_of] - score), 0), list_of) / others
        reward_of_rejected = total(jnp.where(rejected, score, 0), list_of) / others
        beaten = total(jnp.where(rejected, (chosen[list_of] > score).astype(jnp.float32), 0), list_of) / others

        def mean(x: Array) -> WeightedSum:
            return WeightedSum(jnp.sum(weight * jnp.where(whole, x, 0)), jnp.sum(weight))

        return {
            "loss_dpo": mean(loss),
            "loss_sft": mean(-total(jnp.where(of_preferred, policy, 0), list_of_token) / targets),
            "reward_chosen": mean(chosen),
            "reward_rejected": mean(reward_of_rejected),
            "reward_margin": mean(chosen - reward_of_rejected),
            "preference_accuracy": mean(beaten),
        }

    def _cost(self, margin: Array) -> Array:
        """-log of the chance that the preferred wins by this margin, the other way round with `label_smoothing`."""
        smoothing = self.label_smoothing
        return (1 - smoothing) * jax.nn.softplus(-margin) + smoothing * jax.nn.softplus(margin)


def candidate_log_probs(decoder: Decoder, hidden: Float[Array, "B T D"], batch: TokenBatch) -> Float[Array, "B T"]:
    """log p of every target that belongs to a list, float32; zero elsewhere."""
    targets = jnp.where(batch.preference != 0, batch.targets, NO_TARGET)
    return per_token(decoder.sharding, linear_log_probs, [(hidden, decoder.lm_head)], targets)
