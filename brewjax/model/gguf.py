"""llama.cpp's files (GGUF) of the llama architecture: weights, dequantised into sharded parameters, and tokenizer."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from jax.sharding import Mesh
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from brewjax.data.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.model.loading import CheckpointError, Name, Stored, load
from brewjax.model.params import Params

LAYER = "blk.{}."
NAMES = {
    "embedding": Name("token_embd.weight", None),
    "layers/attention_norm/scale": Name(LAYER + "attn_norm.weight"),
    "layers/query": Name(LAYER + "attn_q.weight", 1),
    "layers/key": Name(LAYER + "attn_k.weight", 1),
    "layers/value": Name(LAYER + "attn_v.weight", 1),
    "layers/output": Name(LAYER + "attn_output.weight", 2),
    "layers/mlp_norm/scale": Name(LAYER + "ffn_norm.weight"),
    "layers/gate": Name(LAYER + "ffn_gate.weight", 1),
    "layers/up": Name(LAYER + "ffn_up.weight", 1),
    "layers/down": Name(LAYER + "ffn_down.weight", 1),
    "norm/scale": Name("output_norm.weight"),
    "untied_head": Name("output.weight", None),
}
TYPES = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0")
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are found in a text before it is split
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is split before bytes are merged, by tokenizer.ggml.pre; the last step is always bytes.
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


class GGUFFile:
    """An open file; CheckpointError names what is wrong with it."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: not a whole GGUF file: {error}") from None
        if (architecture := self._value("general.architecture")) != "llama":
            raise CheckpointError(f"{path}: its architecture is {architecture!r}; of GGUF files, only 'llama' is read")

    def config(self, name: str) -> ModelConfig:
        """The model; its weights are float32."""
        value = functools.partial(self._value, prefix="llama.")
        heads, d_model = value("attention.head_count"), value("embedding_length")
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if "token_embd.weight" not in tensors:
            raise CheckpointError(f"{self._path}: tensor token_embd.weight is missing")
        return ModelConfig(
            name=name,
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            d_model=d_model,
            layers=value("block_count"),
            heads=heads,
            kv_heads=value("attention.head_count_kv", heads),
            head_dim=value("rope.dimension_count", d_model // heads),
            d_ff=value("feed_forward_length"),
            rope_base=value("rope.freq_base", 10_000.0),
            max_context=value("context_length"),
            norm_eps=round(value("attention.layer_norm_rms_epsilon"), 12),  # 1e-5 as float32 is 9.999999747e-06
            tie_head="output.weight" not in tensors,
        )

    def params(self, config: ModelConfig, mesh: Mesh) -> Params:
        """The weights, dequantised, in `config.param_dtype`, over `mesh`."""
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
        stored = {}
        for tensor in self._reader.tensors:
            if tensor.tensor_type.name not in TYPES:
                raise CheckpointError(
                    f"{self._path}: tensor {tensor.name} is {tensor.tensor_type.name}; only {', '.join(TYPES)} are read"
                )
            turned = next((count for part, count in heads.items() if f".{part}." in tensor.name), None)
            shape = tuple(int(size) for size in tensor.shape[::-1])
            read = functools.partial(_read, tensor, shape, turned)
            stored[tensor.name] = Stored(str(self._path), shape, read)
        return load(config, NAMES, stored, re.compile(r"(?!)"), mesh)

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE in the file; CheckpointError where it is of another kind."""
        value = functools.partial(self._value, prefix="tokenizer.")
        kind, split = value("ggml.model"), value("ggml.pre", "gpt-2")
        if kind != "gpt2" or split not in SPLITS:
            raise CheckpointError(
                f"{self._path}: its tokenizer is {kind!r}, split as {split!r}; read are 'gpt2' (byte-level BPE), split "
                f"as {', '.join(SPLITS)}. Import this model from its safetensors"
            )
        tokens, merges = value("ggml.tokens"), [tuple(merge.split(" ")) for merge in value("ggml.merges")]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        # Llama 3 takes a word that is a token as it is, whichever merges lead to it.
        bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
        bpe.decoder = decoders.ByteLevel()
        for token, of_kind in zip(tokens, value("ggml.token_type"), strict=True):
            if of_kind in (CONTROL, USER_DEFINED):
                bpe.add_tokens([AddedToken(token, special=of_kind == CONTROL, normalized=False)])
        ids = {name: value(f"ggml.{name}_token_id", None) for name in ("bos", "eos", "padding", "unknown")}
        bos, eos, padding, unknown = (None if number is None else tokens[number] for number in ids.values())
        if value("ggml.add_bos_token", False):
            bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids["bos"])])
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
    """float32 [outputs, inputs]; of queries and keys, rotary pairs as halves, which llama.cpp has side by side."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32, copy=False)
    if heads is None:
        return values
    return values.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
