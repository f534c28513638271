"""Grouped matrix products for a mixture of experts: each group of rows is multiplied with its own matrix.

Axis letters: R rows, M matrices (experts), D and F their sides (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import platform

TILES = (512, 1024, 1024)  # rows, and both sides of a matrix, in a step of `tgmm`


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    rows: Float[Array, "R D"],
    matrices: Float[Array, "M D F"],
    sizes: Int[Array, " M"],
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """The first sizes[0] rows times the first matrix, the next sizes[1] times the second, and so on.

    Differentiable in `rows` and `matrices`.

    Args:
      rows: grouped by matrix.
      matrices: one for each group.
      sizes: rows of each group.
      implementation: of the gradient of the matrices: "xla", "tpu" or "tpu-interpreted"; by default the platform's.

    Returns:
      The products in the dtype of `rows`; zeros for rows behind the last group.
    """
    return jax.lax.ragged_dot(rows, matrices, sizes)


def _forward(rows: Array, matrices: Array, sizes: Array, implementation: str | None) -> tuple[Array, tuple]:
    return jax.lax.ragged_dot(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(implementation: str | None, saved: tuple[Array, Array, Array], d_out: Array) -> tuple:
    rows, matrices, sizes = saved
    (d_rows,) = jax.vjp(lambda rows: jax.lax.ragged_dot(rows, matrices, sizes), rows)[1](d_out)
    implementation = implementation or ("tpu" if platform() == "tpu" else "xla")
    if implementation == "xla":
        (d_matrices,) = jax.vjp(lambda matrices: jax.lax.ragged_dot(rows, matrices, sizes), matrices)[1](d_out)
        return d_rows, d_matrices, None
    # The TPU compiler would multiply all rows with all of d_out once for each matrix, and mask the rest.
    row_padding = ((0, -len(rows) % TILES[0]), (0, 0))
    rows, d_out = jnp.pad(rows, row_padding), jnp.pad(d_out, row_padding)
    D, F = (min(tile, side + -side % 128) for tile, side in zip(TILES[1:], matrices.shape[1:], strict=True))
    interpret = implementation == "tpu-interpreted"
    return d_rows, tgmm(rows.T, d_out, sizes, matrices.dtype, (TILES[0], D, F), interpret=interpret), None


grouped_matmul.defvjp(_forward, _backward)
