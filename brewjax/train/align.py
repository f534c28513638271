"""Preference alignment: DPO, and its form for lists, against a frozen reference.

Axis letters: B rows, T tokens, D model dimension (docs/glossary.md, "Axis letters").
"""

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

    A candidate's score s is log pi(its targets) - log pi_reference(its targets). The loss of a list is
    softplus(log sum over rejected of exp(beta s) - beta s of the chosen): S-DPO (Chen et al. 2024, arXiv 2406.09215,
    eq. 8), which for lists of two is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    A list's weight is the mean weight of its chosen candidate's targets. Lists that lost their chosen or all rejected
    candidates to a row boundary get weight 0, as do targets outside lists. The reference is `aux["reference"]`, or the
    policy without its LoRA updates.
    """

    beta: float = pydantic.Field(default=0.1, gt=0)
    """Scale of the scores: a larger beta keeps the policy nearer to the reference."""
    loss_type: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: the chosen candidate against all rejected ones of its list together (S-DPO); sigmoid: the mean over
    pairs of the chosen and one rejected candidate (DPO)."""
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round (conservative DPO, Mitchell 2023)."""
    rpo_alpha: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the chosen candidate's mean -log pi per target, which keeps it likely (RPO, Pang et al. 2024, arXiv
    2404.19733, eq. 1)."""

    def __call__(
        self, decoder: Decoder, batch: TokenBatch, aux: AuxInputs
    ) -> tuple[WeightedSum, dict[str, WeightedSum]]:
        reference = aux.get(REFERENCE, aux.get(BASE))
        if not isinstance(reference, Decoder):
            raise ValueError(
                "align needs a reference: give train() a FrozenModel as aux_models['reference'], or set train.lora"
            )
        hidden, balance = decoder.forward_with_aux_loss(batch.tokens, batch.positions, batch.token_labels)
        policy = candidate_log_probs(decoder, hidden, batch)
        reference_log_probs = candidate_log_probs(
            reference, reference(batch.tokens, batch.positions, batch.token_labels), batch
        )
        sharding = decoder.sharding
        rows, axes = sharding.spec("batch", None), sharding.rules["batch"]
        token_labels = batch.token_labels
        labels = (token_labels.example_id, token_labels.piece_id, batch.preference)
        fields = [policy, jax.lax.stop_gradient(reference_log_probs), batch.weights, *map(jnp.asarray, labels)]

        def local(*fields: Array) -> dict[str, WeightedSum]:
            row_sums = jax.vmap(self.lists)(*fields)
            return jax.tree.map(lambda x: jax.lax.psum(jnp.sum(x), axes), row_sums)

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
        example_id: Array,
        piece_id: Array,
        preference: Array,
    ) -> dict[str, WeightedSum]:
        """Losses and metrics of the lists of one row, summed by the lists' weights.

        Args:
          policy: log-probabilities of the targets; 0 elsewhere.
          reference: those of the reference model.
          weights: [T], of the tokens.
          example_id: [T], of the tokens.
          piece_id: [T], of the tokens.
          preference: [T], the signed list number of each token; 0 for no list.

        Returns:
          By name, sums over the lists with the lists' weight.
        """
        T = len(policy)
        indices = jnp.arange(T)
        listed = preference != 0
        sum_by = functools.partial(jax.ops.segment_sum, num_segments=T + 1)

        # Tokens -> candidates: runs of one piece. Tokens -> lists: equal (example, list), numbered in sorted order.
        starts_candidate = jnp.append(False, (example_id[1:] != example_id[:-1]) | (piece_id[1:] != piece_id[:-1]))
        candidate = jnp.cumsum(starts_candidate)
        order = jnp.lexsort((jnp.abs(preference), example_id))
        keys = jnp.stack([example_id, jnp.abs(preference)])[:, order]
        list_index = jnp.cumsum(jnp.append(False, jnp.any(keys[:, 1:] != keys[:, :-1], 0)))
        list_of_token = jnp.where(listed, jnp.zeros(T, list_index.dtype).at[order].set(list_index), T)  # T: in no list
        list_of = jax.ops.segment_min(list_of_token, candidate, T + 1)
        list_of = jnp.where((list_of >= 0) & (list_of < T), list_of, T)

        score = self.beta * sum_by(jnp.where(listed, policy - reference, 0), candidate)
        is_chosen = jax.ops.segment_max(preference, candidate, T + 1) > 0
        is_rejected = (jax.ops.segment_min(preference, candidate, T + 1) < 0) & (list_of < T)
        is_chosen &= list_of < T

        is_chosen_token = preference > 0
        num_targets = jnp.maximum(sum_by(is_chosen_token.astype(jnp.float32), list_of_token), 1)
        num_rejected = sum_by(is_rejected.astype(jnp.float32), list_of)
        is_valid = (
            (sum_by(is_chosen.astype(jnp.float32), list_of) == 1) & (num_rejected > 0) & (jnp.append(indices, T) < T)
        )
        num_rejected = jnp.maximum(num_rejected, 1)
        weight = jnp.where(is_valid, sum_by(jnp.where(is_chosen_token, weights, 0), list_of_token) / num_targets, 0)

        chosen_score = sum_by(jnp.where(is_chosen, score, 0), list_of)
        if self.loss_type == "softmax":
            max_rejected = jax.lax.stop_gradient(
                jax.ops.segment_max(jnp.where(is_rejected, score, -jnp.inf), list_of, T + 1)
            )
            max_rejected = jnp.where(jnp.isfinite(max_rejected), max_rejected, 0)
            shares = sum_by(
                jnp.where(is_rejected, jnp.exp(jnp.where(is_rejected, score - max_rejected[list_of], 0)), 0), list_of
            )
            loss = self._cost(chosen_score - max_rejected - jnp.log(jnp.where(is_valid, shares, 1)))
        else:
            loss = sum_by(jnp.where(is_rejected, self._cost(chosen_score[list_of] - score), 0), list_of) / num_rejected
        rejected_score = sum_by(jnp.where(is_rejected, score, 0), list_of) / num_rejected
        accuracy = (
            sum_by(jnp.where(is_rejected, (chosen_score[list_of] > score).astype(jnp.float32), 0), list_of)
            / num_rejected
        )

        def mean(x: Array) -> WeightedSum:
            return WeightedSum(jnp.sum(weight * jnp.where(is_valid, x, 0)), jnp.sum(weight))

        return {
            "loss_dpo": mean(loss),
            "loss_sft": mean(-sum_by(jnp.where(is_chosen_token, policy, 0), list_of_token) / num_targets),
            "reward_chosen": mean(chosen_score),
            "reward_rejected": mean(rejected_score),
            "reward_margin": mean(chosen_score - rejected_score),
            "preference_accuracy": mean(accuracy),
        }

    def _cost(self, margin: Array) -> Array:
        """-log sigmoid(margin), and of -margin with probability `label_smoothing`."""
        smoothing = self.label_smoothing
        return (1 - smoothing) * jax.nn.softplus(-margin) + smoothing * jax.nn.softplus(margin)


def candidate_log_probs(decoder: Decoder, hidden: Float[Array, "B T D"], batch: TokenBatch) -> Float[Array, "B T"]:
    """float32 log-probabilities of the targets in lists; 0 for other tokens."""
    targets = jnp.where(batch.preference != 0, batch.targets, NO_TARGET)
    return per_token(decoder.sharding, linear_log_probs, [(hidden, decoder.lm_head)], targets)
