"""Loads another program's weights, tensor by tensor, into sharded parameters: the host never holds them all."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import Mesh, NamedSharding

from brewjax.model.config import ModelConfig
from brewjax.model.params import Params, abstract_params

MAX_PROBLEMS = 10  # named in one error


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names file and tensor, and what would be right."""


def build_config(where: str, **values: Any) -> ModelConfig:
    """Makes a config of a file's values.

    Args:
      where: the file, for errors.
      values: the fields of the config.

    Returns:
      The config.

    Raises:
      CheckpointError: beginning with `where`; names each invalid value.
    """
    try:
        return ModelConfig(**values)
    except pydantic.ValidationError as error:
        problems = [
            f"{'.'.join(map(str, ModelConfig.place(problem['loc'], values)))}: "
            f"{problem['msg'][0].lower()}{problem['msg'][1:]}, found {problem['input']!r}"
            if problem["loc"]
            else problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
        raise CheckpointError(f"{where}: {'; '.join(problems)}") from None


@dataclasses.dataclass(frozen=True)
class Name:
    """The names and the layout of another program's tensors for one of our parameters.

    Attributes:
      template: the tensors' name, with a {} for each axis that our parameter stacks them along: layer, expert.
      inputs: how many of the other axes are inputs of a matrix, which is stored as [outputs, inputs]; 0 for a vector;
        None for a table [tokens, features], which is stored like ours.
    """

    template: str
    inputs: int | None = 0

    @property
    def stacked(self) -> int:
        """The number of leading axes of our parameter whose entries are tensors of their own."""
        return self.template.count("{}")

    def tensors(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Index in a parameter of this shape, and name, of each of its tensors."""
        for index in np.ndindex(shape[: self.stacked]):
            yield index, self.template.format(*index)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor of a parameter of this shape."""
        entry_shape = shape[self.stacked :]
        if self.inputs is None:
            return entry_shape
        sizes = (math.prod(entry_shape[self.inputs :]), math.prod(entry_shape[: self.inputs]))
        return sizes if self.inputs else sizes[:1]

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as an entry of a parameter of this shape."""
        return (tensor if self.inputs is None else tensor.T).reshape(shape[self.stacked :])

    def to_theirs(self, entry: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.inputs is None:
            return entry
        sizes = (math.prod(entry.shape[: self.inputs]), math.prod(entry.shape[self.inputs :]))
        return np.ascontiguousarray(entry.reshape(sizes).T) if self.inputs else entry.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: what its header says, and how to read it."""

    file: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def load(
    config: ModelConfig, names: Mapping[str, Name], stored: Mapping[str, Stored], ignored: re.Pattern, mesh: Mesh
) -> Params:
    """Creates each parameter on its devices and fills it one tensor at a time.

    Args:
      config: the model.
      names: by path of the parameter, such as "layers/query".
      stored: every tensor of the checkpoint.
      ignored: names of tensors that the model does not need.
      mesh: the devices.

    Raises:
      CheckpointError: before anything is read, for tensors that are missing, unknown or of a wrong shape; later, for a
        tensor that holds NaN or infinity.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, mesh))
    ours = [(names["/".join(key.key for key in path)], leaf) for path, leaf in leaves]
    _check(ours, stored, ignored)
    return jax.tree.unflatten(tree, [_fill(name, leaf, stored) for name, leaf in ours])


def _check(ours: list[tuple[Name, jax.ShapeDtypeStruct]], stored: Mapping[str, Stored], ignored: re.Pattern) -> None:
    expected = {tensor: name.their_shape(leaf.shape) for name, leaf in ours for _, tensor in name.tensors(leaf.shape)}
    files = ", ".join(sorted({tensor.file for tensor in stored.values()}))
    problems = []
    for tensor, shape in expected.items():
        if tensor not in stored:
            problems.append(f"{files}: tensor {tensor} {list(shape)} is missing")
        elif stored[tensor].shape != shape:
            tensor_in_file = stored[tensor]
            file, actual = tensor_in_file.file, list(tensor_in_file.shape)
            problems.append(f"{file}: tensor {tensor} is {actual}, its config makes it {list(shape)}")
    for tensor, tensor_in_file in stored.items():
        if tensor not in expected and not ignored.search(tensor):
            problems.append(
                f"{tensor_in_file.file}: tensor {tensor} {list(tensor_in_file.shape)} has no place in this model"
            )
    if problems:
        rest = len(problems) - MAX_PROBLEMS
        raise CheckpointError("\n".join(problems[:MAX_PROBLEMS] + ([f".. and {rest} more"] if rest > 0 else [])))


def _fill(name: Name, leaf: jax.ShapeDtypeStruct, stored: Mapping[str, Stored]) -> jax.Array:
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    entry_sharding = NamedSharding(sharding.mesh, jax.P(*sharding.spec[name.stacked :]))
    # On a CPU, XLA updates a bfloat16 array by way of a float32 copy of all of it; it updates integers in place.
    as_bits = leaf.dtype == jnp.bfloat16 and sharding.mesh.devices.flat[0].platform == "cpu"
    dtype = np.dtype(np.uint16) if as_bits else leaf.dtype
    stack = jax.jit(functools.partial(jnp.zeros, leaf.shape, dtype), out_shardings=sharding)()
    for index, tensor in name.tensors(leaf.shape):
        entry = name.to_ours(stored[tensor].read(), leaf.shape)
        placed = jax.make_array_from_callback(entry.shape, entry_sharding, entry.__getitem__)
        stack, fine = _put(stack, placed, np.array(index, np.int32), sharding, leaf.dtype)
        if not fine:  # this waits for the device: the next tensor is read only when this one is freed
            raise CheckpointError(f"{stored[tensor].file}: tensor {tensor} holds NaN or infinity")
    if not as_bits:
        return stack
    shards = [
        jax.device_put(np.asarray(shard.data).view(leaf.dtype), shard.device) for shard in stack.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _put(
    stack: jax.Array, entry: jax.Array, index: jax.Array, sharding: NamedSharding, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """The stack with the entry written at `index`, and whether the entry is finite throughout.

    The stack is sharded by `sharding`; it is of `dtype`, or holds the bits of `dtype` as integers.
    """
    spec, depth = sharding.spec, index.size
    fine = jnp.isfinite(entry).all()
    entry = entry.astype(dtype)
    if stack.dtype != dtype:
        entry = jax.lax.bitcast_convert_type(entry, stack.dtype)

    def local(stack: jax.Array, entry: jax.Array, index: jax.Array) -> jax.Array:
        # The index among this device's layers and experts, if the entry belongs to it.
        sizes = np.array(stack.shape[:depth], np.int32)
        shard_indices = [jax.lax.axis_index(axes) if axes else 0 for axes in spec[:depth]]
        local_index = index - sizes * jnp.array(shard_indices, jnp.int32)
        is_local = jnp.all((local_index >= 0) & (local_index < sizes))
        start = [*jnp.clip(local_index, 0, sizes - 1), *[0] * entry.ndim]
        previous = jax.lax.dynamic_slice(stack, start, [1] * depth + list(entry.shape))
        updated = jnp.where(is_local, entry.reshape(previous.shape), previous)
        return jax.lax.dynamic_update_slice(stack, updated, start)

    specs = (spec, jax.P(*spec[depth:]), jax.P())
    put = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return put(stack, entry, index), fine
