"""The platform that a function is being traced for, and the precision of its matrix products."""

from __future__ import annotations

import functools
from pathlib import Path

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


def precision(dtype: DTypeLike) -> jax.lax.Precision:
    """The `precision` of a product of `dtype` inputs: float32 inputs get a true float32 product.

    By default float32 products are one bfloat16 pass on a TPU and TF32 on a GPU. Other inputs need one pass, whatever
    `jax.default_matmul_precision` says: TPU kernels with more do not compile.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def product_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that inputs of a product of `dtype` are rounded to; its sums are float32.

    On a CPU with bfloat16 instructions float32 inputs are rounded to bfloat16, as a TPU rounds them of its own accord:
    products then take about half the time. XLA's CPU compiler does that for bfloat16 inputs only, whatever `precision`
    or algorithm is asked for. JAX's own setting takes precedence, here as on a TPU: `jax.default_matmul_precision`, or
    JAX_DEFAULT_MATMUL_PRECISION in the environment, is "float32" or "bfloat16".
    """
    setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    rounded = has_bfloat16_products() if setting is None else setting in BFLOAT16_SETTINGS
    return jnp.dtype(jnp.bfloat16 if rounded and dtype == jnp.float32 and platform() == "cpu" else dtype)


BFLOAT16_SETTINGS = ("default", "bfloat16", "BF16_BF16_F32")


@functools.cache
def has_bfloat16_products(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processor multiplies bfloat16 faster than float32: AVX512-BF16 or AMX-BF16 (x86, Linux).

    Elsewhere (macOS, Arm) it was not measured, and the answer is no.
    """
    words = info.read_text().split() if info.is_file() else []
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(words)


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
