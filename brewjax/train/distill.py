"""Distillation: a student learns its targets and a teacher's distribution at each of them.

Axis letters: L layers, B rows, T tokens, D model dimension (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import pydantic

from brewjax.config import Config
from brewjax.data.records.loader import NO_TARGET, TokenBatch
from brewjax.data.records.shards import Shards
from brewjax.model.config import ModelConfig
from brewjax.model.decoder import Decoder
from brewjax.model.sharding import MeshConfig
from brewjax.train.loop import TrainConfig
from brewjax.train.objectives import AuxInputs, TopK, WeightedSum, cross_entropy, token_sums
from brewjax.train.on_policy import replace_with_student_samples
from brewjax.train.teachers import AuxModel, FrozenModel, TeacherCache, TeacherOnMesh, write_cache
from pallas_kernels.distillation import (
    Divergence,
    forward_kl,
    jensen_shannon,
    linear_distillation,
    reverse_kl,
    skewed_kl,
    top_k_distillation,
)
from pallas_kernels.linear_loss import HiddenAndHead
from pallas_kernels.token_labels import PADDING

TEACHER = "teacher"


class Distill(Config):
    """Distillation from `aux["teacher"]`; an objective.

    The loss is (1 - kd_weight) x `supervised` + kd_weight x the divergence from the teacher, both weighted by the
    targets' weights. The defaults are those of arXiv 2502.14305.
    """

    kd_weight: float = pydantic.Field(default=0.9, ge=0, le=1)
    """Weight of the divergence from the teacher; the targets' cross-entropy has the rest."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl"] = "forward_kl"
    """Divergence of the student from the teacher (see `pallas_kernels.distillation`)."""
    alpha: float = pydantic.Field(default=0.1, gt=0, lt=1)
    """The skewed KL's share of the teacher in the mixture."""
    beta: float = pydantic.Field(default=0.5, gt=0, lt=1)
    """The Jensen-Shannon divergence's share of the teacher in the mixture."""
    temperature: float = pydantic.Field(default=1.0, gt=0)
    """Divides the logits of both models; the divergence is multiplied with its square."""
    teacher_placement: Literal["same_mesh", "own_mesh", "cache"] = "same_mesh"
    """Where the teacher runs. same_mesh: inside the step, on the student's mesh; own_mesh: on the same devices laid out
    as `mesh`, and its outputs are moved to the student's mesh; cache: once before training, on `mesh`, and its outputs
    are written to disk."""
    mesh: MeshConfig = MeshConfig()
    """The teacher's mesh, for own_mesh and cache."""
    top_k: int = pydantic.Field(default=64, gt=0)
    """Words of each token whose probabilities are moved or written; all others are taken together. Also the words that
    on-policy samples are drawn from."""
    on_policy_fraction: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Share of free-text answers that are replaced by the student's samples (GKD's lambda), on which only the teacher's
    divergence counts."""
    hidden_state_weight: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the mean, over layers and tokens, of 1 - cos(student's residual stream after a layer, teacher's after
    the layer at the same relative depth)."""

    @pydantic.model_validator(mode="after")
    def _teacher_is_there(self) -> Distill:
        for name in ("on_policy_fraction", "hidden_state_weight"):
            if getattr(self, name) and self.teacher_placement != "same_mesh":
                raise ValueError(
                    f"{name} runs the teacher inside the step: it needs teacher_placement same_mesh, "
                    f"not {self.teacher_placement}"
                )
        return self

    def aux_models(
        self, teacher: FrozenModel, student: ModelConfig, config: TrainConfig, shards: Shards, cache: Path
    ) -> dict[str, AuxModel]:
        """Makes the `aux_models` for `train`; writes the teacher's outputs into a cache if the placement says so.

        Args:
          teacher: the model to learn from.
          student: the model in training.
          config: of the training run; its batch shape is used for the cache.
          shards: folders of records to train on.
          cache: folder for the teacher's outputs.

        Returns:
          The teacher, or what stands in for it, by the name that the objective looks up.

        Raises:
          ValueError: if teacher and student differ in vocabulary.
          CacheError: if the cache is of other data, of another teacher or made with other settings.
        """
        self.check_models(teacher.model, student)
        if self.teacher_placement == "same_mesh":
            return {TEACHER: teacher}
        k = min(self.top_k, teacher.model.vocab_size - 1)  # the probability of the last word follows from the others
        if self.teacher_placement == "own_mesh":
            return {TEACHER: TeacherOnMesh(teacher, self.mesh.build(), k, self.temperature)}
        write_cache(cache, shards, teacher, self.mesh, config.batch_size, config.seq_len, k, self.temperature)
        return {TEACHER: TeacherCache(cache)}

    def check_models(self, teacher: ModelConfig, student: ModelConfig) -> None:
        """Checks that the student can learn from the teacher.

        Args:
          teacher: its shape.
          student: its shape.

        Raises:
          ValueError: the vocabularies differ, or with `hidden_state_weight` the widths.
        """
        _check_words(teacher.vocab_size, student.vocab_size)
        if self.hidden_state_weight and teacher.d_model != student.d_model:
            raise ValueError(
                "hidden_state_weight compares residual streams of one width: the teacher's is "
                f"{teacher.d_model} wide, the student's {student.d_model}"
            )

    def __call__(
        self, decoder: Decoder, batch: TokenBatch, aux: AuxInputs
    ) -> tuple[WeightedSum, dict[str, WeightedSum]]:
        teacher = aux.get(TEACHER)
        if not isinstance(teacher, (Decoder, TopK)):
            raise ValueError("distill needs a teacher: give train() what Distill.aux_models returns")
        supervised_weights = batch.weights
        if self.on_policy_fraction:
            batch, is_sample = replace_with_student_samples(
                decoder, batch, self.on_policy_fraction, min(self.top_k, decoder.config.vocab_size)
            )
            supervised_weights = jnp.where(is_sample, 0, supervised_weights)
        inputs = (batch.tokens, batch.positions, batch.token_labels)
        forward = Decoder.forward_with_hidden_states if self.hidden_state_weight else Decoder.forward_with_aux_loss
        hidden, balance, *streams = forward(decoder, *inputs)
        if isinstance(teacher, TopK):
            kd = self._from_top_k(decoder, hidden, batch, teacher)
        else:
            self.check_models(teacher.config, decoder.config)
            teacher_hidden, _, *teacher_streams = jax.lax.stop_gradient(forward(teacher, *inputs))
            kd = self._from_teacher(decoder, hidden, batch, (teacher_hidden, teacher.lm_head))
            streams += teacher_streams
        sft = cross_entropy(decoder, hidden, batch._replace(weights=supervised_weights))
        loss = (1 - self.kd_weight) * sft.total + self.kd_weight * kd.total + balance * kd.weight
        metrics = {"loss_sft": sft, "loss_kd": kd}
        if self.hidden_state_weight:
            match = _distance(streams, batch)
            loss += self.hidden_state_weight * match.total / match.weight * kd.weight
            metrics["loss_hidden_states"] = match
        return WeightedSum(loss, kd.weight), metrics

    def _from_top_k(self, decoder: Decoder, hidden: jax.Array, batch: TokenBatch, teacher: TopK) -> WeightedSum:
        loss = functools.partial(
            top_k_distillation, divergence=self.divergence_function(), temperature=self.temperature
        )
        return token_sums(decoder.sharding, loss, [(hidden, decoder.lm_head)], *teacher, _weights(batch))

    def _from_teacher(
        self, decoder: Decoder, hidden: jax.Array, batch: TokenBatch, teacher: HiddenAndHead
    ) -> WeightedSum:
        loss = functools.partial(
            linear_distillation, divergence=self.divergence_function(), temperature=self.temperature
        )
        return token_sums(decoder.sharding, loss, [(hidden, decoder.lm_head), teacher], _weights(batch))

    def divergence_function(self) -> Divergence:
        """Looks up the divergence that the settings name.

        Returns:
          The divergence, with its gradient.
        """
        match self.divergence:
            case "forward_kl":
                return forward_kl
            case "reverse_kl":
                return reverse_kl
            case "jensen_shannon":
                return jensen_shannon(self.beta)
            case "skewed_kl":
                return skewed_kl(self.alpha)


def _weights(batch: TokenBatch) -> jax.Array:
    return jnp.where(batch.targets != NO_TARGET, batch.weights, 0)


def _distance(streams: list[jax.Array], batch: TokenBatch) -> WeightedSum:
    """1 - cos of the residual streams [L, B, T, D] of student and teacher, averaged over layers, summed over tokens."""
    student, teacher = streams
    num_layers, num_teacher_layers = len(student), len(teacher)
    matched = jnp.stack([teacher[round((n + 1) * num_teacher_layers / num_layers) - 1] for n in range(num_layers)])
    a, b = (x.astype(jnp.float32) for x in (student, matched))
    lengths = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    cosines = jnp.mean(jnp.sum(a * b, -1) * jax.lax.rsqrt(lengths + 1e-12), 0)
    real = batch.token_labels.example_id != PADDING
    return WeightedSum(jnp.sum(jnp.where(real, 1 - cosines, 0)), jnp.sum(real, dtype=jnp.float32))


def _check_words(teacher: int, student: int) -> None:
    if teacher != student:
        raise ValueError(
            f"the teacher's vocabulary has {teacher} words, the student's {student}: "
            "a student shares its teacher's tokenizer"
        )
