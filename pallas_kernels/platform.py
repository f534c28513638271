"""Which platform a function is being traced for."""

from __future__ import annotations

import jax
from jax.experimental.pallas import tpu as pltpu


def platform() -> str:
    """One of cpu, gpu and tpu: that of the mesh in context, and where there is none, that of the default device.

    Asked while tracing, so that only the kernels of one platform are traced at all. A mesh of abstract devices counts:
    that is how a program is compiled for a chip that is not there.
    """
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).platform


def tpu_info() -> pltpu.TpuInfo:
    """Of the TPU that is being traced for; ValueError for those before v5, which some kernels do not compile for."""
    info = pltpu.get_tpu_info()
    if info.generation < 5:
        raise ValueError(
            f"the kernels are made for TPU v5e, v5p, v6e and TPU7x, not for {info.chip_version.value}: "
            "its compiler refuses some of their products"
        )
    return info
