"""The attention kernels lowered to Triton on a machine without a GPU, at the shapes of training and of serving.

`benchmarks/attention_h100.py` compiles them further, to machine code; that takes CUDA's packages.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention as attention_module
from pallas_kernels.attention import attention
from pallas_kernels.token_labels import TokenLabels


def gradients(q, k, v, token_labels):
    return jax.grad(lambda *qkv: attention(*qkv, token_labels)[0].astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)


def shapes(q: tuple, k: tuple, dtype) -> tuple:
    q, k = (jax.ShapeDtypeStruct(x, dtype) for x in (q, k))
    return q, k, k, TokenLabels(*[jax.ShapeDtypeStruct(k.shape[:2], jnp.int32)] * 3)


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, jnp.float32), (96, jnp.bfloat16), (128, jnp.bfloat16), (256, jnp.float32)],
    ids=str,
)
def test_training_shapes_lower(head_dim, dtype):
    text = lowered(gradients, *shapes((2, 4000, 8, head_dim), (2, 4000, 2, head_dim), dtype))
    assert text.count("__gpu$xla.gpu.triton") == 3  # forward, dq, dk and dv


@pytest.mark.parametrize(("queries", "kernels"), [(32000, 1), (1, 0)])
def test_items_and_one_query_behind_a_cached_prefix_lower(queries, kernels):
    text = lowered(attention, *shapes((1, queries, 8, 128), (1, 36096, 2, 128), jnp.bfloat16))
    assert text.count("__gpu$xla.gpu.triton") == kernels
    sizes = [np.prod([int(n) for n in shape.split("x")]) for shape in re.findall(r"tensor<([\dx]+)x\w+>", text)]
    assert 36096 * 2 * 128 in sizes  # the expression does find arrays
    assert max(sizes) < 36096**2 / 16


@pytest.mark.parametrize(
    ("function", "queries", "products"),
    [(gradients, 256, 2 * (2 + 3 + 4)), (attention, 1, 2)],  # in the loop without a mask and in that with one; dense
    ids=["three kernels", "one query"],
)
def test_products_of_float32_are_float32_and_not_tf32(function, queries, products):
    def precisions(dtype) -> set[str]:
        text = str(jax.make_jaxpr(function)(*shapes((1, queries, 2, 64), (1, 256, 2, 64), dtype)))
        dots = re.findall(r"dot_general\[.*?\n\s*\]", text, re.DOTALL)
        assert len(dots) == products
        return {actual for dot in dots for actual in re.findall(r"precision=(\S+)", dot)}

    assert precisions(jnp.float32) == {"(Precision.HIGHEST,"}
    assert precisions(jnp.bfloat16) == {"(Precision.DEFAULT,"}
