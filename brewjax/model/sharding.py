"""How arrays lie on a mesh: one object maps the model's axis names to mesh axes; models never name devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import pydantic
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from brewjax.config import Config

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
ROWS = ("data", "fsdp", "expert")  # the mesh axes that share the rows of a batch


class MeshConfig(Config):
    """Devices along each mesh axis; -1 for `data` takes all that are left.

    `data`, `fsdp` and `expert` share the rows of a batch, `context` the tokens of each row, `tensor` the heads.
    """

    data: int = -1
    fsdp: int = pydantic.Field(default=1, gt=0)
    expert: int = pydantic.Field(default=1, gt=0)
    context: int = pydantic.Field(default=1, gt=0)
    tensor: int = pydantic.Field(default=1, gt=0)

    def build(self, over: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh, with explicit axis types; ValueError where the devices do not divide.

        `over` are the devices, all that there are by default.
        """
        devices = jax.device_count() if over is None else len(over)
        rest = self.fsdp * self.expert * self.context * self.tensor
        data = devices // rest if self.data == -1 else self.data
        shape = (data, self.fsdp, self.expert, self.context, self.tensor)
        sizes = " ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        if data * rest != devices:
            raise ValueError(
                f"mesh {sizes} does not make use of {devices} devices: their product must be the number of devices"
            )
        try:
            return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape), devices=over)
        except NotImplementedError as error:  # an axis that is no product of the chips' own axes
            sides = "the size of an axis must be a product of sides of the chips' own grid"
            raise ValueError(f"mesh {sizes} cannot be laid over these chips: {sides} ({error})") from None


def row_ways(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch lie."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A strategy: the mesh axes that each of the model's axes is split over; names not listed are an error."""

    rules: Mapping[str, tuple[str, ...]]

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these axis names (None: not split)."""
        used: list[str] = []
        entries = []
        for axis in axes:
            if axis is not None and axis not in self.rules:
                raise ValueError(f"no sharding rule for axis '{axis}'; rules: {', '.join(self.rules)}")
            mesh_axes = self.rules[axis] if axis is not None else ()
            if taken := set(mesh_axes) & set(used):
                raise ValueError(f"axes {axes}: mesh axis '{taken.pop()}' is used twice")
            used += mesh_axes
            entries.append(mesh_axes or None)
        return PartitionSpec(*entries)

    def spec_or_none(self, *axes: str | None) -> PartitionSpec | None:
        """As `spec`, or None where no mesh is set."""
        return None if jax.sharding.get_abstract_mesh().empty else self.spec(*axes)

    def reshard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Lays `x` out by its axis names, or leaves it where no mesh is set."""
        spec = self.spec_or_none(*axes)
        return x if spec is None else jax.reshard(x, spec)

    def named(self, mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
        """The sharding of an array of this shape; ValueError names the dimension that does not divide."""
        spec = self.spec(*axes)
        for size, axis in zip(shape, axes, strict=True):
            mesh_axes = self.rules[axis] if axis is not None else ()
            ways = math.prod(mesh.shape[name] for name in mesh_axes)
            if size % ways:
                raise ValueError(f"axis '{axis}' of size {size} does not divide over {ways} devices of {mesh_axes}")
        return NamedSharding(mesh, spec)


# Fully sharded data parallel (ZeRO-3) with tensor parallel heads and neurons (Megatron): weights are split over
# `fsdp` along the model dimension and gathered layer by layer; activations over the other axes along the batch. Each
# expert is on one device of those along `expert`, whose tokens come to it. The tokens of a row lie over `context`; for
# attention each device there gathers the keys and values of them all.
FSDP_TENSOR = Sharding(
    {
        "batch": ROWS,
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
