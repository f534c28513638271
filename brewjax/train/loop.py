"""The one training loop: batches in, checkpoints and metrics out, resumable at any step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float
from orbax.checkpoint import v1 as ocp

from brewjax import hosts
from brewjax.config import Config
from brewjax.data.loader import NO_TARGET, TokenBatch, describe_sources
from brewjax.model.decoder import Decoder, ModelConfig
from brewjax.model.params import Params, abstract_params, bind, init_params
from brewjax.model.sharding import MeshConfig, row_ways
from brewjax.train.batches import PARTS, Batches
from brewjax.train.metrics import MetricsWriter
from brewjax.train.optimizer import OptimizerConfig
from pallas_kernels.segments import PADDING, Segments

Objective = Callable[[Decoder, TokenBatch], tuple[Float[Array, ""], Float[Array, ""]]]
State = dict[str, Any]
KEEP = ocp.training.preservation_policies.LatestN


class TrainConfig(Config):
    """One training run.

    Attributes:
      rows: packed rows in a step, over all devices and accumulation.
      row_tokens: tokens in a row.
      accumulate: a step's rows are taken in this many parts, one after the other, to save memory.
      streams: the data are read as so many, which decides the order of the rows; a process reads those that fill its
        rows. With fewer streams than processes, some processes read the same.
      checkpoint_every: steps between checkpoints; the newest `keep` stay.
    """

    steps: int = pydantic.Field(gt=0)
    rows: int = pydantic.Field(gt=0)
    row_tokens: int = pydantic.Field(gt=0)
    accumulate: int = pydantic.Field(default=1, gt=0)
    streams: int = pydantic.Field(default=1, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    checkpoint_every: int = pydantic.Field(default=100, gt=0)
    keep: int = pydantic.Field(default=2, gt=0)
    mesh: MeshConfig = MeshConfig()

    @pydantic.model_validator(mode="after")
    def _parts_divide(self) -> TrainConfig:
        if self.rows % self.accumulate:
            raise ValueError(f"rows ({self.rows}) must be a multiple of accumulate ({self.accumulate})")
        if self.rows // self.accumulate % self.streams:
            raise ValueError(
                f"rows ({self.rows}) / accumulate ({self.accumulate}) must be a multiple of streams ({self.streams})"
            )
        return self

    def check_rows(self, mesh: Mesh) -> None:
        """ValueError where the rows do not divide over the mesh."""
        ways = row_ways(mesh)
        if self.rows // self.accumulate % ways:
            raise ValueError(
                f"train.rows ({self.rows}) / accumulate ({self.accumulate}) must be a multiple of the {ways} devices "
                "along data, fsdp and expert, which share the rows"
            )


class NonFiniteError(RuntimeError):
    """The loss, the gradient or the update became NaN or infinite."""


def train(model: ModelConfig, config: TrainConfig, shards: Path, folder: Path, objective: Objective) -> Params:
    """Trains from the newest checkpoint in `folder`, or from the start, to the last step; returns the parameters.

    Writes `folder/checkpoints`, `folder/metrics.jsonl` and `folder/tensorboard`. A run that is killed and started
    again with the same arguments has the losses of one that was not, to the bit. Raises NonFiniteError with the
    step and the examples of its batch; the checkpoint before it stays the newest, the batch is saved beside it.
    On SIGTERM it saves a checkpoint and exits (see `hosts`).
    """
    mesh = config.mesh.build()
    config.check_rows(mesh)
    batches = Batches(shards, mesh, config.accumulate, config.rows, config.row_tokens, config.streams, config.seed)
    checkpointer = ocp.training.Checkpointer(
        (folder / "checkpoints").absolute(), preservation_policy=KEEP(config.keep), cleanup_tmp_directories=True
    )
    with jax.set_mesh(mesh), hosts.patience(), checkpointer:
        state = _restore_or_init(checkpointer, model, config, mesh, batches)
        step = jax.jit(make_step(model, config, objective), donate_argnums=0)
        start, ending = int(state["step"]), hosts.Ending(mesh)
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(MetricsWriter(folder, start, config.steps)) if hosts.is_first() else None
            pending = None  # the step whose metrics are still being computed while the next one is dispatched
            for number in range(start + 1, config.steps + 1):
                batch, placed = next(batches)
                state, metrics = step(state, placed)
                if pending:
                    _record(writer, folder, shards, *pending)
                pending = (number, batch, metrics)
                end = ending()
                if end or number % config.checkpoint_every == 0 or number == config.steps:
                    _record(writer, folder, shards, *pending)  # refuses to save what a NaN has spoilt
                    pending = None
                    checkpointer.wait()
                    checkpointer.save_checkpointables_async(number, {"state": state, "data": batches}, force=True)
                if end and number < config.steps:
                    checkpointer.wait()
                    hosts.preempted(f"step {number} of {config.steps} is saved")
        checkpointer.wait()
    return state["params"]


def make_step(
    model: ModelConfig, config: TrainConfig, objective: Objective
) -> Callable[[State, TokenBatch], tuple[State, dict[str, Array]]]:
    """One step: a state and a batch in `accumulate` parts, to the state after it and metrics. To be compiled."""
    optimizer, rate = config.optimizer.build(config.steps), config.optimizer.rate(config.steps)

    def loss_sum(params: Params, part: TokenBatch) -> tuple[Array, Array]:
        return objective(bind(model, params), part)

    def step(state: State, parts: TokenBatch) -> tuple[State, dict[str, Array]]:
        def accumulate(sums: tuple, part: TokenBatch) -> tuple[tuple, None]:
            (loss, count), grads = jax.value_and_grad(loss_sum, has_aux=True)(state["params"], part)
            return jax.tree.map(jnp.add, sums, (loss, count, grads)), None

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state["params"])
        start = (jnp.zeros(()), jnp.zeros(()), zeros)
        (loss, count, grads), _ = jax.lax.scan(accumulate, start, parts)
        # Divided once, by the targets of all parts: accumulation and uneven rows change nothing.
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        metrics = {
            "loss": loss / jnp.maximum(count, 1),
            "targets": count,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(state["step"]),
            "tokens": jnp.sum(parts.segments.example > PADDING),
        }
        metrics["update_norm"] = optax.tree.norm(updates)
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    return step


def _restore_or_init(
    checkpointer: ocp.training.Checkpointer, model: ModelConfig, config: TrainConfig, mesh: Mesh, batches: Any
) -> State:
    if checkpointer.latest is None:
        return jax.jit(_initial(config), donate_argnums=0)(init_params(model, mesh, config.seed))
    restored = checkpointer.load_checkpointables(None, {"state": abstract_state(model, config, mesh), "data": batches})
    return restored["state"]


def _initial(config: TrainConfig) -> Callable[[Params], State]:
    optimizer = config.optimizer.build(config.steps)

    def init(params: Params) -> State:
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    return init


def abstract_state(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of what a step takes and gives; to be called with the mesh in context."""
    # Every leaf with its place on this mesh: without one it would return to the mesh it was saved from.
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else jax.P())
        ),
        jax.eval_shape(_initial(config), abstract_params(model, mesh)),
    )


def abstract_batch(config: TrainConfig, mesh: Mesh) -> TokenBatch:
    """Shapes, dtypes and shardings of a step's batch."""
    shape = (config.accumulate, config.rows // config.accumulate, config.row_tokens)
    field: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PARTS))
    weights: Any = field.update(dtype=jnp.float32)
    return TokenBatch(field, field, Segments(field, field, field), field, weights, field, field)


def _record(
    writer: MetricsWriter | None, folder: Path, shards: Path, step: int, batch: TokenBatch, metrics: dict
) -> None:
    row = {name: value.item() for name, value in metrics.items()}
    if not np.isfinite([row["loss"], row["grad_norm"], row["update_norm"]]).all():
        of_process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        saved = folder / f"bad_batch_step_{step}{of_process}.npz"
        np.savez(saved, **batch._asdict() | batch.segments._asdict())
        sources = "\n  ".join(describe_sources(shards, batch))
        raise NonFiniteError(
            f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}, update norm {row['update_norm']}. "
            f"Its batch is in {saved}, "
            f"its {np.sum(batch.targets != NO_TARGET)} targets come from:\n  {sources}\n"
            "The last checkpoint is from before it; lower the learning rate or look at these examples."
        )
    if writer:
        writer.write(step, row)
