"""Reads and writes folders of Hugging Face models (config.json and safetensors), to and from sharded parameters."""

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
from brewjax.model.families import NAMES, config_from_hf, config_to_hf, tensor_names
from brewjax.model.loading import CheckpointError, Name, Stored, load
from brewjax.model.params import Params

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # transformers would load this adapter on top of the weights
Headers = dict[str, tuple[Path, tuple[int, ...], str]]  # file, shape and dtype of each tensor
ROWS = 4096  # rows of embedding and head that are compared at a time
DTYPES = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}  # a dtype that holds every value of the stored one
FILE_BYTES = 2 << 30  # size of a written file, which is held in memory
# Old releases saved the rotary frequencies; a tied head may be saved although it is the embedding.
IGNORED = {True: re.compile(r"rotary_emb\.inv_freq$|^lm_head\.weight$"), False: re.compile(r"rotary_emb\.inv_freq$")}


def read_config(folder: Path, name: str) -> ModelConfig:
    """Reads the config of a model. Of the weights only headers are read (and a head, to compare it).

    Args:
      folder: as transformers saves models.
      name: what the model is to be called.

    Returns:
      The config, with the dtype of the weights: bfloat16 if all are, else float32.

    Raises:
      CheckpointError: if the folder is incomplete, has an adapter, or no family matches.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {CONFIG} there; expected a folder as transformers saves models")
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER}: an adapter beside the weights is not read; merge it into them first"
        )
    config, headers = config_from_hf(_read_json(folder / CONFIG), name, str(folder / CONFIG)), _headers(folder)
    kinds = {dtype for _, _, dtype in headers.values()}
    dtype: Dtype = "bfloat16" if kinds == {"BF16"} else "float32"
    tied = config.tie_head and not _has_own_head(headers)
    return config.model_copy(update={"param_dtype": dtype, "compute_dtype": dtype, "tie_head": tied})


def read_params(folder: Path, config: ModelConfig, mesh: Mesh) -> Params:
    """Reads the weights of a folder.

    Args:
      folder: as transformers saves models.
      config: as `read_config` returned it.
      mesh: that the weights are sharded over.

    Returns:
      The weights in `config.param_dtype`.

    Raises:
      CheckpointError: for a missing, unknown, mis-shaped or non-finite tensor; it names file and tensor.
    """
    stored = {
        name: Stored(str(file), shape, functools.partial(_read_tensor, file, name))
        for name, (file, shape, _) in _headers(folder).items()
    }
    return load(config, tensor_names(config), stored, IGNORED[config.tie_head], mesh)


def _has_own_head(headers: Headers) -> bool:
    """Whether a head is stored whose values differ from the embedding's: transformers uses it even if tied."""
    embedding, head = (NAMES[path].template for path in ("embedding", "untied_head"))
    if head not in headers or embedding not in headers:
        return False
    (file, *kind), (head_file, *head_kind) = headers[embedding], headers[head]
    if kind != head_kind:
        return True
    with safe_open(file, "numpy") as opened, safe_open(head_file, "numpy") as head_opened:
        values, head_values = opened.get_slice(embedding), head_opened.get_slice(head)
        rows = values.get_shape()[0]
        return any(
            not np.array_equal(values[start:end], head_values[start:end])
            for start in range(0, rows, ROWS)
            for end in [min(start + ROWS, rows)]
        )


def _headers(folder: Path) -> Headers:
    """File, shape and dtype of every tensor."""
    index = folder / INDEX
    weight_map = _weight_map(index) if index.is_file() else {}
    files = sorted({folder / file for file in weight_map.values()}) or [folder / WEIGHTS]
    if (folder / WEIGHTS).is_file() and folder / WEIGHTS not in files:
        raise CheckpointError(f"{index}: names other files than {WEIGHTS}, which is there too; delete the stale one")
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder}: no {', '.join(missing)} there; only safetensors are read")
    headers: Headers = {}
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in headers:
                        raise CheckpointError(f"{file}: tensor {name} is in {headers[name][0].name} too")
                    part = opened.get_slice(name)
                    headers[name] = (file, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from None
    for name, (file, _, dtype) in headers.items():
        if (indexed_file := weight_map.get(name, file.name)) != file.name:
            raise CheckpointError(f"{index}: is stale: tensor {name} is in {indexed_file} by it, and is in {file.name}")
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} is {dtype}; only {', '.join(DTYPES)} are read")
    return headers


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by the index."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map, of a file for each tensor, there")
    return weight_map


def _read_tensor(file: Path, name: str) -> np.ndarray:
    # Opened for each tensor: what was read of a file stays in memory as long as it is open.
    with safe_open(file, "numpy") as opened:
        return opened.get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def write(folder: Path, config: ModelConfig, params: Params, tokens: dict[str, int | None]) -> None:
    """Writes config.json and the weights, bit for bit, for `AutoModelForCausalLM.from_pretrained`.

    Args:
      folder: an existing folder.
      config, params: the model.
      tokens: bos_token_id, eos_token_id and pad_token_id of the config.

    Raises:
      CheckpointError: if the model is quantised, or no family computes it.
    """
    values, names = config_to_hf(config) | tokens, tensor_names(config)
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
    for file_index, tensors in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{file_index:05}-of-{len(files):05}.safetensors"
        arrays = {tensor: name.to_theirs(_entry(leaf, index)) for tensor, (name, leaf, index) in tensors.items()}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(files) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index_file, indent=2) + "\n")


def _entry(stack: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """One tensor of a stacked parameter, from the devices that hold its parts: the host never holds the stack."""
    depth, entry = len(index), np.empty(stack.shape[len(index) :], stack.dtype)
    for shard in stack.addressable_shards:
        ranges = [range(size)[part] for size, part in zip(stack.shape, shard.index, strict=True)]
        if shard.replica_id == 0 and all(at in rows for at, rows in zip(index, ranges[:depth], strict=True)):
            local_index = tuple(rows.index(at) for at, rows in zip(index, ranges[:depth], strict=True))
            entry[shard.index[depth:]] = np.asarray(shard.data[local_index])
    return entry
