"""The layout of arrays on a mesh: a `Sharding` maps the model's axis names to mesh axes; models never name devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pydantic
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from brewjax.config import Config

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")  # the first two may lie across slices; fields of MeshConfig
BATCH_AXES = ("data", "fsdp", "expert")  # the mesh axes that share the rows of a batch


class MeshConfig(Config):
    """Number of devices along each mesh axis."""

    data: int = pydantic.Field(default=-1, ge=-1)
    """Devices that share the rows of a batch and hold copies of the weights; -1 for all that remain."""
    fsdp: int = pydantic.Field(default=1, gt=0)
    """Devices that share the rows of a batch and the weights (fully sharded data parallelism)."""
    expert: int = pydantic.Field(default=1, gt=0)
    """Devices that share the rows of a batch and the experts."""
    context: int = pydantic.Field(default=1, gt=0)
    """Devices that share the tokens of a row (sequence parallelism)."""
    tensor: int = pydantic.Field(default=1, gt=0)
    """Devices that share heads, neurons and vocabulary (tensor parallelism)."""
    slices: int | None = pydantic.Field(default=None, gt=0)
    """Groups of chips that are joined by a slower network. By default the devices' own slices; if they report none, so
    many groups of equal size in the order of the devices. Only `data`, and `fsdp` if `data` is too small, lie across
    slices."""

    def build(self, over: Sequence[jax.Device] | None = None) -> Mesh:
        """Lays the mesh over devices, with explicit axis types.

        Args:
          over: its devices; by default all of them.

        Returns:
          The mesh, with the axes MESH_AXES; an axis that lies across slices has its slices first.

        Raises:
          ValueError: if the product of the axes is not the number of devices, or they cannot be laid over the chips.
        """
        devices = jax.devices() if over is None else over
        shape = {axis: getattr(self, axis) for axis in MESH_AXES}
        rest = math.prod(size for axis, size in shape.items() if axis != "data")
        data = len(devices) // rest if self.data == -1 else self.data
        sizes = tuple((shape | {"data": data}).values())
        mesh = "mesh " + " ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        if data * rest != len(devices):
            raise ValueError(
                f"{mesh} does not make use of {len(devices)} devices: their product must be the number of devices"
            )
        slices = self._slices(devices)
        across = (math.gcd(data, len(slices)), len(slices) // math.gcd(data, len(slices)))
        if self.fsdp % across[1]:
            raise ValueError(
                f"{mesh} cannot be laid over {len(slices)} slices of {len(slices[0])} devices: data x fsdp must be a "
                f"multiple of {len(slices)}, for only these axes lie across slices"
            )
        within = (data // across[0], self.fsdp // across[1], *sizes[2:])
        types = (AxisType.Explicit,) * len(sizes)
        try:
            grids = np.stack(
                [jax.make_mesh(within, MESH_AXES, types, devices=slice_devices).devices for slice_devices in slices]
            )
        except NotImplementedError as error:  # an axis that is no product of the chips' own axes
            sides = "the size of an axis must be a product of sides of the chips' own grid"
            raise ValueError(f"{mesh} cannot be laid over these chips: {sides} ({error})") from None
        grid = grids.reshape(*across, *within).swapaxes(1, 2).reshape(sizes)  # an axis: first slices, then within them
        return Mesh(grid, MESH_AXES, axis_types=types)

    def _slices(self, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
        """The devices of each slice."""
        devices_by_slice: dict[int, list[jax.Device]] = {}
        for device in devices:
            devices_by_slice.setdefault(getattr(device, "slice_index", 0), []).append(device)
        if len(devices_by_slice) == 1:  # one slice, or the devices report none
            num_slices = self.slices or 1
            if len(devices) % num_slices:
                raise ValueError(f"{len(devices)} devices cannot be {num_slices} slices of equal size")
            size = len(devices) // num_slices
            return [list(devices[start : start + size]) for start in range(0, len(devices), size)]
        if self.slices not in (None, len(devices_by_slice)):
            raise ValueError(f"slices is {self.slices}, but the devices lie on {len(devices_by_slice)} slices")
        if len({len(slice_devices) for slice_devices in devices_by_slice.values()}) > 1:
            lengths = ", ".join(str(len(devices_by_slice[index])) for index in sorted(devices_by_slice))
            raise ValueError(f"slices must have as many devices each, and have {lengths}")
        return [devices_by_slice[index] for index in sorted(devices_by_slice)]


def data_parallel_size(mesh: Mesh) -> int:
    """The number of devices of `mesh` that the rows of a batch are split over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A strategy: `rules` lists the mesh axes that each of the model's axes is split over."""

    rules: Mapping[str, tuple[str, ...]]

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Makes the PartitionSpec of an array.

        Args:
          axes: names of the array's axes; None for one that is not split.

        Returns:
          The spec.

        Raises:
          ValueError: if a name has no rule, or a mesh axis would be used twice.
        """
        used: list[str] = []
        entries = []
        for axis in axes:
            if axis is not None and axis not in self.rules:
                raise ValueError(f"no sharding rule for axis '{axis}'; rules: {', '.join(self.rules)}")
            mesh_axes = self.rules[axis] if axis is not None else ()
            if repeated := set(mesh_axes) & set(used):
                raise ValueError(f"axes {axes}: mesh axis '{repeated.pop()}' is used twice")
            used += mesh_axes
            entries.append(mesh_axes or None)
        return PartitionSpec(*entries)

    def spec_or_none(self, *axes: str | None) -> PartitionSpec | None:
        """As `spec`, of the same `axes`, or None if no mesh is set."""
        return None if jax.sharding.get_abstract_mesh().empty else self.spec(*axes)

    def reshard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Lays an array out over the mesh in context.

        Args:
          x: any array.
          axes: as of `spec`.

        Returns:
          `x` [axes], laid out; unchanged if no mesh is set.
        """
        spec = self.spec_or_none(*axes)
        return x if spec is None else jax.reshard(x, spec)

    def named(self, mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
        """Makes the sharding of an array.

        Args:
          mesh: its devices.
          shape: of the array.
          axes: a name of `rules` for each axis; None for one that is not split.

        Returns:
          The sharding.

        Raises:
          ValueError: an axis does not divide over its devices.
        """
        spec = self.spec(*axes)
        for size, axis in zip(shape, axes, strict=True):
            mesh_axes = self.rules[axis] if axis is not None else ()
            num_shards = math.prod(mesh.shape[name] for name in mesh_axes)
            if size % num_shards:
                raise ValueError(
                    f"axis '{axis}' of size {size} does not divide over {num_shards} devices of {mesh_axes}"
                )
        return NamedSharding(mesh, spec)


# Fully sharded data parallel (ZeRO-3) with tensor parallel heads and neurons (Megatron): weights are split over
# `fsdp` along the model dimension and gathered layer by layer; activations over the other axes along the batch. Each
# expert is on one device of those along `expert`, whose tokens come to it. The tokens of a row lie over `context`; for
# attention each device there gathers the keys and values of them all.
FSDP_TENSOR = Sharding(
    {
        "batch": BATCH_AXES,
        "length": ("context",),
        "model": (),
        "weight": ("fsdp",),
        "heads": ("tensor",),
        "neurons": ("tensor",),
        "experts": ("expert",),
        "vocab": ("tensor",),
        "layers": (),
    }
)
