"""Which implementation computes a linear head: by platform, shape and dtype.

Axis letters: D model dimension, V vocabulary (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import log_sum_exp_gpu
from pallas_kernels.log_sum_exp_tpu import LANES
from pallas_kernels.platform import platform

SMALLEST_VOCABULARY = 4096  # below it one product of XLA's holds all logits


def choose_implementation(
    hidden: Float[Array, "*B D"], head: Float[Array, "V D"], gradients: bool = False
) -> Literal["xla", "tpu", "gpu"]:
    """Kernels where they compile and win, if the head is large and lies as they read it; else XLA's loops.

    Args:
      hidden: hidden states.
      head: the output matrix.
      gradients: whether the kernels are for training: bfloat16 only, and not on v5p, where a device is two cores, of
        which the kernel of the gradients occupies one.

    Returns:
      "tpu" from v5e on, where 128 divides D: otherwise a TPU keeps the head transposed, and each call would copy it.
      "gpu" for a bfloat16 head.
    """
    V, D = head.shape
    bfloat16, float32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    dtypes = {bfloat16} if gradients else {bfloat16, float32}
    if V < SMALLEST_VOCABULARY or not {hidden.dtype, head.dtype} <= dtypes:
        return "xla"
    if platform() == "gpu":
        return "gpu" if head.dtype == bfloat16 and D % log_sum_exp_gpu.DEPTH == 0 else "xla"
    if platform() != "tpu" or D % LANES:
        return "xla"
    info = pltpu.get_tpu_info()
    return "tpu" if info.generation >= 5 and not (gradients and info.num_cores > 1) else "xla"
