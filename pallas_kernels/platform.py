"""Which platform a function is being traced for, and what makes its products exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike


def platform() -> str:
    """One of cpu, gpu and tpu: that of the mesh in context, and where there is none, that of the default device.

    Asked while tracing, so that only the kernels of one platform are traced at all. A mesh of abstract devices counts:
    that is how a program is compiled for a chip that is not there.
    """
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).platform


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Of products of `dtype`: of float32 a true one. The default is one bfloat16 pass on a TPU and TF32 on a GPU."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def tpu_info() -> pltpu.TpuInfo:
    """Of the TPU that is being traced for; ValueError for those before v5, which some kernels do not compile for."""
    info = pltpu.get_tpu_info()
    if info.generation < 5:
        raise ValueError(
            f"the kernels are made for TPU v5e, v5p, v6e and TPU7x, not for {info.chip_version.value}: "
            "its compiler refuses some of their products"
        )
    return info
