"""What a recipe will do: its surfaces, and its stages with sizes, memory and time, before any of it is done."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from rich.table import Table

from brewjax.model.config import ModelConfig
from brewjax.model.flops import model_flops
from brewjax.model.params import abstract_params, model_size, num_parameters
from brewjax.model.sharding import MeshConfig
from brewjax.pipeline.context import Run
from brewjax.pipeline.evaluation import describe_stage
from brewjax.pipeline.recipe import AlignStage, DistillStage, TrainedStage

UTILISATION = 0.4  # of what this machine's matrix product does: a small model's training on a quiet machine
# Of a parameter in training: the weight, its gradient and AdamW's two means, float32 whatever the model is at rest.
TRAINED_BYTES = 16


def plan_table(run: Run) -> Table:
    """Describes what a run would do.

    Args:
      run: that need not have begun.

    Returns:
      A row for each stage that makes a model. Memory is that of weights, gradients and optimiser, over all devices;
      time is of the matrix products of training, data and evaluation not counted.
    """
    rate, seconds = UTILISATION * _measure_flops(), 0.0
    title = f"{run.recipe.name}: {len(run.recipe.stages)} stages into {run.folder}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "does", "params", "MB", "memory, GB", "tokens", "PFLOPs", "about, s"):
        left = column in ("stage", "does")
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "stage", overflow="fold")
    for name, stage in run.recipe.stages.items():
        shape = run.shape(name)
        of = model_size(shape)
        cells = [f"{of.parameters / 1e6:,.1f}M", f"{of.weight_bytes / 1e6:,.1f}"]
        if isinstance(stage, TrainedStage):
            config, memory, passes = stage.train, TRAINED_BYTES * of.parameters, 3
            if config.lora:  # of the weights no gradient is made
                adapters = config.lora.abstract(abstract_params(shape, MeshConfig().build(jax.devices()[:1])))
                memory, passes = of.weight_bytes + TRAINED_BYTES * num_parameters(adapters), 2
            flops = passes * sum(model_flops(shape, config.batch_size, config.seq_len)) * config.steps
            for frozen in _frozen(run, stage):
                memory += model_size(frozen).weight_bytes
                flops += sum(model_flops(frozen, config.batch_size, config.seq_len)) * config.steps
            seconds += flops / rate
            tokens = config.steps * config.batch_size * config.seq_len
            cells += [f"{memory / 1e9:.2f}", f"{tokens / 1e6:,.2f}M", f"{flops / 1e15:.3f}", f"{flops / rate:,.0f}"]
        table.add_row(name, describe_stage(stage), *cells)
    table.caption = (
        f"training about {seconds / 60:,.0f} min in all, at {rate / 1e9:,.0f} GFLOPs/s: "
        f"{UTILISATION:.0%} of what this machine's matrix product does now"
    )
    return table


def surfaces_table(run: Run) -> Table:
    """A row for each surface: what is read, what is asked, and how much of it there is to train on."""
    table = Table(title="surfaces", title_justify="left", box=None, pad_edge=False)
    for column in ("surface", "dataset", "tasks", "weight", "members", "items", "events"):
        text = column in ("surface", "dataset", "tasks")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for name, surface in run.surfaces.items():
        dataset = surface.dataset
        counts = [f"{len(rows):,}" for rows in (dataset.members, dataset.items, dataset.events)]
        tasks = ", ".join(task.name for _, task in surface.tasks)
        table.add_row(name, surface.config.dataset, tasks, f"{surface.config.weight:g}", *counts)
    return table


def _frozen(run: Run, stage: TrainedStage) -> list[ModelConfig]:
    """The frozen models of a stage: its teacher or its reference."""
    if isinstance(stage, DistillStage):
        return [run.shape(stage.teacher)]
    if isinstance(stage, AlignStage) and stage.init_from and not stage.train.lora:  # else the reference is LoRA's base
        return [run.shape(stage.init_from)]
    return []


def _measure_flops() -> float:
    """Of this machine's float32 matrix product, a second."""
    n, times = 1024, []
    product = jax.jit(jnp.dot)
    x = jnp.ones((n, n))
    product(x, x).block_until_ready()
    for _ in range(5):
        start_time = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start_time)
    return 2 * n**3 / min(times)
