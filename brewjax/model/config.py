"""`ModelConfig`: the shape of a decoder. Families differ in it and in nothing else."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from brewjax.config import Config, Location
from brewjax.model.rope import FactorsScaling, RopeScaling

Dtype = Literal["float32", "bfloat16"]


class ExpertsConfig(Config):
    """A mixture of experts instead of each layer's MLP."""

    num_experts: int = pydantic.Field(gt=0)
    """Experts of a layer, each an MLP with `d_ff` neurons."""
    num_experts_per_tok: int = pydantic.Field(default=2, gt=0)
    """Experts that each token is routed to."""
    norm_topk_prob: bool = True
    """Divides the router's weights of a token's experts by their sum."""
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
    """8-bit matrices in the layers, with a float32 scale for each output channel; other weights are unchanged."""

    dtype: Literal["e4m3", "int8"] = "e4m3"
    """8-bit format of the matrices: float8 e4m3, or int8."""
    activations: Literal["per_token", "per_tensor"] | None = "per_token"
    """Rounds activations to the same 8 bits, with a scale for each token or one for all tokens (see
    `pallas_kernels.quantized_matmul`); null rounds them to bfloat16."""


class HeadPrecision(Config):
    """Precision of the output head. Less than float32 is for measuring what it costs."""

    product: Literal["float32", "bfloat16", "e4m3"] = "float32"
    """Format that hidden states and the head are rounded to before an exact float32 product (e4m3: with a scale for
    each token and each word)."""
    logits: Dtype = "float32"
    """Format that logits are rounded to before a float32 softmax."""
    parts: Literal[1, 2, 3] = 2
    """On a TPU and a GPU, bfloat16 parts of each float32 number in the log-sum over the vocabulary: two are off by a
    unit of the last place or two, three by less, one by thousands. Labels' own logits are exact whatever it says."""


class ModelConfig(Config):
    """The shape of a decoder."""

    name: str
    """Name of the model, for messages and reports."""
    vocab_size: int = pydantic.Field(default=0, ge=0)
    """Words of the vocabulary; 0 takes the tokenizer's number."""
    d_model: int = pydantic.Field(gt=0)
    """Width of the residual stream."""
    layers: int = pydantic.Field(gt=0)
    """Layers, each of attention and an MLP or experts."""
    heads: int = pydantic.Field(gt=0)
    """Query heads of a layer; a multiple of `kv_heads`."""
    kv_heads: int = pydantic.Field(gt=0)
    """Key-value heads of a layer, each shared by heads / kv_heads query heads."""
    head_dim: int = pydantic.Field(gt=0, multiple_of=2)
    """Size of a head."""
    d_ff: int = pydantic.Field(gt=0)
    """Neurons of an MLP, or of one expert."""
    experts: ExpertsConfig | None = None
    """A mixture of experts instead of each MLP; null for dense layers."""
    rope_theta: float = pydantic.Field(default=10_000.0, gt=1)
    """Base of the frequencies of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies for longer inputs (see `brewjax.model.rope`); null for none."""
    max_seq_len: int | None = pydantic.Field(default=None, gt=0)
    """Most tokens of a prompt with one question; longer inputs are refused, not truncated. It is the length that the
    positions were trained for, or the sliding window if that is shorter (windows are not computed); null for no
    limit."""
    norm_eps: float = pydantic.Field(default=1e-5, gt=0, lt=1)
    """Added to the mean square in RMSNorm."""
    qkv_bias: bool = False
    """Adds biases to queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """Normalises each head of queries and keys (Qwen3)."""
    tie_head: bool = True
    """Uses the embedding as output head."""
    param_dtype: Dtype = "float32"
    """Dtype of the weights at rest."""
    compute_dtype: Dtype = "float32"
    """Dtype of activations and matrix products; norms, softmax, router and logits are always float32."""
    quantized: Quantization | None = None
    """8-bit matrices for serving; such a model cannot be trained. Null for none."""
    head: HeadPrecision = HeadPrecision()
    """Precision of the output head."""
    remat: bool = False
    """Recomputes each layer in the backward pass instead of storing its activations."""

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
        """As `Config.place`: without the type of the scaling, which pydantic inserts behind its name.

        Args:
          location: of the field in the config.
          source: keys and values of the file; not looked at.

        Returns:
          The keys in the file that led to the field.
        """
        return location[:1] + location[2:] if location[:1] == ("rope_scaling",) else location

    def check_length(self, tokens: int, subject: str) -> None:
        """Checks that a sequence is no longer than `max_seq_len`.

        Args:
          tokens: its length.
          subject: what it is, for the error.

        Raises:
          ValueError: it is longer.
        """
        if self.max_seq_len is not None and tokens > self.max_seq_len:
            raise ValueError(
                f"{subject} has {tokens} tokens; model '{self.name}' reads at most {self.max_seq_len}, its max_seq_len "
                "(the positions it was trained for, or its sliding window)"
            )
