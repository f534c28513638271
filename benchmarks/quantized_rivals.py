"""Products of 8-bit weights: ours beside qwix's, with a bfloat16 dot as the yardstick.

    pip install qwix, then: python -m benchmarks.quantized_rivals [v5e v6e ..] [up ..] [8192 512] [int8 e4m3 ..] [scan]
                            python -m benchmarks.quantized_rivals cpu

`up`, `down` and `q` are products of a layer of configs/models/brew-mini-turbo.yaml; `q` is `o` too, and `up` is `gate`.
`scan` has the weights of four layers stacked and scanned over, as the model has them; the figures are of one turn.

    ours          `quantized_matmul`: XLA's dot
    qwix          `quantize_model` of an `nnx.Linear`, as its README recommends for serving: XLA's dot too
    qwix's kernel `qwix.contrib.kernels.quantized_matmul`: int8, a scale for 128 x 128, coarser than the others'; its
                  rounding is not counted

Each operation is compiled for a chip that is not there, and its instruction bundles counted in the compiler's dump,
for kernels and XLA's fusions alike: those of a step times the steps. A product is never counted with less than the
matrix unit needs. What waits for memory is in no bundle: `memory` is the time for every operand and result that lies in
HBM, once for XLA (its windows may fetch one again) and as often as the grid does for kernels. It runs beside the cycles
at best. The compiler's own estimate for its products has memory in it, and none for a kernel. It all ranks; it is no
measurement.

Expected, written when products of v6e and TPU7x had been tried by hand and nothing else: int8 on v5e within 10% of each
other, for there the matrix unit is slower and all else matters less; 512 tokens bound by memory, and level; on a CPU
qwix less accurate, for its scales and its sums are bfloat16. docs/kernels.md says what came of it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.attention_static import DUMP, table  # isort: skip  # sets up libtpu

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from qwix.contrib.kernels import quantized_matmul as qwix_kernel
from rich.console import Console

from benchmarks.bundles import bounds, count_bundles
from brewjax.aot.hlo import size_of
from brewjax.aot.topology import topology
from brewjax.model.config import ModelConfig
from brewjax.model.weights import DTYPES
from pallas_kernels.quantized_matmul import Quantized, quantize, quantized_matmul

MODEL = ModelConfig.load("configs/models/brew-mini-turbo.yaml")
PRODUCTS = {"up": (MODEL.d_model, MODEL.d_ff), "down": (MODEL.d_ff, MODEL.d_model), "q": (MODEL.d_model,) * 2}
KINDS = {"weights": ("e4m3", None), "e4m3": ("e4m3", "per_token"), "int8": ("int8", "per_token")}
CHIPS = {"v5e": "v5e-1x1", "v6e": "v6e-1x1", "tpu7x": "tpu7x-1x1x1"}
BLOCKS_OF_QWIX = {"bm": 256, "bk": 512, "bn": 1024}  # its defaults
COLUMNS = ("product, ms", "rest", "of bfloat16", "memory, ms", "MB", "its estimate, ms", "copies of weights")


def rivals(kind: str | None, T: int, K: int, N: int) -> dict[str, tuple[Callable, tuple]]:
    """Functions and the shapes of their arguments; of bfloat16 without a kind."""
    shape = jax.ShapeDtypeStruct
    x = shape((T, K), jnp.bfloat16)
    if kind is None:
        return {"bfloat16": (lambda x, w: x @ w, (x, shape((K, N), jnp.bfloat16)))}
    name, activations = KINDS[kind]
    weight = Quantized(shape((K, N), DTYPES[name]), shape((N,), jnp.float32))
    graph, state = nnx.split(nnx.eval_shape(partial(qwix_products, kind, K, N)))
    result: dict[str, tuple[Callable, tuple]] = {
        "ours": (partial(quantized_matmul, activations=activations), (x, weight)),
        "qwix": (lambda x, state: nnx.merge(graph, state)(x), (x, state)),
    }
    if kind == "int8":
        scales = shape((T // 128, 1), jnp.float32), shape((1, N // 128), jnp.float32)
        call = partial(qwix_kernel.quantized_matmul, **BLOCKS_OF_QWIX, dtype=jnp.bfloat16)
        result["qwix's kernel"] = call, (shape((T, K), jnp.int8), scales[0], weight.values, scales[1])
    return result


def qwix_products(kind: str, K: int, N: int, weight: jax.Array | None = None) -> nnx.Module:
    """With random weights where none are given."""
    name, activations = KINDS[kind]
    linear = nnx.Linear(K, N, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    if weight is not None:
        linear.kernel[...] = weight
    dtype = DTYPES[name]
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=dtype, act_qtype=dtype if activations else None)
    return qwix.quantize_model(linear, qwix.PtqProvider([rule]), jnp.zeros((8, K), jnp.bfloat16))


@dataclasses.dataclass
class Cost:
    """Cycles of the product and of the rest, the compiler's estimate of its product, bytes, copies of the weights."""

    product: int = 0
    rest: int = 0
    estimate: int = 0
    bytes: float = 0.0
    copies: int = 0


class Chip:
    def __init__(self, name: str):
        result = topology(CHIPS[name])
        self.name, self.clock = name, result.chip.clock
        self.mesh = jax.sharding.Mesh(np.array(result.devices[:1]), ("chip",))
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            info = pltpu.get_tpu_info()
        self.bandwidth, bf16 = info.mem_bw_bytes_per_second, info.bf16_ops_per_second
        peaks = {"int8": info.int8_ops_per_second, "e4m3": info.fp8_ops_per_second}
        self.peaks = {kind: max(peaks.get(kind or "", 0), bf16) for kind in (None, *KINDS)}

    def cost(self, library: str, kind: str | None, T: int, K: int, N: int, layers: int) -> Cost:
        """Of one product; with `layers`, of one turn of a scan over so many, stacked, as in the model."""
        call, (x, *weights) = rivals(kind, T, K, N)[library]
        if layers:
            weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), weights)
        program = partial(scanned, call) if layers else call
        place = jax.NamedSharding(self.mesh, jax.P())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (x, *weights))
        shutil.rmtree(DUMP, ignore_errors=True)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            text = jax.jit(program).lower(*shapes).compile().as_text()
        (around,) = [
            part for part in text.split("\n\n") if re.search("tpu_custom_call|convolution_algorithm_conf", part)
        ]
        cost, operations = Cost(), re.findall(r"\n +(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", around)
        results = {name: re.sub(rf"\[{layers},", "[", shape) for name, shape, _, _ in operations}
        inputs = [name for name, _, op, _ in operations if op in ("parameter", "get-tuple-element")]
        matrices = [name for name in inputs if f"[{K},{N}]" in results[name]]
        for name, _, op, rest in operations:
            if name in inputs or op in ("bitcast", "tuple", "constant") or op.endswith("-done"):
                continue
            operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            is_kernel = "tpu_custom_call" in rest
            if op == "custom-call" and not is_kernel:  # a name for memory
                continue
            steps, fetched = grid_of_qwix(T, K, N) if is_kernel else (bounds(rest), {})
            cost.bytes += sum(in_hbm(results[each]) * fetched.get(at, 1) for at, each in enumerate(operands))
            if op.endswith("-start"):  # on its way to the chip's own memory
                continue
            cost.bytes += in_hbm(results[name])
            cycles = steps * count_bundles(name)
            if is_kernel or "convolution_algorithm_config" in rest:
                cost.product += max(cycles, round(2 * T * K * N / self.peaks[kind] * self.clock))
                cost.estimate += int((re.search(r'"estimated_cycles":"(\d+)"', rest) or (0, 0))[1])
            else:
                cost.rest += cycles
                cost.copies += any(each in matrices for each in operands)
        return cost

    def row(self, yardstick: float, *arguments: Any) -> tuple[float, list[str]]:
        """Milliseconds of `cost(*arguments)`, and the numbers to show."""
        cost = self.cost(*arguments)
        product, rest, estimate = (cycles / self.clock * 1e3 for cycles in (cost.product, cost.rest, cost.estimate))
        times = product, rest, (product + rest) / (yardstick or product + rest)
        shown = [f"{times[0]:.3f}", f"{times[1]:.3f}", f"{times[2]:.2f}", f"{cost.bytes / self.bandwidth * 1e3:.3f}"]
        shown += [f"{cost.bytes / 1e6:,.0f}", f"{estimate:.3f}" * bool(estimate), str(cost.copies)]
        return product + rest, shown


def scanned(call: Callable, x: jax.Array, *weights: Any) -> jax.Array:
    total = jax.eval_shape(call, x, *jax.tree.map(lambda each: each[0], weights))
    zeros = jnp.zeros(total.shape, total.dtype)
    return jax.lax.scan(lambda total, layer: (total + call(x, *layer), None), zeros, weights)[0]


def grid_of_qwix(T: int, K: int, N: int) -> tuple[int, dict[int, int]]:
    """Steps of its kernel, and how often it fetches each operand."""
    m, k, n = (math.ceil(size / block) for size, block in zip((T, K, N), BLOCKS_OF_QWIX.values(), strict=True))
    return m * k * n, {0: n, 2: m}


def in_hbm(shape: str) -> float:
    """Bytes; memory space 1 is the chip's own."""
    return size_of(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}", "", shape))


def on_chips(chips: list[str], products: list[str], tokens: list[int], kinds: list[str], layers: int) -> None:
    shown = table("estimates", ("chip", "what", "who", *COLUMNS))
    for chip in map(Chip, chips):
        for product, T in [(product, T) for product in products for T in tokens]:
            yardstick = 0.0
            for kind, library in [(each, library) for each in (None, *kinds) for library in rivals(each, T, 128, 128)]:
                ms, numbers = chip.row(yardstick, library, kind, T, *PRODUCTS[product], layers)
                yardstick = yardstick or ms
                shown.add_row(chip.name, f"{product}, {T:,} tokens, {kind or ''}", library, *numbers)
                print(
                    chip.name, product, T, kind, library, *numbers, file=sys.stderr, flush=True
                )  # compiling takes long
    Console(width=150).print(shown)


def on_cpu(T: int = 256, K: int = 1024, N: int = 1024, rounds: int = 15) -> None:
    """Errors against float64, in units of the outputs' root mean square, and times as ratios to bfloat16's."""
    random = np.random.default_rng(0)
    shown = table(f"CPU, {T} x {K} x {N}", ("inputs", "what", "who", "mean error", "largest", "time, of bfloat16"))
    for inputs in ("random", "outliers"):
        x, weight = random.standard_normal((T, K)), random.standard_normal((K, N)) * K**-0.5
        if inputs == "outliers":  # features a hundred times the others; weights with heavy tails
            x, weight = x * np.where(random.random(K) < 0.01, 100, 1), random.standard_t(2, (K, N)) * K**-0.5
        x, weight = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
        exact = np.float64(x) @ np.float64(weight)
        calls = {("", "bfloat16"): (jax.jit(jnp.matmul), (x, weight))}
        for kind, (name, activations) in KINDS.items():
            own_output = jax.jit(partial(quantized_matmul, activations=activations))
            graph, state = nnx.split(qwix_products(kind, K, N, weight))
            calls[kind, "ours"] = own_output, (x, quantize(weight, DTYPES[name]))
            calls[kind, "qwix"] = jax.jit(lambda x, state, graph=graph: nnx.merge(graph, state)(x)), (x, state)
        result = {key: np.float64(call(*arguments)) for key, (call, arguments) in calls.items()}
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for _ in range(rounds):
            for key, (call, arguments) in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call(*arguments))
                times[key].append(time.perf_counter() - start)
        scale = np.sqrt(np.mean(exact**2))
        base = statistics.median(times["", "bfloat16"])
        for key, out in result.items():
            error = np.abs(out - exact) / scale
            ratio = statistics.median(times[key]) / base
            shown.add_row(inputs, *key, f"{error.mean():.4f}", f"{error.max():.3f}", f"{ratio:.2f}")
    Console(width=110).print(shown)


if __name__ == "__main__":
    requested = sys.argv[1:]
    if requested == ["cpu"]:
        on_cpu()
    else:
        chosen = [[name for name in requested if name in known] or list(known) for known in (CHIPS, PRODUCTS, KINDS)]
        tokens = [int(name) for name in requested if name.isdigit()] or [8192, 512]
        on_chips(*chosen[:2], tokens, chosen[2], 4 if "scan" in requested else 0)
