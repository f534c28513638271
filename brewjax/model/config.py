"""`ModelConfig`: the shape of a decoder. Families differ in it and in nothing else."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from brewjax.config import Config, Location
from brewjax.model.rope import FactorsScaling, RopeScaling

Dtype = Literal["float32", "bfloat16"]


class ExpertsConfig(Config):
    """A mixture of experts in place of each layer's MLP."""

    num_experts: int = pydantic.Field(gt=0)
    """Experts of a layer, each of the model's d_ff."""
    num_experts_per_tok: int = pydantic.Field(default=2, gt=0)
    """How many of them each token goes through."""
    norm_topk_prob: bool = True
    """The router's weights of the chosen experts are made to sum to one."""
    router_aux_loss_coef: float = pydantic.Field(default=0.01, ge=0)
    """Weight of the load-balancing loss in training."""

    @pydantic.model_validator(mode="after")
    def _enough(self) -> ExpertsConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most num_experts ({self.num_experts})"
            )
        return self


class Quantization(Config):
    """The layers' matrices in 8 bits, with a float32 scale for each output channel; the rest is as it was."""

    dtype: Literal["e4m3", "int8"] = "e4m3"
    activations: Literal["per_token", "per_tensor"] | None = "per_token"
    """What a matrix is multiplied with is rounded to the same 8 bits, with a scale for each token, or one for all
    of them (see `pallas_kernels.quantized_matmul`); null: to bfloat16."""


class HeadPrecision(Config):
    """Of the output head. Less than float32 is for measuring what it costs."""

    product: Literal["float32", "bfloat16", "e4m3"] = "float32"
    """What hidden states and the head are rounded to (e4m3: with a scale for each token and each word) before a
    product that is exact in float32."""
    logits: Dtype = "float32"
    """What that is rounded to, before a softmax in float32."""


class ModelConfig(Config):
    """The shape of a decoder."""

    name: str
    vocab_size: int = pydantic.Field(default=0, ge=0)
    """0 takes the tokenizer's."""
    d_model: int = pydantic.Field(gt=0)
    layers: int = pydantic.Field(gt=0)
    heads: int = pydantic.Field(gt=0)
    kv_heads: int = pydantic.Field(gt=0)
    head_dim: int = pydantic.Field(gt=0, multiple_of=2)
    d_ff: int = pydantic.Field(gt=0)
    """Neurons of an MLP, or of one expert."""
    experts: ExpertsConfig | None = None
    rope_theta: float = pydantic.Field(default=10_000.0, gt=1)
    """Base of the rotary position angles, and how they are slowed (see `brewjax.model.rope`)."""
    rope_scaling: RopeScaling | None = None
    """See `rope_theta`."""
    max_seq_len: int | None = pydantic.Field(default=None, gt=0)
    """Tokens that a prompt and one question may have; longer ones are refused, not cut. What the model's positions
    were trained for, or its sliding window where that is less: windows are not computed."""
    norm_eps: float = pydantic.Field(default=1e-5, gt=0, lt=1)
    qkv_bias: bool = False
    """Queries, keys and values have biases (Qwen2)."""
    qk_norm: bool = False
    """The heads of queries and keys are normed (Qwen3)."""
    tie_head: bool = True
    """The output head is the embedding."""
    param_dtype: Dtype = "float32"
    """Of the weights at rest, and of the matrix products; norms, softmax, router and logits are float32 whatever
    these are."""
    compute_dtype: Dtype = "float32"
    """See `param_dtype`."""
    quantized: Quantization | None = None
    """Of a model for serving; it is not trained."""
    head: HeadPrecision = HeadPrecision()
    remat: bool = False
    """Recompute each layer in the backward pass instead of storing its activations."""

    @pydantic.model_validator(mode="after")
    def _groups_divide(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self

    @pydantic.model_validator(mode="after")
    def _factor_for_each_angle(self) -> ModelConfig:
        scaling, angles = self.rope_scaling, self.head_dim // 2
        if isinstance(scaling, FactorsScaling) and len(scaling.factors) != angles:
            raise ValueError(f"rope_scaling.factors: {len(scaling.factors)} of them, but a head has {angles} angles")
        return self

    @classmethod
    def place(cls, location: Location, source: dict[str, Any]) -> Location:
        """Without the type of the scaling, which pydantic puts behind its name."""
        return location[:1] + location[2:] if location[:1] == ("rope_scaling",) else location

    def check_length(self, tokens: int, subject: str) -> None:
        """ValueError where `what` has more tokens than this model reads."""
        if self.max_seq_len is not None and tokens > self.max_seq_len:
            raise ValueError(
                f"{subject} has {tokens} tokens; model '{self.name}' reads at most {self.max_seq_len}, its max_seq_len "
                "(the positions it was trained for, or its sliding window)"
            )
