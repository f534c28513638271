"""Families of open models: what their configs say, and what their tensors are called. Data, and no model code."""

from __future__ import annotations

import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from brewjax.model.config import ExpertsConfig, ModelConfig, RopeScaling
from brewjax.model.loading import CheckpointError, Name

LAYER = "model.layers.{}."
NAMES = {
    "embedding": Name("model.embed_tokens.weight", None),
    "layers/attention_norm/scale": Name(LAYER + "input_layernorm.weight"),
    "layers/query": Name(LAYER + "self_attn.q_proj.weight", 1),
    "layers/key": Name(LAYER + "self_attn.k_proj.weight", 1),
    "layers/value": Name(LAYER + "self_attn.v_proj.weight", 1),
    "layers/query_bias": Name(LAYER + "self_attn.q_proj.bias"),
    "layers/key_bias": Name(LAYER + "self_attn.k_proj.bias"),
    "layers/value_bias": Name(LAYER + "self_attn.v_proj.bias"),
    "layers/query_norm/scale": Name(LAYER + "self_attn.q_norm.weight"),
    "layers/key_norm/scale": Name(LAYER + "self_attn.k_norm.weight"),
    "layers/output": Name(LAYER + "self_attn.o_proj.weight", 2),
    "layers/mlp_norm/scale": Name(LAYER + "post_attention_layernorm.weight"),
    "layers/gate": Name(LAYER + "mlp.gate_proj.weight", 1),
    "layers/up": Name(LAYER + "mlp.up_proj.weight", 1),
    "layers/down": Name(LAYER + "mlp.down_proj.weight", 1),
    "norm/scale": Name("model.norm.weight"),
    "untied_head": Name("lm_head.weight", None),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    Attributes:
      qkv_bias, qk_norm: what its layers have.
      names: the tensors that it calls by names of its own.
      experts: the keys of its config that count its experts and their neurons.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    names: dict[str, Name] = dataclasses.field(default_factory=dict)
    experts: tuple[str, str] | None = None


# A model is exported as the first that it fits.
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "mixtral": Family(
        "MixtralForCausalLM",
        names={
            "layers/experts/router": Name(LAYER + "block_sparse_moe.gate.weight", 1),
            "layers/experts/gate": Name(LAYER + "block_sparse_moe.experts.{}.w1.weight", 1),
            "layers/experts/up": Name(LAYER + "block_sparse_moe.experts.{}.w3.weight", 1),
            "layers/experts/down": Name(LAYER + "block_sparse_moe.experts.{}.w2.weight", 1),
        },
        experts=("num_local_experts", "intermediate_size"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        names={
            "layers/experts/router": Name(LAYER + "mlp.gate.weight", 1),
            "layers/experts/gate": Name(LAYER + "mlp.experts.{}.gate_proj.weight", 1),
            "layers/experts/up": Name(LAYER + "mlp.experts.{}.up_proj.weight", 1),
            "layers/experts/down": Name(LAYER + "mlp.experts.{}.down_proj.weight", 1),
        },
        experts=("num_experts", "moe_intermediate_size"),
    ),
}
# What the decoder does not compute in another way; a config that asks for one is refused.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "quantization_config": None,
}
ROPE_TYPES = ("default", "llama3")
LONGEST = 131_072  # positions that an exported config names where the model's names none


def config_from_hf(values: dict[str, Any], name: str, where: str) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json; CheckpointError, beginning with `where`, if no family matches."""
    family = FAMILIES.get(values.get("model_type", ""))
    if family is None:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{where}: model_type {values.get('model_type')!r} is none of those known: {known}")
    try:
        hf = CONFIG_MAPPING[values["model_type"]].from_dict(values)  # with the family's own defaults
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    for key, wanted in ONLY.items():
        if getattr(hf, key, wanted) != wanted:
            raise CheckpointError(f"{where}: {key} is {getattr(hf, key)!r}; only {wanted!r} can be computed")
    rope = hf.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(f"{where}: RoPE as {rope} cannot be computed, only {' and '.join(ROPE_TYPES)}, in full")
    experts = None
    if family.experts:
        experts = ExpertsConfig(
            count=getattr(hf, family.experts[0]),
            per_token=hf.num_experts_per_tok,
            normalize=getattr(hf, "norm_topk_prob", True),
            balance=hf.router_aux_loss_coef,
        )
    return ModelConfig(
        name=name,
        vocab_size=hf.vocab_size,
        d_model=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        d_ff=getattr(hf, family.experts[1] if family.experts else "intermediate_size"),
        experts=experts,
        rope_base=rope["rope_theta"],
        rope_scaling=RopeScaling(
            factor=rope["factor"],
            low=rope["low_freq_factor"],
            high=rope["high_freq_factor"],
            original_length=rope["original_max_position_embeddings"],
        )
        if rope["rope_type"] == "llama3"
        else None,
        max_context=min(hf.max_position_embeddings, getattr(hf, "sliding_window", None) or hf.max_position_embeddings),
        norm_eps=hf.rms_norm_eps,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_head=hf.tie_word_embeddings,
    )


def family_of(config: ModelConfig) -> str:
    """The `model_type` that computes what `config` does; CheckpointError if there is none."""
    for model_type, family in FAMILIES.items():
        same = (family.qkv_bias, family.qk_norm, bool(family.experts)) == (
            config.qkv_bias,
            config.qk_norm,
            bool(config.experts),
        )
        if same and (model_type != "mixtral" or (config.experts and config.experts.normalize)):
            return model_type
    raise CheckpointError(
        f"model '{config.name}': no family of transformers ({', '.join(FAMILIES)}) has its mix of "
        f"experts ({config.experts}), qkv_bias ({config.qkv_bias}) and qk_norm ({config.qk_norm})"
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, in the keys that every release of transformers reads."""
    if config.quantized:
        raise CheckpointError(f"model '{config.name}' is quantised; export the model that it was made from")
    model_type = family_of(config)
    family = FAMILIES[model_type]
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context or LONGEST,
        "sliding_window": None,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_head,
        "torch_dtype": config.param_dtype,
    }
    if scaling := config.rope_scaling:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_length,
        }
    if config.experts and family.experts:
        values |= {
            family.experts[0]: config.experts.count,
            family.experts[1]: config.d_ff,
            "num_experts_per_tok": config.experts.per_token,
            "router_aux_loss_coef": config.experts.balance,
        }
    if model_type == "qwen3_moe" and config.experts:
        values["norm_topk_prob"] = config.experts.normalize
    return values


def names_of(config: ModelConfig) -> dict[str, Name]:
    """By path of a parameter, what transformers calls its tensors."""
    return NAMES | FAMILIES[family_of(config)].names
