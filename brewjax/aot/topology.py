"""TPU topologies to compile for without TPUs: chips by name, their properties, and abstract devices for `libtpu`."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """Properties of one device, as its maker states them.

    Attributes:
      hbm: bytes of memory that the compiler allows a program.
      flops: bfloat16 FLOPs per second.
      clock: cycles per second at which the matrix units reach `flops`.
      ici: bytes per second to other chips, over all links, one way.
      example: the name of a topology of this chip.
    """

    hbm: float
    flops: float
    clock: float
    ici: float
    example: str


GIB = 2**30
# cloud.google.com/tpu/docs; a device of tpu7x is half a chip.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 1.5e9, 200e9, "v5e-16x16"),
    "v5p": Chip(95.74 * GIB, 459e12, 1.75e9, 600e9, "v5p-8x8x8"),
    "v6e": Chip(31.25 * GIB, 918e12, 1.75e9, 448e9, "v6e-16x16"),
    "tpu7x": Chip(94.75 * GIB, 1153.5e12, 2.2e9, 600e9, "tpu7x-4x4x4"),
}


class Topology(NamedTuple):
    """Devices to shard over and to compile for, not to run on."""

    name: str
    chip: Chip
    devices: list[jax.Device]


def topology(name: str) -> Topology:
    """Describes TPUs that need not be there.

    Args:
      name: CHIP-SHAPE or CHIP:SHAPE, "v5e-4x4"; with Nx in front N such slices.

    Returns:
      The topology, with abstract devices to compile for.

    Raises:
      ValueError: for an unknown or impossible topology (it names known ones), or without libtpu.
    """
    # Read when libtpu is first loaded: allow several processes to load it, and do not look for a cloud machine.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    known = f"known: {', '.join(chip.example for chip in CHIPS.values())}, and other shapes of these chips"
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+)[-:](\d+(?:x\d+){1,2})", name)
    if not match or match[2] not in CHIPS:
        raise ValueError(f"topology '{name}': expected CHIP-SHAPE, or SLICESxCHIP-SHAPE; {known}")
    chip, shape = match[2], match[3]
    if shape.count("x") != CHIPS[chip].example.partition("-")[2].count("x"):
        raise ValueError(f"topology '{name}': chips of {chip} lie in shapes such as {CHIPS[chip].example}")
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if set(shape) <= {"1", "x"} else {}
    if match[1]:
        options["num_slices"] = int(match[1])
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{shape}", **options)
    except (RuntimeError, ValueError) as error:
        if "libtpu" in str(error).lower():
            raise ValueError(f"topology '{name}' needs the TPU compiler: pip install libtpu ({error})") from None
        raise ValueError(
            f"topology '{name}': the compiler refuses it ({str(error).splitlines()[0]}); hosts have 2x2 chips, so "
            f"sides are even, or all of them 1; {known}"
        ) from None
    return Topology(name.replace(":", "-"), CHIPS[chip], list(description.devices))
