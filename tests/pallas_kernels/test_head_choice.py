import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import head_choice
from pallas_kernels.head_choice import choose_implementation
from tests.pallas_kernels.tpu import devices

BF16, F32 = jnp.bfloat16, jnp.float32
HEADS = {
    "large": ((8192, 256), BF16),
    "float32": ((8192, 256), F32),
    "small": ((512, 256), BF16),
    "narrow": ((8192, 576), BF16),  # SmolLM2-135M's; 64 divides it, 128 does not
    "8 bits": ((8192, 256), jnp.int8),
}


def choices(dtype, gradients: bool) -> dict[str, str]:
    hidden = jax.ShapeDtypeStruct((8, 256), dtype)
    chosen = {
        name: choose_implementation(hidden, jax.ShapeDtypeStruct(*head), gradients) for name, head in HEADS.items()
    }
    return {name: implementation for name, implementation in chosen.items() if implementation != "xla"}


@pytest.mark.parametrize(
    ("chip", "scores", "training"),
    [("v5e", True, True), ("v5p", True, False), ("v6e", True, True), ("tpu7x", True, True), ("v4", False, False)],
)
def test_a_tpu(chip, scores, training):
    mesh = jax.make_mesh((1,), ("device",), devices=devices(chip)[:1])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert choices(F32, gradients=False) == ({"large": "tpu", "float32": "tpu"} if scores else {})
        assert choices(BF16, gradients=True) == ({"large": "tpu"} if training else {})
        assert choices(F32, gradients=True) == {}


def test_a_gpu(monkeypatch):
    monkeypatch.setattr(head_choice, "platform", lambda: "gpu")
    assert choices(F32, gradients=False) == {"large": "gpu", "narrow": "gpu"}
    assert choices(BF16, gradients=True) == {"large": "gpu", "narrow": "gpu"}
    assert choices(F32, gradients=True) == {}


def test_a_cpu():
    assert choices(F32, gradients=False) == choices(BF16, gradients=True) == {}
