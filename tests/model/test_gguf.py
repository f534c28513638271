"""Files of llama.cpp: their weights, their tokenizers, and every key in them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from brewjax.bundle.exchange import export_model, import_model
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model import gguf as gguf_module
from brewjax.model import huggingface
from brewjax.model.loading import CheckpointError
from brewjax.model.rope import FactorsScaling


def write_gguf(
    path: Path,
    kind: str = "Q8_0",
    pre: str = "smollm",
    architecture: str = "llama",
    keys: Mapping[str, object] = {},
    **changes: np.ndarray,
) -> dict[str, np.ndarray]:
    """A tiny random model as llama.cpp's converter writes it, with more `keys`; returns its weights as transformers has
    them, by their names without .weight."""
    D, H, K, E, F = 32, 4, 2, 8, 64
    if kind.endswith("_K"):
        D, E, F = 256, 64, 256
    random = np.random.default_rng(0)
    tokenizer = Tokenizer.byte_level().hf.backend_tokenizer
    vocabulary = tokenizer.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "Ye", "19"]
    shapes = {"token_embd": (len(tokens), D), "output_norm": (D,)}
    layer = {"attn_norm": (D,), "attn_q": (H * E, D), "attn_k": (K * E, D), "attn_v": (K * E, D)}
    layer |= {"attn_output": (D, H * E), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (H * E,), "attn_k.bias": (K * E,), "attn_v.bias": (K * E,)}
    if architecture == "qwen3":
        layer |= {"attn_q_norm": (E,), "attn_k_norm": (E,)}
    shapes |= {f"blk.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(2)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["Y e", "1 9"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(architecture == "llama")
    for key, value in keys.items():
        of_type = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        of_type[type(value)](key, value)
    for name, values in (weights | changes).items():
        heads = {"attn_q": H, "attn_k": K}.get(name.split(".")[-1]) if architecture == "llama" else None
        if heads:  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
            values = values.reshape(heads, 2, E // 2, D).swapaxes(1, 2).reshape(values.shape)
        dtype = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else kind]
        tensor = name if name.endswith(".bias") else f"{name}.weight"
        if kind.endswith("_K") and values.ndim > 1:  # which this package reads and does not write
            size, each = gguf.GGML_QUANT_SIZES[dtype]
            # No half of a number is above 1 then, wherever in a block its numbers of 16 bits are.
            stored = random.integers(0, 0x3C, (len(values), values.shape[1] // size * each)).astype(np.uint8)
            theirs = stored if not heads else stored.reshape(heads, E // 2, 2, -1).swapaxes(1, 2).reshape(stored.shape)
            weights[name] = gguf.dequantize(theirs, dtype)
        else:
            stored = gguf.quantize(values, dtype)
            weights[name] = gguf.dequantize(gguf.quantize(weights.get(name, values), dtype), dtype)
        writer.add_tensor(tensor, stored, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [(kind, "llama") for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")]
    + [("F32", "qwen2"), ("Q8_0", "qwen3")],
)
def test_a_gguf_file_has_the_weights_that_transformers_has(tmp_path, kind, architecture):
    weights = write_gguf(tmp_path / "tiny.gguf", kind, architecture=architecture)
    bundle = import_model(str(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert bundle.model.rope_theta == 50_000
    assert bundle.model.norm_eps == 1e-5
    export_model(tmp_path / "model", tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    names = huggingface.tensor_names(bundle.model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == architecture
    theirs = {name.template: names[path].template for path, name in gguf_module.NAMES.items()}
    assert len(out) == len(weights)
    for name, values in weights.items():
        layer = re.sub("[^0-9]", "", name)
        template = theirs[
            re.sub("[0-9]", "{}", name.removesuffix(".bias")) + (".bias" if ".bias" in name else ".weight")
        ]
        np.testing.assert_array_equal(out[template.format(layer)], values, err_msg=name)


@pytest.mark.parametrize(("pre", "digits"), [("smollm", ["1", "9", "9"]), ("gpt-2", ["19", "9"])])
def test_a_gguf_file_has_its_tokenizer(tmp_path, pre, digits):
    write_gguf(tmp_path / "tiny.gguf", pre=pre)
    tokenizer = gguf_module.GGUFFile(tmp_path / "tiny.gguf").tokenizer()
    (ids,) = tokenizer.encode(["Yes199<|im_end|>é\n"])
    assert tokenizer.hf.convert_ids_to_tokens(ids)[:-3] == ["Ye", "s", *digits, "<|im_end|>"]
    assert tokenizer.hf.decode(ids) == "Yes199<|im_end|>é\n"
    assert tokenizer.bos == [0]
    assert tokenizer.hf("s")["input_ids"][0] == 0
    assert tokenizer.clean("a<|im_end|>b") == "a b"


def test_what_cannot_be_read_of_a_gguf_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            import_model(str(path), tmp_path / "model")

    write_gguf(path, pre="tekken")
    refused("tiny.gguf: its tokenizer is 'gpt2', split as 'tekken'; read are 'gpt2'")
    monkeypatch.setattr(gguf_module, "TYPES", ("F32", "Q8_0"))
    write_gguf(path, "Q5_1")
    refused(r"tensor token_embd.weight is Q5_1; only F32, Q8_0 are read")
    write_gguf(path, attn_rot=np.ones(4, np.float32))
    refused(r"tensor attn_rot.weight \[4\] has no place")
    path.write_bytes(path.read_bytes()[:-1000])
    refused("tiny.gguf: not a complete GGUF file")
    path.write_bytes(b"not one")
    refused("tiny.gguf: not a complete GGUF file")
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused("its architecture is 'gemma3'; of GGUF files those of llama, qwen2, qwen3 are read")


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
YARN |= {"llama.rope.scaling.original_context_length": 32}


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.factor": 4.0}, {"type": "linear", "factor": 4}),
        ({"llama.rope.scale_linear": 4.0}, {"type": "linear", "factor": 4}),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, {"type": "linear", "factor": 2}),
        (YARN, {"type": "yarn", "factor": 4, "original_length": 32}),
        (
            YARN | {"llama.rope.scaling.yarn_beta_fast": 3.0, "llama.rope.scaling.yarn_beta_slow": 0.5},
            {"type": "yarn", "factor": 4, "original_length": 32, "fast": 3, "slow": 0.5},
        ),
    ],
)
def test_rope_is_scaled_as_a_gguf_file_says(tmp_path, keys, scaling):
    write_gguf(tmp_path / "tiny.gguf", keys=keys)
    actual = gguf_module.GGUFFile(tmp_path / "tiny.gguf").config("tiny").rope_scaling
    assert (actual and actual.model_dump(exclude_defaults=True, exclude_none=True)) == scaling


def test_the_factors_in_a_gguf_file_are_those_of_its_model(tmp_path):
    """llama.cpp's converter writes Llama 3.1's scaling so."""
    write_gguf(tmp_path / "tiny.gguf", rope_freqs=np.array([1, 1.5, 4, 8], np.float32))
    bundle = import_model(str(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert bundle.model.rope_scaling == FactorsScaling(type="factors", factors=(1, 1.5, 4, 8))
    export_model(tmp_path / "model", tmp_path / "out")
    assert huggingface.read_config(tmp_path / "out", "tiny").rope_scaling == bundle.model.rope_scaling


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"llama.rope.scaling.type": "longrope"},
            "llama.rope.scaling.type is 'longrope'; none, linear and yarn can be",
        ),
        ({"llama.rope.scaling.attn_factor": 1.5}, "llama.rope.scaling.attn_factor is 1.5; only 1 can be computed"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4; only 8 can be computed"),
        ({"llama.attention.value_length": 16}, "llama.attention.value_length is 16; only 8 can be computed"),
        ({"llama.attention.key_length": 7}, "head_dim: input should be a multiple of 2, found 7"),
        ({"llama.attention.causal": False}, "llama.attention.causal is False; only True can be computed"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; only 0 can be computed"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5, which is not known here"),
        ({"llama.vocab_size": 7}, r"llama.vocab_size is 7, but token_embd.weight has \d+ rows"),
        ({"rope.scaling.type": "linear"}, "rope.scaling.type is 'linear', which is not known here"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix is True; only False can be computed"),
        ({"split.count": 2}, "split.count is 2; only 1 can be computed"),
        ({"general.type": "adapter"}, "general.type is 'adapter'; only 'model' can be computed"),
    ],
)
def test_a_key_that_asks_for_something_else_is_refused(tmp_path, keys, message):
    write_gguf(tmp_path / "tiny.gguf", keys=keys)
    with pytest.raises(CheckpointError, match=f"tiny.gguf: .*{message}"):
        gguf_module.GGUFFile(tmp_path / "tiny.gguf").config("tiny")


@pytest.mark.parametrize(
    "keys",
    [{"tokenizer.ggml.padding_token_id": 9999}, {"llama.attention.sliding_window": "a"}],
)
def test_a_key_that_makes_no_sense_ends_in_a_line(tmp_path, keys):
    write_gguf(tmp_path / "tiny.gguf", keys=keys)
    with pytest.raises(CheckpointError, match=r"tiny.gguf: "):
        import_model(str(tmp_path / "tiny.gguf"), tmp_path / "model")


def test_keys_without_effect_are_let_by(tmp_path):
    keys = {"general.name": "Tiny", "general.quantization_version": 2, "llama.rope.scaling.finetuned": True}
    keys |= {"tokenizer.ggml.eot_token_id": 2, "quantize.imatrix.file": "i.dat", "llama.rope.dimension_count": 8}
    write_gguf(tmp_path / "tiny.gguf", keys=keys)
    assert gguf_module.GGUFFile(tmp_path / "tiny.gguf").config("tiny").rope_scaling is None
