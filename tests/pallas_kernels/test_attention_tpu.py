"""The attention kernels compiled for TPUs that are not here, at the shapes of training and of serving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention_tpu
from pallas_kernels.attention import attention
from pallas_kernels.token_labels import TokenLabels
from pallas_kernels.worklist import Worklist
from tests.pallas_kernels.tpu import devices

LONGEST = {"v5e": 415 * 512, "v6e": 293 * 1024}  # tokens, in whole blocks of queries


def compiled(chip: str, q: tuple, k: tuple, dtype, gradients: bool, side: int = 1) -> jax.stages.Compiled:
    """Attention over a mesh of side x side chips: rows over one axis, heads over the other."""
    mesh = jax.make_mesh((side, side), ("data", "tensor"), devices=devices(chip, side)[: side**2])
    over = {"row": jax.P("data"), "heads": jax.P("data", None, "tensor")}

    def shape(shape: tuple, dtype, axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, over[axes]))

    def local(q, k, v, token_labels):
        return attention(q, k, v, token_labels)[0]

    def run(q, k, v, token_labels):
        specs = (*[over["heads"]] * 3, over["row"])
        out = jax.shard_map(local, in_specs=specs, out_specs=over["heads"], check_vma=False)(q, k, v, token_labels)
        return out.astype(jnp.float32).sum() if gradients else out

    function = jax.grad(run, argnums=(0, 1, 2)) if gradients else run
    token_labels = TokenLabels(*[shape(k[:2], jnp.int32, "row")] * 3)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*(shape(x, dtype, "heads") for x in (q, k, k)), token_labels).compile()


def assert_compiles(chip: str, head_dim: int, dtype, length: int, group: int) -> None:
    q, k = ((2, length, heads, head_dim) for heads in (2 * group, 2))
    text = compiled(chip, q, k, dtype, gradients=True).as_text()
    assert "token_label_attention_forward" in text
    assert "token_label_attention_backward" in text


# What takes long to compile is the straight-line code of a block: of a short row it is short.
@pytest.mark.parametrize(
    ("chip", "head_dim", "dtype"),
    [
        ("v5p", 64, jnp.bfloat16),
        ("v6e", 256, jnp.bfloat16),
        ("tpu7x", 128, jnp.bfloat16),
        ("v5e", 64, jnp.float32),
    ],
    ids=str,
)
def test_every_chip_head_size_and_dtype_compile(chip, head_dim, dtype):
    assert_compiles(chip, head_dim, dtype, length=256, group=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("chip", "head_dim", "dtype"),
    [
        ("v5e", 128, jnp.bfloat16),
        ("v5p", 64, jnp.bfloat16),
        ("v6e", 256, jnp.bfloat16),
        ("tpu7x", 128, jnp.bfloat16),
        ("v5e", 64, jnp.float32),
    ],
    ids=str,
)
def test_training_shapes_compile(chip, head_dim, dtype):
    assert_compiles(chip, head_dim, dtype, length=4096, group=4)


@pytest.mark.parametrize("chip", ["v5e", pytest.param("v6e", marks=pytest.mark.long)])
def test_items_behind_a_cached_prefix_compile(chip):
    program = compiled(chip, (1, 32000, 8, 128), (1, 36096, 2, 128), jnp.bfloat16, gradients=False)
    # Inputs and output twice over, as the kernel reads and writes them: nothing of 32,000 x 36,096.
    heads = np.array([32000 * 8, 36096 * 2, 36096 * 2, 32000 * 8]).sum() * 128 * 2
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * heads


def test_rows_and_heads_over_a_mesh_compile():
    text = compiled("v5e", (2, 1024, 4, 128), (2, 1024, 2, 128), jnp.bfloat16, gradients=True, side=2).as_text()
    assert "all-gather" not in text


def test_older_chips_are_refused():
    with pytest.raises(ValueError, match=r"made for TPU v5e, v5p, v6e and TPU7x, not for .*4"):
        compiled("v4", (1, 128, 1, 128), (1, 128, 1, 128), jnp.bfloat16, gradients=False)


@pytest.mark.long
def test_the_longest_row_compiles(monkeypatch):
    """One whose worklist nearly fills the scalar memory."""

    def unsorted(kind, limit, by_key=False):  # a sort of so many pairs takes long to compile
        some = jnp.minimum(kind.reshape(-1)[:limit], 0)
        return Worklist(some, some + 1, some - 1, jnp.sum(kind != 0))

    monkeypatch.setattr(attention_tpu, "worklist", unsorted)
    shape = (1, LONGEST["v5e"], 1, 128)
    compiled("v5e", shape, shape, jnp.bfloat16, gradients=True)


@pytest.mark.parametrize("chip", LONGEST)
def test_longer_rows_are_refused(chip):
    shape = (1, LONGEST[chip] + 1024, 1, 128)
    with pytest.raises(ValueError, match="bytes of scalars, and this TPU holds 1,040,384: shard the sequence"):
        compiled(chip, shape, shape, jnp.bfloat16, gradients=False)
