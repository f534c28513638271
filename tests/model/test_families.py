"""Every family against what torch computes, and its checkpoints in and out."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from brewjax.model.config import ModelConfig
from brewjax.model.families import FAMILIES, config_to_hf
from brewjax.model.huggingface import read_config, read_params, write
from brewjax.model.params import Params, bind
from brewjax.model.sharding import MeshConfig
from pallas_kernels.token_labels import ALL, PADDING, TokenLabels

GOLDENS = Path(__file__).with_name("goldens")
NAMES = sorted(path.name for path in GOLDENS.iterdir())
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def read(folder: Path) -> tuple[ModelConfig, Params]:
    config = read_config(folder, folder.name)
    return config, read_params(folder, config, MeshConfig().build())


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params: Params, tokens, positions, token_labels):
    decoder = bind(config, params)
    return decoder.logits(decoder(tokens, positions, token_labels))


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name):
    config, params = read(GOLDENS / name)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)  # off the mesh
    with np.load(GOLDENS / name / "golden.npz") as golden:
        ids, expected, greedy = golden["ids"], golden["logits"], golden["greedy"]
    rows, start = ids.shape
    length = start + greedy.shape[1]
    tokens = np.pad(ids, ((0, 0), (0, greedy.shape[1])))
    for end in range(start, length):
        real = np.broadcast_to(np.arange(length) < end, tokens.shape)
        token_labels = TokenLabels(np.where(real, 1, PADDING), 0 * tokens, np.full_like(tokens, ALL))
        positions = np.broadcast_to(np.arange(length), tokens.shape)
        logits = np.asarray(logits_of(config, params, tokens, positions, token_labels))
        if end == start:
            np.testing.assert_allclose(logits[:, :start], expected, atol=1e-4)
        tokens[:, end] = logits[:, end - 1].argmax(-1)
    np.testing.assert_array_equal(tokens[:, start:], greedy)
    assert len({*greedy.ravel().tolist()}) > rows  # it says more than one thing


def test_goldens_hold_every_family():
    models = {json.loads((GOLDENS / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert models == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_is_bit_equal(name, tmp_path):
    config, params = read(GOLDENS / name)
    write(tmp_path, config, params, NO_TOKENS)
    read_back, same = read(tmp_path)
    assert read_back == config.model_copy(update={"name": tmp_path.name})
    jax.tree.map(np.testing.assert_array_equal, same, params)
    theirs = {name: array for file in (GOLDENS / name).glob("*.safetensors") for name, array in load_file(file).items()}
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, array in theirs.items():
        np.testing.assert_array_equal(ours[tensor], array)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_a_written_config(name, tmp_path):
    config = read_config(GOLDENS / name, name)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    theirs, original = (transformers.AutoConfig.from_pretrained(folder) for folder in (tmp_path, GOLDENS / name))
    assert theirs.rope_parameters.items() >= original.rope_parameters.items()
    assert theirs.tie_word_embeddings == (original.tie_word_embeddings and name != "llama-untied")
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(theirs, key) == getattr(original, key), key
    assert theirs.dtype == "float32"
    for key in ("num_local_experts", "num_experts_per_tok"):
        assert getattr(theirs, key, None) == getattr(original, key, None), key
    assert getattr(theirs, "norm_topk_prob", None) == getattr(original, "norm_topk_prob", None)
