"""Distillation: a student learns its targets, and what a teacher would have said at each of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import pydantic

from brewjax.config import Config
from brewjax.data.loader import NO_TARGET, Shards, TokenBatch
from brewjax.model.config import ModelConfig
from brewjax.model.decoder import Decoder
from brewjax.model.sharding import MeshConfig
from brewjax.train.loop import TrainConfig
from brewjax.train.objectives import Given, Mean, TopK, cross_entropy, token_sums
from brewjax.train.teachers import Beside, Cache, Frozen, OnOwnMesh, write_cache
from pallas_kernels.distillation import (
    Divergence,
    forward_kl,
    jensen_shannon,
    linear_distillation,
    reverse_kl,
    skewed_kl,
    top_k_distillation,
)

TEACHER = "teacher"


class Distill(Config):
    """(1 - ratio) x `supervised` + ratio x the divergence from `given["teacher"]`, both by the targets' weights; an
    objective. The defaults are those of arXiv 2502.14305.

    Attributes:
      divergence: see `pallas_kernels.distillation`; `alpha` is the skewed KL's, `beta` the Jensen-Shannon divergence's.
      temperature: both distributions are softmax(logits / temperature), and the divergence counts temperature^2 times.
      teacher: same_mesh: in memory, laid out by its own rules on the student's mesh; own_mesh: on the same devices laid
        out as `mesh`, its answers moved over; cache: its answers were written once, on `mesh`.
      top_k: of how many words the probabilities are moved over or written; all others are one.
    """

    ratio: float = pydantic.Field(default=0.9, ge=0, le=1)
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl"] = "forward_kl"
    alpha: float = pydantic.Field(default=0.1, gt=0, lt=1)
    beta: float = pydantic.Field(default=0.5, gt=0, lt=1)
    temperature: float = pydantic.Field(default=1.0, gt=0)
    teacher: Literal["same_mesh", "own_mesh", "cache"] = "same_mesh"
    mesh: MeshConfig = MeshConfig()
    top_k: int = pydantic.Field(default=64, gt=0)

    def frozen(
        self, teacher: Frozen, student: ModelConfig, config: TrainConfig, shards: Shards, cache: Path
    ) -> dict[str, Beside]:
        """What `train` is to be given as `frozen`. Writes the teacher's answers into the folder `cache` if need be.

        Raises ValueError where teacher and student differ in their words, and CacheError where the cache holds answers
        to other data, of another teacher or by other settings.
        """
        _check_words(teacher.model.vocab_size, student.vocab_size)
        if self.teacher == "same_mesh":
            return {TEACHER: teacher}
        k = min(self.top_k, teacher.model.vocab_size - 1)  # all words but one tell the last one, too
        if self.teacher == "own_mesh":
            return {TEACHER: OnOwnMesh(teacher, self.mesh.build(), k, self.temperature)}
        write_cache(cache, shards, teacher, self.mesh, config.rows, config.row_tokens, k, self.temperature)
        return {TEACHER: Cache(cache)}

    def __call__(self, decoder: Decoder, batch: TokenBatch, given: Given) -> tuple[Mean, dict[str, Mean]]:
        teacher = given.get(TEACHER)
        if teacher is None:
            raise ValueError("distill needs a teacher: give train() what Distill.frozen returns")
        hidden, balance = decoder.with_balance(batch.tokens, batch.positions, batch.segments)
        sft = cross_entropy(decoder, hidden, batch)
        kd = self._divergence(decoder, hidden, batch, teacher)
        loss = (1 - self.ratio) * sft.total + self.ratio * kd.total + balance * sft.weight
        return Mean(loss, sft.weight), {"loss_sft": sft, "loss_kd": kd}

    def _divergence(self, decoder: Decoder, hidden: jax.Array, batch: TokenBatch, teacher: Decoder | TopK) -> Mean:
        divergence, weights = self.how(), jnp.where(batch.targets != NO_TARGET, batch.weights, 0)
        student = (hidden, decoder.head)
        if isinstance(teacher, TopK):
            loss = functools.partial(top_k_distillation, divergence=divergence, temperature=self.temperature)
            return token_sums(decoder.sharding, loss, [student], *teacher, weights)
        _check_words(teacher.config.vocab_size, decoder.config.vocab_size)
        said = jax.lax.stop_gradient(teacher(batch.tokens, batch.positions, batch.segments))
        loss = functools.partial(linear_distillation, divergence=divergence, temperature=self.temperature)
        return token_sums(decoder.sharding, loss, [student, (said, teacher.head)], weights)

    def how(self) -> Divergence:
        match self.divergence:
            case "forward_kl":
                return forward_kl
            case "reverse_kl":
                return reverse_kl
            case "jensen_shannon":
                return jensen_shannon(self.beta)
            case "skewed_kl":
                return skewed_kl(self.alpha)


def _check_words(teacher: int, student: int) -> None:
    if teacher != student:
        raise ValueError(
            f"the teacher's vocabulary has {teacher} words, the student's {student}: "
            "a student shares its teacher's tokenizer"
        )
