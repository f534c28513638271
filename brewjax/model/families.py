"""Families of open models: their configs and the names of their tensors. Data only, no model code."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from brewjax.model.config import ModelConfig
from brewjax.model.loading import CheckpointError, Name, build_config
from brewjax.model.rope import FactorsScaling, LinearScaling, RopeScaling, YarnScaling

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
      architecture: name of its class in transformers.
      qkv_bias, qk_norm: whether its layers have these.
      names: tensors that it names differently from `NAMES`, by path of the parameter.
      experts: the keys of its config for the number of experts and their neurons; None for a dense model.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    names: dict[str, Name] = dataclasses.field(default_factory=dict)
    experts: tuple[str, str] | None = None


# A model is exported as the first family that it fits.
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
# Keys that the decoder supports with one value only; a config with another value is refused.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "quantization_config": None,
    "rope_interleaved": False,
    "pruned_heads": {},
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
# Keys of a config that do not change the computation, in addition to those of its family.
UNREAD = """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _name_or_path architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cls_token_id
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_llama_config label2id length_penalty max_length max_sequence_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_training_type unsloth_version use_bfloat16
"""
WITHOUT_EFFECT = frozenset(UNREAD.split())
ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
LONGEST = 131_072  # max_position_embeddings of an exported model without a max_seq_len


def config_from_hf(values: dict[str, Any], name: str, where: str) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json.

    Args:
      values: the keys and values.
      name: of the new config.
      where: the beginning of error messages.

    Raises:
      CheckpointError: for an unknown family, and for a key that is neither computed nor known to change nothing.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{where}: model_type {values.get('model_type')!r} is none of those known: {known}")
    try:
        hf = CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))  # with the family's own defaults
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    for key, expected in ONLY.items():
        if getattr(hf, key, expected) != expected:
            raise CheckpointError(f"{where}: {key} is {getattr(hf, key)!r}; only {expected!r} can be computed")
    family_keys = {*type(hf)().to_dict(), *type(hf).attribute_map, "head_dim"}
    for key, value in values.items():
        if value is not None and key not in family_keys | ROPE | WITHOUT_EFFECT | ONLY.keys():
            raise CheckpointError(
                f"{where}: {key} is {value!r}; transformers computes nothing of the kind in a {values['model_type']}, "
                f"and nor does brewjax. Take the key out if it changes nothing"
            )
    try:
        scaling = _rope_scaling(dict(hf.rope_parameters), hf.max_position_embeddings, where)
    except (ArithmeticError, TypeError) as error:
        raise CheckpointError(f"{where}: RoPE as {hf.rope_parameters} cannot be computed: {error}") from None
    experts, head_dim = None, getattr(hf, "head_dim", None)
    if family.experts:
        experts = {
            "num_experts": getattr(hf, family.experts[0]),
            "num_experts_per_tok": hf.num_experts_per_tok,
            "norm_topk_prob": getattr(hf, "norm_topk_prob", True),
            "router_aux_loss_coef": hf.router_aux_loss_coef,
        }
    return build_config(
        where,
        name=name,
        vocab_size=hf.vocab_size,
        d_model=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=hf.hidden_size // hf.num_attention_heads if head_dim is None else head_dim,
        d_ff=getattr(hf, family.experts[1] if family.experts else "intermediate_size"),
        experts=experts,
        rope_theta=hf.rope_parameters["rope_theta"],
        rope_scaling=scaling,
        max_seq_len=min(hf.max_position_embeddings, _window(hf, where) or hf.max_position_embeddings),
        norm_eps=hf.rms_norm_eps,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_head=hf.tie_word_embeddings,
    )


def _window(hf: PreTrainedConfig, where: str) -> int | None:
    """The shortest sliding window of the layers, in tokens; None if every layer attends to all tokens."""
    kinds = set(getattr(hf, "layer_types", None) or ["sliding_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"{where}: layer_types has {', '.join(sorted(kinds))}; only full and sliding are known")
    return getattr(hf, "sliding_window", None) if "sliding_attention" in kinds else None


def _rope_scaling(rope: dict[str, Any], positions: int, where: str) -> Any:
    """The fields of a `RopeScaling`, from transformers' `rope_parameters` (its modeling_rope_utils.py); or None."""
    pop_key, kind = rope.pop, rope.pop("rope_type", None)
    for key in ("type", "rope_theta"):
        pop_key(key, None)
    if pop_key("partial_rotary_factor", 1) not in (1, None):
        raise CheckpointError(f"{where}: partial_rotary_factor: heads are turned in full, or not at all")
    original, scaling = pop_key("original_max_position_embeddings", None), None
    if kind == "linear":
        scaling = {"type": kind, "factor": pop_key("factor")}
    elif kind == "llama3":
        scaling = {"type": kind, "factor": pop_key("factor"), "original_length": original}
        scaling |= {"low": pop_key("low_freq_factor"), "high": pop_key("high_freq_factor")}
    elif kind == "yarn":
        factor = pop_key("factor", None) or positions / original
        attention, scales = (
            pop_key("attention_factor", None),
            (pop_key("mscale", None), pop_key("mscale_all_dim", None)),
        )
        if attention is None and all(scales):
            up, down = (0.1 * scale * math.log(factor) + 1 for scale in scales)
            attention = up / down
        scaling = {"type": kind, "factor": factor, "original_length": original, "attention": attention}
        scaling |= {"fast": pop_key("beta_fast", None) or 32, "slow": pop_key("beta_slow", None) or 1}
        scaling["truncate"] = pop_key("truncate", True)
    elif kind == "longrope" and rope.get("short_factor") == rope.get("long_factor"):
        factor = pop_key("factor", None) or positions / original
        attention = pop_key("attention_factor", None) or math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        if attention != 1:
            raise CheckpointError(f"{where}: an attention_factor of {attention} with longrope cannot be computed")
        scaling = {"type": "factors", "factors": pop_key("short_factor")}
        pop_key("long_factor")
    elif kind != "default":
        known = "default, linear, llama3, yarn, and longrope where its short_factor is its long_factor"
        raise CheckpointError(f"{where}: RoPE of type {kind!r} cannot be computed; known: {known}")
    if unread := [key for key, value in rope.items() if value is not None]:
        raise CheckpointError(f"{where}: RoPE of type {kind!r} with {', '.join(unread)} cannot be computed")
    return scaling


def _rope_to_hf(scaling: RopeScaling, positions: int) -> dict[str, Any]:
    """The inverse of `_rope_scaling`."""
    match scaling:
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case YarnScaling():
            values = {"rope_type": "yarn", "factor": scaling.factor, "beta_fast": scaling.fast}
            values |= {"beta_slow": scaling.slow, "truncate": scaling.truncate}
            values |= {"original_max_position_embeddings": scaling.original_length}
            return values | ({"attention_factor": scaling.attention} if scaling.attention else {})
        case FactorsScaling():
            values = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
            values["original_max_position_embeddings"] = positions
            return values | {key: list(scaling.factors) for key in ("short_factor", "long_factor")}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original_length,
    }


def find_family(config: ModelConfig) -> str:
    """Finds the family of transformers that computes what a model computes.

    Args:
      config: of the model.

    Returns:
      Its `model_type`, a key of `FAMILIES`.

    Raises:
      CheckpointError: there is none.
    """
    for model_type, family in FAMILIES.items():
        same = (family.qkv_bias, family.qk_norm, bool(family.experts)) == (
            config.qkv_bias,
            config.qk_norm,
            bool(config.experts),
        )
        if same and (model_type != "mixtral" or (config.experts and config.experts.norm_topk_prob)):
            return model_type
    raise CheckpointError(
        f"model '{config.name}': no family of transformers ({', '.join(FAMILIES)}) has its mix of "
        f"experts ({config.experts}), qkv_bias ({config.qkv_bias}) and qk_norm ({config.qk_norm})"
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, in keys that every release of transformers reads.

    Raises:
      CheckpointError: if the model is quantised, or no family computes it.
    """
    if config.quantized:
        raise CheckpointError(f"model '{config.name}' is quantised; export the model that it was made from")
    model_type = find_family(config)
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
        "max_position_embeddings": config.max_seq_len or LONGEST,
        "sliding_window": None,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_head,
        "torch_dtype": config.param_dtype,
    }
    if scaling := config.rope_scaling:
        values["rope_scaling"] = _rope_to_hf(scaling, config.max_seq_len or LONGEST)
    if config.experts and family.experts:
        values |= {
            family.experts[0]: config.experts.num_experts,
            family.experts[1]: config.d_ff,
            "num_experts_per_tok": config.experts.num_experts_per_tok,
            "router_aux_loss_coef": config.experts.router_aux_loss_coef,
        }
    if model_type == "qwen3_moe" and config.experts:
        values["norm_topk_prob"] = config.experts.norm_topk_prob
    return values


def tensor_names(config: ModelConfig) -> dict[str, Name]:
    """The names of transformers' tensors, by path of the parameter."""
    return NAMES | FAMILIES[find_family(config)].names
