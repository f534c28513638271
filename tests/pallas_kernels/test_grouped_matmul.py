"""The gradient of grouped matrices by the TPU's kernel, interpreted, and as it is defined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import TILES, grouped_matmul


@pytest.mark.parametrize("rows", [TILES[0], 700])
@pytest.mark.parametrize("sizes", [[100, 0, 250], [0, 0, 0], [3, 400, 97]])
def test_gradients_are_those_of_one_product_for_each_block(rows, sizes):
    random = np.random.default_rng(0)
    x, w = random.standard_normal((rows, 8), np.float32), random.standard_normal((3, 8, 16), np.float32)
    seen = random.standard_normal((rows, 16), np.float32)

    def by_blocks(x, w):
        ends = np.cumsum(sizes)
        blocks = [x[end - size : end] @ w[n] for n, (size, end) in enumerate(zip(sizes, ends, strict=True))]
        return jnp.sum(jnp.concatenate([*blocks, jnp.zeros((rows - ends[-1], 16))]) * seen)

    def loss(x, w):
        return jnp.sum(grouped_matmul(x, w, jnp.array(sizes), "tpu-interpreted") * seen)

    for got, expected in zip(jax.grad(loss, (0, 1))(x, w), jax.grad(by_blocks, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)
