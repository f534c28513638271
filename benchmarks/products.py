"""What bfloat16 products buy on this CPU: a training step and a scoring pass, in float32 and with bfloat16 inputs.

    python -m benchmarks.products [--models tiny laptop-xl ..] [--rounds N] [--masks]

Both run in one process and take turns, so that what else the machine does falls on both; ratios are medians over turns.
A step trains two rows of random tokens, each half a prefix and half questions of 20 tokens, with the recipes' Muon; a
pass scores a prefix of 512 tokens and 32 items of 32. Weights are random: times do not depend on them. With `--masks`,
what attention's masks cost instead: float32, and float32 in which every block is computed as one without a mask.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(min(4, os.cpu_count() or 1)))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from benchmarks.layouts import example
from brewjax.data.records.loader import TokenBatch
from brewjax.data.text.encode import NO_TARGET, EncodedPrompt
from brewjax.model.config import ModelConfig
from brewjax.model.params import init_params
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer
from brewjax.train.batches import BATCH_SPEC
from brewjax.train.loop import TrainConfig, make_step
from brewjax.train.objectives import supervised
from brewjax.train.optimizer import OptimizerConfig
from pallas_kernels import attention_xla
from pallas_kernels.platform import has_bfloat16_products
from pallas_kernels.token_labels import TokenLabels
from pallas_kernels.worklist import BlockVisibility, block_visibility

MODELS = ("tiny", "laptop-xl", "smollm2-135m")
PRECISIONS = ("float32", "bfloat16")
UNMASKED = "unmasked"
ROWS, LENGTH, QUESTION = 2, 1280, 20  # of a step
PREFIX, ITEMS, ITEM = 512, 32, 32  # of a pass
VOCABULARY = 4096  # of models without one
WARM = 2  # turns: the first compiles, and some the second too

Turn = Callable[[], object]


def training_step(model: ModelConfig) -> Turn:
    """A step of training, of its own weights."""
    config = TrainConfig(
        steps=1000, batch_size=ROWS, seq_len=LENGTH, optimizer=OptimizerConfig(method="muon", learning_rate=1e-3)
    )
    mesh = config.mesh.build()
    params = init_params(model, mesh, config.seed)
    labels = example(LENGTH // 2, [], [QUESTION] * (LENGTH // 2 // QUESTION))
    is_question = labels[:, 1] > 0
    ends = np.append(labels[1:, 1] != labels[:-1, 1], True) & is_question
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, LENGTH), np.int32)
    rows = lambda values: np.broadcast_to(np.asarray(values, np.int32), (ROWS, LENGTH))  # noqa: E731
    positions = np.where(is_question, LENGTH // 2 + np.arange(LENGTH) % QUESTION, np.arange(LENGTH))
    targets = np.where(ends, tokens, NO_TARGET)
    token_labels, weights = TokenLabels(*(rows(column) for column in labels.T)), np.float32(targets != NO_TARGET)
    batch = TokenBatch(tokens, rows(positions), token_labels, targets, weights, rows(0), rows(0))
    with jax.set_mesh(mesh):
        placed = jax.device_put(jax.tree.map(lambda leaf: leaf[None], batch), NamedSharding(mesh, BATCH_SPEC))
        opt_state = jax.jit(config.optimizer.build(config.steps).init)(params)
        step = jax.jit(make_step(model, config, supervised), donate_argnums=0)
    state = {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}

    def turn() -> object:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, placed)
        return jax.block_until_ready(metrics["loss"])

    return turn


def scoring_pass(model: ModelConfig) -> Turn:
    """A pass of the `Scorer`, which like the server computes one row on all devices."""
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (ITEMS + 1, max(PREFIX, ITEM))).tolist()
    prompt = EncodedPrompt([tokens[0]], [row[:ITEM] for row in tokens[1:]], [5, 6], [None] * ITEMS, "dense")
    mesh = MeshConfig(context=jax.device_count()).build()
    params = init_params(model, mesh, 0)
    scorer = Scorer(model, params, None, "dense", [Bucket(PREFIX + ITEMS * ITEM)], mesh)
    return lambda: scorer.score_encoded([prompt])


WORK = (("tokens/s, training", ROWS * LENGTH, training_step), ("items/s, scoring", ITEMS, scoring_pass))


@contextlib.contextmanager
def computed_in(kind: str) -> Iterator[None]:
    """A precision of products, or float32 without masks; programs are those that are traced within."""

    def all_full(*args: Any) -> BlockVisibility:
        active = block_visibility(*args).any
        return BlockVisibility(active, active)

    visibility = all_full if kind == UNMASKED else block_visibility
    with (
        mock.patch.object(attention_xla, "block_visibility", visibility),
        jax.default_matmul_precision("float32" if kind == UNMASKED else kind),
    ):
        yield


def race(make: Callable[[ModelConfig], Turn], model: ModelConfig, rounds: int, kinds: Sequence[str]) -> np.ndarray:
    """Seconds, and seconds summed over all cores: [2, rounds, kinds]."""
    turns = []
    for kind in kinds:
        with computed_in(kind):
            turns.append(make(model))
    seconds = np.zeros((2, rounds + WARM, len(kinds)))
    for round_, index in np.ndindex(seconds.shape[1:]):
        with computed_in(kinds[index]):
            start_time = np.array([time.perf_counter(), time.process_time()])
            turns[index]()
            seconds[:, round_, index] = np.array([time.perf_counter(), time.process_time()]) - start_time
    return seconds[:, WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names in configs/models")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--masks", action="store_true", help="what masks cost, in place of what bfloat16 buys")
    arguments = parser.parse_args()
    kinds = (PRECISIONS[0], UNMASKED) if arguments.masks else PRECISIONS
    ratios_of = " / ".join(kinds)
    table = Table(title=f"bfloat16 instructions: {'yes' if has_bfloat16_products() else 'no'}", title_justify="left")
    for column in ("model", "", *kinds, f"{ratios_of}, time", f"{ratios_of}, cores"):
        table.add_column(column, justify="left" if column in ("model", "") else "right")
    for name in arguments.models:
        model = ModelConfig.load(Path(__file__).parents[1] / "configs" / "models" / f"{name}.yaml")
        model = model if model.vocab_size else model.model_copy(update={"vocab_size": VOCABULARY})
        for unit, amount, make in WORK:
            seconds = race(make, model, arguments.rounds, kinds)
            paces = [f"{amount / pace:,.0f}" for pace in np.median(seconds[0], 0)]
            ratios = [f"{np.median(measured[:, 0] / measured[:, 1]):.2f}" for measured in seconds]
            table.add_row(name, unit, *paces, *ratios)
            print(name, unit, *paces, *ratios, flush=True)  # as they come
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
