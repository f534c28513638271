"""Reads llama.cpp's files (GGUF) of the Llama families: weights, dequantised into sharded parameters; tokenizer."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import tokenizers
from jax.sharding import Mesh
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.model.loading import CheckpointError, Name, Stored, build_config, load
from brewjax.model.params import Params

LAYER = "blk.{}."
NAMES = {
    "embedding": Name("token_embd.weight", None),
    "layers/attention_norm/scale": Name(LAYER + "attn_norm.weight"),
    "layers/query": Name(LAYER + "attn_q.weight", 1),
    "layers/key": Name(LAYER + "attn_k.weight", 1),
    "layers/value": Name(LAYER + "attn_v.weight", 1),
    "layers/query_bias": Name(LAYER + "attn_q.bias"),
    "layers/key_bias": Name(LAYER + "attn_k.bias"),
    "layers/value_bias": Name(LAYER + "attn_v.bias"),
    "layers/query_norm/scale": Name(LAYER + "attn_q_norm.weight"),
    "layers/key_norm/scale": Name(LAYER + "attn_k_norm.weight"),
    "layers/output": Name(LAYER + "attn_output.weight", 2),
    "layers/mlp_norm/scale": Name(LAYER + "ffn_norm.weight"),
    "layers/gate": Name(LAYER + "ffn_gate.weight", 1),
    "layers/up": Name(LAYER + "ffn_up.weight", 1),
    "layers/down": Name(LAYER + "ffn_down.weight", 1),
    "norm/scale": Name("output_norm.weight"),
    "untied_head": Name("output.weight", None),
}
FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies
TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0"),
)
CONTROL, USER_DEFINED = 3, 4  # types of tokens that are matched in a text before it is split
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Steps that split a text before bytes are merged, by tokenizer.ggml.pre; the last step is always bytes.
SPLITS: dict[str, list] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


SPLITS["qwen2"] = SPLITS["deepseek-r1-qwen"] = [
    pre_tokenizers.Split(Regex(QWEN2), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]
NORMALIZED = ("qwen2", "deepseek-r1-qwen")  # texts are normalised to NFC before they are split


class Architecture(NamedTuple):
    """Properties of a `general.architecture`.

    Attributes:
      side_by_side: rotary pairs lie next to each other in queries and keys, not in the two halves of a head.
      qkv_bias, qk_norm: whether its layers have these.
    """

    side_by_side: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    "llama": Architecture(side_by_side=True),
    "qwen2": Architecture(qkv_bias=True),
    "qwen3": Architecture(qk_norm=True),
}
# Keys, after the architecture's name, from which the config is computed,
COMPUTED = """
    context_length embedding_length block_count feed_forward_length vocab_size attention.head_count
    attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon attention.sliding_window
    rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scale_linear
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
""".split()  # noqa: SIM905
# keys that are supported with one value only ("head_dim" stands for the model's),
ONLY: dict[str, Any] = {
    "attention.causal": True,
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.remove_extra_whitespaces": False,
    "general.type": "model",
    "split.count": 1,
}
# and keys without effect. Any other is refused.
WITHOUT_EFFECT = re.compile(
    r"general\.|GGUF\.|split\.(no|tensors\.count)$|quantize\.|.*\.rope\.scaling\.finetuned$|tokenizer\.huggingface\.json$"
    r"|tokenizer\.chat_templates?(\.|$)|tokenizer\.ggml\.(model|pre|tokens|token_type|token_type_count|scores|merges)$"
    r"|tokenizer\.ggml\.(\w+_token_id|add_bos_token|add_eos_token|add_sep_token)$"
)


class GGUFFile:
    """An open GGUF file.

    Args:
      path: of the file.

    Raises:
      CheckpointError: from the constructor and every method, naming the file and what is wrong with it.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: not a complete GGUF file: {error}") from None
        self._name = self._value("general.architecture")
        if self._name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(
                f"{path}: its architecture is {self._name!r}; of GGUF files those of {known} are read"
            )
        self._architecture = ARCHITECTURES[self._name]

    def config(self, name: str) -> ModelConfig:
        """Reads the config of the model, with float32 weights.

        Args:
          name: of the model.

        Returns:
          The config.

        Raises:
          CheckpointError: a tensor or key is missing, or one is not read.
        """
        value = functools.partial(self._value, prefix=f"{self._name}.")
        heads, d_model, context = value("attention.head_count"), value("embedding_length"), value("context_length")
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if "token_embd.weight" not in tensors:
            raise CheckpointError(f"{self._path}: tensor token_embd.weight is missing")
        config = build_config(
            str(self._path),
            name=name,
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            d_model=d_model,
            layers=value("block_count"),
            heads=heads,
            kv_heads=value("attention.head_count_kv", heads),
            head_dim=value("attention.key_length", d_model // heads if isinstance(heads, int) and heads else 0),
            d_ff=value("feed_forward_length"),
            rope_theta=value("rope.freq_base", 10_000.0),
            rope_scaling=self._rope_scaling(tensors.get(FACTORS)),
            max_seq_len=min(context, value("attention.sliding_window", 0) or context),
            norm_eps=round(value("attention.layer_norm_rms_epsilon"), 12),  # 1e-5 as float32 is 9.999999747e-06
            qkv_bias=self._architecture.qkv_bias,
            qk_norm=self._architecture.qk_norm,
            tie_head="output.weight" not in tensors,
        )
        self._check_keys(config)
        return config

    def _check_keys(self, config: ModelConfig) -> None:
        """Raises CheckpointError for a key that is neither computed, nor at its only value, nor without effect."""
        if (stated := self._value(f"{self._name}.vocab_size", config.vocab_size)) != config.vocab_size:
            raise CheckpointError(
                f"{self._path}: {self._name}.vocab_size is {stated}, but token_embd.weight has {config.vocab_size} rows"
            )
        for key, field in self._reader.fields.items():
            short_key = key.removeprefix(f"{self._name}.")
            if short_key in ONLY:
                expected, value = ONLY[short_key], field.contents()
                expected = config.head_dim if expected == "head_dim" else expected
                if value != expected:
                    raise CheckpointError(f"{self._path}: {key} is {value!r}; only {expected!r} can be computed")
            elif not (short_key in COMPUTED and short_key != key) and not WITHOUT_EFFECT.match(key):
                raise CheckpointError(f"{self._path}: {key} is {field.contents()!r}, which is not known here")

    def _rope_scaling(self, factors: gguf.ReaderTensor | None) -> dict[str, Any] | None:
        """The fields of a `RopeScaling`, as llama.cpp reads them (a factor without a type is linear); or None."""
        value = functools.partial(self._value, prefix=f"{self._name}.rope.")
        factor = value("scaling.factor", 0) or value("scale_linear", 0) or 1
        kind = value("scaling.type", "linear")
        scaling = None
        if kind == "yarn":
            original = value("scaling.original_context_length", self._value(f"{self._name}.context_length"))
            scaling = {"type": kind, "factor": factor, "original_length": original}
            scaling |= {"fast": value("scaling.yarn_beta_fast", 32.0), "slow": value("scaling.yarn_beta_slow", 1.0)}
        elif kind == "linear":
            scaling = {"type": kind, "factor": factor} if factor != 1 else None
        elif kind != "none":
            raise CheckpointError(
                f"{self._path}: {self._name}.rope.scaling.type is {kind!r}; none, linear and yarn can be computed"
            )
        if factors is None:
            return scaling
        if scaling:
            raise CheckpointError(f"{self._path}: both {FACTORS} and rope.scaling.type {kind} cannot be computed")
        angle_factors = gguf.dequantize(factors.data, factors.tensor_type).ravel().tolist()
        return {"type": "factors", "factors": angle_factors} if set(angle_factors) != {1.0} else None

    def params(self, config: ModelConfig, mesh: Mesh) -> Params:
        """Reads the weights, dequantised.

        Args:
          config: as `config` returned it.
          mesh: that the weights are sharded over.

        Returns:
          The weights in `config.param_dtype`.

        Raises:
          CheckpointError: a tensor is missing, unknown, mis-shaped, not finite, or of a type that is not read.
        """
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads} if self._architecture.side_by_side else {}
        stored = {}
        for tensor in self._reader.tensors:
            if tensor.tensor_type.name not in TYPES:
                raise CheckpointError(
                    f"{self._path}: tensor {tensor.name} is {tensor.tensor_type.name}; only {', '.join(TYPES)} are read"
                )
            num_rotary_heads = next((count for part, count in heads.items() if f".{part}." in tensor.name), None)
            shape = tuple(int(size) for size in tensor.shape[::-1])
            read = functools.partial(_read, tensor, shape, num_rotary_heads)
            stored[tensor.name] = Stored(str(self._path), shape, read)
        return load(config, NAMES, stored, re.compile(re.escape(FACTORS)), mesh)

    def tokenizer(self) -> Tokenizer:
        """Reads the tokenizer in the file.

        Returns:
          The tokenizer.

        Raises:
          CheckpointError: it is not a byte-level BPE, or splits text in a way that is not read.
        """
        value = functools.partial(self._value, prefix="tokenizer.")
        kind, split = value("ggml.model"), value("ggml.pre", "gpt-2")
        if kind != "gpt2" or split not in SPLITS:
            raise CheckpointError(
                f"{self._path}: its tokenizer is {kind!r}, split as {split!r}; read are 'gpt2' (byte-level BPE), split "
                f"as {', '.join(SPLITS)}. Import this model from its safetensors"
            )
        tokens, merges = value("ggml.tokens"), [tuple(merge.split(" ")) for merge in value("ggml.merges")]
        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        # Llama 3 takes a word that is a token as it is, whatever its merges are.
        bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
        bpe.normalizer = normalizers.NFC() if split in NORMALIZED else None
        bpe.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
        bpe.decoder = decoders.ByteLevel()
        for token, token_type in zip(tokens, value("ggml.token_type"), strict=True):
            if token_type in (CONTROL, USER_DEFINED):
                bpe.add_tokens([AddedToken(token, special=token_type == CONTROL, normalized=False)])
        ids = {name: value(f"ggml.{name}_token_id", None) for name in ("bos", "eos", "padding", "unknown")}
        bos, eos, padding, unknown = (None if token_id is None else tokens[token_id] for token_id in ids.values())
        if bos is not None and value("ggml.add_bos_token", split == "llama-bpe"):
            bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids["bos"])])
        else:
            bpe.post_processor = processors.ByteLevel(trim_offsets=False)  # adds no tokens
        return Tokenizer(
            PreTrainedTokenizerFast(
                tokenizer_object=bpe,
                bos_token=bos,
                eos_token=eos,
                pad_token=padding,
                unk_token=unknown,
                chat_template=value("chat_template", None),
            )
        )

    def _value(self, key: str, *default: Any, prefix: str = "") -> Any:
        field = self._reader.get_field(prefix + key)
        if field is None and not default:
            raise CheckpointError(f"{self._path}: key {prefix}{key} is missing")
        return default[0] if field is None else field.contents()


def _read(tensor: gguf.ReaderTensor, shape: tuple[int, ...], heads: int | None) -> np.ndarray:
    """float32 [outputs, inputs]; with `heads`, llama.cpp's adjacent rotary pairs are moved to the halves of a head."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32, copy=False)
    if heads is None:
        return values
    return values.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
