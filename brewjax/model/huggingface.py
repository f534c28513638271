"""Folders of Hugging Face models (config.json and safetensors): read into sharded parameters, and written."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from brewjax.model.config import Dtype, ModelConfig
from brewjax.model.families import config_from_hf, config_to_hf, names_of
from brewjax.model.loading import CheckpointError, Name, Stored, load
from brewjax.model.params import Params

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}  # what keeps every value of each
FILE_BYTES = 2 << 30  # a written file's size; so much is held in memory
# Old releases saved the rotary frequencies; a head that is tied may be saved all the same.
IGNORED = {True: re.compile(r"rotary_emb\.inv_freq$|^lm_head\.weight$"), False: re.compile(r"rotary_emb\.inv_freq$")}


def read_config(folder: Path, name: str) -> ModelConfig:
    """The model that a folder holds; CheckpointError where no family matches. Reads no weights but their headers."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {CONFIG} there; expected a folder as transformers saves models")
    config = config_from_hf(_read_json(folder / CONFIG), name, str(folder / CONFIG))
    kinds = {dtype for _, _, dtype in _headers(folder).values()}
    dtype: Dtype = "bfloat16" if kinds == {"BF16"} else "float32"
    return config.model_copy(update={"param_dtype": dtype, "compute_dtype": dtype})


def read_params(folder: Path, config: ModelConfig, mesh: Mesh) -> Params:
    """The weights, in `config.param_dtype`, over `mesh`; CheckpointError names file and tensor of what is wrong."""
    stored = {
        name: Stored(str(file), shape, functools.partial(_read_tensor, file, name))
        for name, (file, shape, _) in _headers(folder).items()
    }
    return load(config, names_of(config), stored, IGNORED[config.tie_head], mesh)


def _headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """File, shape and dtype of every tensor."""
    if (folder / INDEX).is_file():
        files = sorted({folder / file for file in _read_json(folder / INDEX)["weight_map"].values()})
    else:
        files = [folder / WEIGHTS]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder}: no {', '.join(missing)} there; only safetensors are read")
    headers = {}
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    headers[name] = (file, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from None
    for name, (file, _, dtype) in headers.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} is {dtype}; only {', '.join(DTYPES)} are read")
    return headers


def _read_tensor(file: Path, name: str) -> np.ndarray:
    # Opened for one tensor: what was read of a file stays in memory for as long as it is open.
    with safe_open(file, "numpy") as opened:
        return opened.get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def write(folder: Path, config: ModelConfig, params: Params, tokens: dict[str, int | None]) -> None:
    """Writes config.json and the weights, bit for bit, as `AutoModelForCausalLM.from_pretrained` opens them.

    Args:
      tokens: the config's bos_token_id, eos_token_id and pad_token_id.
    """
    values, names = config_to_hf(config) | tokens, names_of(config)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    files: list[dict[str, tuple[Name, jax.Array, tuple[int, ...]]]] = [{}]
    size = total = 0
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in leaves:
        name = names["/".join(key.key for key in path)]
        entry = math.prod(leaf.shape[name.stacked :]) * leaf.dtype.itemsize
        for index, tensor in name.tensors(leaf.shape):
            if size and size + entry > FILE_BYTES:
                files, size = [*files, {}], 0
            files[-1][tensor] = (name, leaf, index)
            size, total = size + entry, total + entry
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        arrays = {tensor: name.to_theirs(np.asarray(leaf[index])) for tensor, (name, leaf, index) in tensors.items()}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(files) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index_file, indent=2) + "\n")
