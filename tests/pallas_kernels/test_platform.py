import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import platform
from pallas_kernels.platform import has_bfloat16_products, product_dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx512f avx512_bf16 avx512_vnni", True), ("avx512f amx_bf16", True), ("avx2 avx512f", False)],
)
def test_the_processor_is_asked_for_its_instructions(tmp_path, flags, expected):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags : fpu {flags}\n\nprocessor : 1\nflags : fpu {flags}\n")
    assert has_bfloat16_products(info) == expected


def test_a_machine_that_does_not_say_has_none(tmp_path):
    assert not has_bfloat16_products(tmp_path / "missing")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_processor_decides_unless_jax_is_told(monkeypatch, has_bfloat16):
    monkeypatch.setattr(platform, "has_bfloat16_products", lambda: has_bfloat16)
    for setting, rounded in ((None, has_bfloat16), ("float32", False), ("highest", False), ("bfloat16", True)):
        with jax.default_matmul_precision(setting):
            assert product_dtype(jnp.float32) == (jnp.bfloat16 if rounded else jnp.float32)
            assert product_dtype(jnp.bfloat16) == jnp.bfloat16


def test_other_platforms_round_as_they_like(monkeypatch):
    monkeypatch.setattr(platform, "platform", lambda: "tpu")
    with jax.default_matmul_precision("bfloat16"):
        assert product_dtype(jnp.float32) == jnp.float32
