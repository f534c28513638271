"""The GPU attention kernels compiled for an H100, and on a machine that has a GPU checked and timed there.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python -m benchmarks.attention_h100

Needs CUDA's packages (`pip install 'brewjax[gpu]'`) and, to compile, no GPU: registers, spills and shared memory are
those that ptxas and XLA name. With a GPU: differences from the reference, then times beside cuDNN's causal attention,
which cannot express the layouts and so computes every pair of them that is not after.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when jax is first loaded.
os.environ["PTX"] = tempfile.mkdtemp(prefix="ptx-")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={os.environ['PTX']} --xla_dump_hlo_as_text"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from benchmarks.layouts import LAYOUTS, make_labels
from pallas_kernels import attention_gpu
from pallas_kernels.attention import attention, attention_reference
from pallas_kernels.token_labels import PADDING, TokenLabels

DUMP = Path(os.environ["PTX"])
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
HEADS, KEY_HEADS = 8, 2
CASES = {"training": (4096, 4096), "serving": (32000, 36096)}  # queries, keys
console = Console(width=160)


def gradients(q: Any, k: Any, v: Any, token_labels: TokenLabels) -> tuple:
    """Of the sum of the output: what runs both passes."""
    return jax.grad(
        lambda *qkv: attention(*qkv, token_labels, implementation="gpu")[0].astype(jnp.float32).sum(), (0, 1, 2)
    )(q, k, v)


def scores(q: Any, k: Any, v: Any, token_labels: TokenLabels) -> Any:
    return attention(q, k, v, token_labels, implementation="gpu")[0]


# Without a GPU.


def compile_all() -> None:
    table = Table(
        "case",
        "head",
        "dtype",
        "kernel",
        "rows x keys at most, warps",
        "registers",
        "spills, bytes",
        "shared, bytes",
        "matrix instruction",
        title="H100",
    )
    for case, (T, S) in CASES.items():
        for D in (64, 128, 256):
            for dtype in (jnp.bfloat16, jnp.float32):
                function = gradients if case == "training" else scores
                for kernel, *result in compiled("token_label_attention_", function, *shapes(T, S, D, dtype)):
                    cut = attention_gpu.choose_blocks(kernel, D, dtype)
                    blocks = f"{cut.rows} x {cut.keys}, {cut.warps}"
                    table.add_row(case, str(D), jnp.dtype(dtype).name, kernel, blocks, *map(str, result))
    console.print(table)


def shapes(T: int, S: int, D: int, dtype: Any) -> tuple:
    q, k, label = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, T, HEADS, D), dtype), ((1, S, KEY_HEADS, D), dtype), ((1, S), jnp.int32))
    )
    return q, k, k, TokenLabels(label, label, label)


def compile_for_h100(function: Callable, *shapes: Any) -> jax.stages.Compiled:
    device = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    shutil.rmtree(DUMP, ignore_errors=True)
    return jax.jit(function).lower(*placed).compile()


def compiled(prefix: str, function: Callable, *shapes: Any) -> Iterator[tuple]:
    """Of each kernel: name behind `prefix`, registers, bytes of spills and shared memory, wgmma or mma or neither."""
    compile_for_h100(function, *shapes)
    (launches,) = (path.read_text() for path in DUMP.glob("*thunk_sequence.txt"))
    for path in sorted(DUMP.glob("*.ptx")):
        for kernel in re.findall(rf"\.entry {prefix}(\w+)\(", path.read_text()):
            assembler = subprocess.run(
                [ptxas(), "-v", "-arch=sm_90a", path, "-o", os.devnull], capture_output=True, text=True
            )
            registers = re.search(r"Used (\d+) registers", assembler.stderr)
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", assembler.stderr)))
            shared = re.search(rf"{prefix}{kernel} grid.*shared_memory: (\d+)", launches)
            product = next((name for name in ("wgmma", "mma.sync") if name in path.read_text()), "none")
            yield kernel, registers and registers[1], spills, shared and shared[1], product


def ptxas() -> str:
    import nvidia.cuda_nvcc

    return str(Path(nvidia.cuda_nvcc.__path__[0]) / "bin" / "ptxas")


# With one.


def check() -> None:
    """Differences from the dense reference, over the largest value of each, on a row of the first 2048 of a layout."""
    table = Table("layout", "head", "dtype", "out", "dq", "dk", "dv", title="Greatest difference over greatest value")
    for layout in ("star: 16k in events of 40, 100 x 40", "packed training row of 16k"):
        labels = TokenLabels(*(x[:, -2048:] for x in make_labels(layout)))
        for D in (64, 128, 256):
            for dtype in (jnp.bfloat16, jnp.float32):
                q, k, v = inputs(2048, 2048, D, dtype)
                result = jax.jit(lambda *x, labels=labels: (scores(*x, labels), *gradients(*x, labels)))(q, k, v)
                expected = reference(*(x.astype(jnp.float32) for x in (q, k, v)), labels)
                errors = [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(result, expected, strict=True)]
                table.add_row(layout, str(D), jnp.dtype(dtype).name, *(f"{x:.1e}" for x in errors))
                assert max(errors) < (2**-6 if dtype == jnp.bfloat16 else 1e-5), (layout, D, dtype, errors)
    console.print(table)


@jax.jit
def reference(q: Any, k: Any, v: Any, labels: TokenLabels) -> tuple:
    def out(*qkv: Any) -> Any:
        return jnp.where((labels.example_id != PADDING)[..., None, None], attention_reference(*qkv, labels)[0], 0)

    with jax.default_matmul_precision("highest"):
        return out(q, k, v), *jax.grad(lambda *qkv: out(*qkv).sum(), (0, 1, 2))(q, k, v)


def inputs(T: int, S: int, D: int, dtype: Any) -> list:
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.standard_normal((1, n, h, D)), dtype)
        for n, h in ((T, HEADS), (S, KEY_HEADS), (S, KEY_HEADS))
    ]


def time_all() -> None:
    def cudnn(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def cudnn_gradients(q: Any, k: Any, v: Any) -> Any:
        return jax.grad(lambda *qkv: cudnn(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    table = Table("layout", "head", "pass", "ours, ms", "cuDNN causal, ms", "ours / cuDNN", title="bfloat16")
    for D in (64, 128):
        for layout in LAYOUTS:
            labels = TokenLabels(*map(jnp.asarray, make_labels(layout)))
            T = labels.example_id.shape[1]
            qkv = inputs(T, T, D, jnp.bfloat16)
            for name, ours, theirs in (("forward", scores, cudnn), ("both", gradients, cudnn_gradients)):
                own_ms, rival_ms = milliseconds(ours, *qkv, labels), milliseconds(theirs, *qkv)
                table.add_row(layout, str(D), name, f"{own_ms:.3f}", f"{rival_ms:.3f}", f"{own_ms / rival_ms:.2f}")
    console.print(table)


def milliseconds(function: Callable, *arguments: Any) -> float:
    """The median of ten rounds of ten calls."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(10):
        start_time = time.perf_counter()
        for _ in range(10):
            out = function(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start_time) / 10)
    return statistics.median(times) * 1e3


def run(count: Callable[[], None], check: Callable[[], None], time_all: Callable[[], None]) -> None:
    """What a compiler can say; then, where there is a GPU, whether it is right and how long it takes."""
    count()
    if jax.devices()[0].platform == "gpu":
        check()
        time_all()
    else:
        console.print("No GPU here: nothing was run.")


if __name__ == "__main__":
    run(compile_all, check, time_all)
