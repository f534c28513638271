"""The platform that a function is being traced for, and the precision that makes its matrix products exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike


def platform() -> str:
    """One of cpu, gpu and tpu: the platform of the mesh in context, or of the default device if no mesh is set.

    Called while tracing, so that only one platform's kernels are traced. A mesh of abstract devices counts: with one, a
    program is compiled ahead of time for a chip that this machine does not have.
    """
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).platform


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """The `precision` of a product of `dtype` inputs: float32 inputs get a true float32 product.

    By default float32 products are one bfloat16 pass on a TPU and TF32 on a GPU.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def tpu_info() -> pltpu.TpuInfo:
    """Properties of the TPU that is being traced for.

    Raises:
      ValueError: for TPUs before v5, for which some kernels do not compile.
    """
    info = pltpu.get_tpu_info()
    if info.generation < 5:
        raise ValueError(
            f"the kernels are made for TPU v5e, v5p, v6e and TPU7x, not for {info.chip_version.value}: "
            "its compiler refuses some of their products"
        )
    return info
