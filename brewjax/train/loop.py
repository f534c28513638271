"""The one training loop: batches in, checkpoints and metrics out, resumable at any step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from brewjax import distributed
from brewjax.config import Config, Count, Seed
from brewjax.data.records.contrastive import ItemTable, TextLabels
from brewjax.data.records.loader import NO_TARGET, TokenBatch, describe_sources
from brewjax.data.records.shards import Shards
from brewjax.model.config import Dtype, ModelConfig
from brewjax.model.decoder import Decoder
from brewjax.model.params import Params, abstract_params, bind, init_params
from brewjax.model.sharding import MeshConfig, data_parallel_size
from brewjax.train.batches import BATCH_SPEC, ShardedBatches
from brewjax.train.checkpoints import open_checkpoints, restore
from brewjax.train.contrastive import Contrastive
from brewjax.train.gradients import AuxOutputs, compute_grads, decoder_params, with_loss_params
from brewjax.train.lora import LoraConfig
from brewjax.train.metrics_writer import MetricsWriter
from brewjax.train.objectives import BASE, AuxInputs, Objective, TopK, WeightedSum
from brewjax.train.optimizer import OptimizerConfig
from brewjax.train.teachers import AuxModel, FrozenModel, SoftLabels, TeacherCache, TeacherOnMesh
from pallas_kernels.token_labels import PADDING, TokenLabels

State = dict[str, Any]
Step = Callable[..., tuple[State, dict[str, Array]]]


class TrainConfig(Config):
    """One training run."""

    steps: Count
    """Steps of the whole run."""
    batch_size: int = pydantic.Field(gt=0)
    """Packed rows in a step, over all devices and micro-batches."""
    seq_len: int = pydantic.Field(gt=1)  # at least a token and the one that follows
    """Tokens in a row."""
    gradient_accumulation_steps: int = pydantic.Field(default=1, gt=0)
    """Micro-batches that a step is computed in, one after the other, to save memory."""
    num_data_shards: int = pydantic.Field(default=1, gt=0)
    """Independent shards of the data order. Each supplies a fixed block of rows, and a process reads the shards of its
    rows; with fewer shards than processes, several processes read the same shard."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser and its learning rate."""
    lora: LoraConfig | None = None
    """Trains low-rank updates of the weights instead of the weights; null for full training."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of records."""
    checkpoint_every_steps: int = pydantic.Field(default=100, gt=0)
    """Steps between checkpoints."""
    max_checkpoints_to_keep: int = pydantic.Field(default=2, gt=0)
    """Checkpoints that stay on disk: the newest ones."""
    mesh: MeshConfig = MeshConfig()
    """The devices, along the mesh axes."""

    @pydantic.model_validator(mode="after")
    def _micro_batches_divide(self) -> TrainConfig:
        size = f"batch_size ({self.batch_size})"
        steps = f"gradient_accumulation_steps ({self.gradient_accumulation_steps})"
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(f"{size} must be a multiple of {steps}")
        if self.batch_size // self.gradient_accumulation_steps % self.num_data_shards:
            raise ValueError(f"{size} / {steps} must be a multiple of num_data_shards ({self.num_data_shards})")
        return self

    def check_rows(self, mesh: Mesh) -> None:
        """Checks that the rows of a micro-batch divide over a mesh.

        Args:
          mesh: to train on.

        Raises:
          ValueError: they do not.
        """
        num_devices = data_parallel_size(mesh)
        if self.batch_size // self.gradient_accumulation_steps % num_devices:
            raise ValueError(
                f"train.batch_size ({self.batch_size}) / gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}) must be a multiple of the {num_devices} devices along data, "
                "fsdp and expert, which share the rows"
            )


class NonFiniteError(RuntimeError):
    """The loss, the gradient or the update became NaN or infinite."""


def train(
    model: ModelConfig,
    config: TrainConfig,
    shards: Shards,
    folder: Path,
    objective: Objective | Contrastive,
    init: Callable[[], Params] | None = None,
    aux_models: Mapping[str, AuxModel] = {},
    watch: Callable[[int, Callable[[], Params]], None] | None = None,
) -> Params:
    """Trains from the newest checkpoint in `folder`, or from the start, to the last step.

    Weights and the optimiser's moments are float32 during training, whatever `model.param_dtype`: bfloat16 would round
    most of a step's small change away.

    A run that is killed and started again with the same arguments has bit for bit the losses of an uninterrupted one.
    On SIGTERM it saves a checkpoint and exits (see `brewjax.distributed`).

    Args:
      model: the shape of the decoder.
      config: of the run.
      shards: folders of records, as `brewjax.data.records.shards.write_shards` writes them.
      folder: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
      objective: the loss, for example `supervised`, `Align()`, `Distill()` or `Contrastive()`.
      init: the initial parameters. Without a checkpoint, parameters come from `init()`, or are random if it is None.
        With LoRA, `init()` is always called, for the base weights. Without LoRA the step donates the returned arrays:
        do not use them afterwards.
      aux_models: frozen models or their outputs, by the names that the objective looks up ("teacher", "reference").
        With LoRA the objective also gets "base", the weights without updates. Checkpoints do not contain them: pass
        them again on a restart. `Contrastive` needs an `ItemTable` of the shards as "items".
      watch: called after each step with its number and a function that makes the parameters as they would be returned.

    Returns:
      The trained parameters, in `model.param_dtype`; with LoRA, updates are merged into the base weights.

    Raises:
      NonFiniteError: if loss, gradient or update become NaN or infinite. It names the step and the examples of its
        batch; the batch is saved in `folder`, and the newest checkpoint is from before that step.
      ValueError: if rows do not divide over the mesh, or initial parameters do not fit the model.
      UnreadableCheckpointError: if there are checkpoints and none can be read.

    Examples:
      A model learns that every question's answer is the same token.

      >>> import pathlib, tempfile
      >>> from brewjax.data.records.shards import write_shards
      >>> from brewjax.data.text.encode import EncodedPrompt
      >>> from brewjax.model.config import ModelConfig
      >>> from brewjax.train.loop import TrainConfig, train
      >>> from brewjax.train.metrics_writer import read_metrics
      >>> from brewjax.train.objectives import supervised
      >>> from brewjax.train.optimizer import OptimizerConfig
      >>> model = ModelConfig(
      ...     name="tiny", vocab_size=16, d_model=8, layers=1, heads=1, kv_heads=1, head_dim=8, d_ff=8
      ... )
      >>> prompt = EncodedPrompt([[3, 4], [5, 6]], [[7, 8], [9, 8]], labels=[1, 2], answers=[0, 0], layout="dense")
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = write_shards(folder / "shards", [(prompt, {"example": n}) for n in range(8)], 16)
      >>> optimizer = OptimizerConfig(learning_rate=0.1, warmup=0)
      >>> config = TrainConfig(steps=8, batch_size=2, seq_len=16, optimizer=optimizer)
      >>> params = train(model, config, folder / "shards", folder, supervised)  # doctest: +ELLIPSIS
      step 1/8  loss ...
      >>> losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
      >>> losses[-1] < losses[0]
      True
      >>> params["embedding"].shape
      (16, 8)
    """
    mesh = config.mesh.build()
    config.check_rows(mesh)
    frozen = _frozen_models(model, config, mesh, init, aux_models)
    batches = _open_batches(config, shards, mesh, aux_models)
    with (
        jax.set_mesh(mesh),
        distributed.defer_preemption(),
        open_checkpoints(folder, config.max_checkpoints_to_keep) as checkpointer,
    ):
        aux_params = {name: frozen_model.on(mesh) for name, frozen_model in frozen.items()}
        state = _restore_or_init(checkpointer, model, config, mesh, batches, init, objective)
        models = {name: frozen_model.model for name, frozen_model in frozen.items()}
        step = jax.jit(make_step(model, config, objective, models), donate_argnums=0)
        teachers = {name: aux_model for name, aux_model in aux_models.items() if isinstance(aux_model, TeacherOnMesh)}
        with _open_metrics(folder, int(state["step"]), config.steps) as writer:
            log = _StepLog(writer, folder, shards)
            run_step = _with_aux_models(step, aux_params, teachers, mesh)

            def finished(state: State) -> Params:
                params = decoder_params(state["params"])
                if config.lora:
                    return jax.jit(config.lora.merge)(aux_params[BASE], params)
                return _cast(params, model.param_dtype)

            after_step = (lambda step, state: watch(step, lambda: finished(state))) if watch else None
            state = _run_steps(run_step, state, batches, config, mesh, checkpointer, log, after_step)
        checkpointer.wait()
        return finished(state)


def _frozen_models(
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh,
    init: Callable[[], Params] | None,
    aux_models: Mapping[str, AuxModel],
) -> dict[str, FrozenModel]:
    """The models that run inside the step: those of `aux_models`, and the base weights under LoRA."""
    frozen = {name: aux_model for name, aux_model in aux_models.items() if isinstance(aux_model, FrozenModel)}
    if config.lora:
        if init is None:
            raise ValueError("train.lora adapts the weights of a model: there is none to start from (init is None)")
        frozen[BASE] = _load_initial(model, init, mesh)
    return frozen


def _open_batches(
    config: TrainConfig, shards: Shards, mesh: Mesh, aux_models: Mapping[str, AuxModel]
) -> ShardedBatches:
    """Batches of the shards, each with what the tables and caches of `aux_models` hold for it."""
    lookups = {
        name: aux_model.look_up
        for name, aux_model in aux_models.items()
        if isinstance(aux_model, (TeacherCache, SoftLabels, ItemTable))
    }
    return ShardedBatches(
        shards,
        mesh,
        config.gradient_accumulation_steps,
        config.batch_size,
        config.seq_len,
        config.num_data_shards,
        config.seed,
        lookups,
    )


def _with_aux_models(
    step: Step, aux_params: Mapping[str, Params], teachers: Mapping[str, TeacherOnMesh], mesh: Mesh
) -> Step:
    """The step as a function of state, batch and looked-up outputs: teachers on a mesh of their own run before it."""

    def run(state: State, placed: TokenBatch, aux_outputs: dict[str, Any]) -> tuple[State, dict[str, Array]]:
        if teachers:  # two programs that run at once on a CPU's devices may deadlock
            jax.block_until_ready(state)
        for name, teacher in teachers.items():
            aux_outputs[name] = jax.device_put(teacher(placed), NamedSharding(mesh, BATCH_SPEC))
        return step(state, placed, aux_outputs, aux_params)

    return run


def _run_steps(
    step: Step,
    state: State,
    batches: ShardedBatches,
    config: TrainConfig,
    mesh: Mesh,
    checkpointer: ocp.training.Checkpointer,
    log: _StepLog,
    after_step: Callable[[int, State], None] | None,
) -> State:
    """Runs the steps that remain, with their checkpoints, and returns the last state; exits on a preemption."""
    preemption_sync = distributed.PreemptionSync(mesh)
    for step_index in range(int(state["step"]) + 1, config.steps + 1):
        batch, placed, aux_outputs = next(batches)
        state, metrics = step(state, placed, aux_outputs)
        log.add(step_index, batch, metrics)
        preempted = preemption_sync()
        if preempted or step_index % config.checkpoint_every_steps == 0 or step_index == config.steps:
            log.flush()  # raises before a NaN gets into a checkpoint
            checkpointer.wait()
            checkpointer.save_checkpointables_async(step_index, {"state": state, "data": batches}, force=True)
        if preempted and step_index < config.steps:
            checkpointer.wait()
            distributed.exit_for_restart(f"checkpoint of step {step_index} of {config.steps} is saved")
        if after_step:
            after_step(step_index, state)
    return state


def make_step(
    model: ModelConfig, config: TrainConfig, objective: Objective | Contrastive, models: Mapping[str, ModelConfig] = {}
) -> Step:
    """One training step, to be compiled.

    Args:
      model: the shape of the decoder that is trained, as for `train`.
      config: as for `train`.
      objective: as for `train`.
      models: by name, the shapes of the frozen models that run inside the step.

    Returns:
      A function of a state, a batch [micro-batch, row, token], outputs of frozen models outside the step and parameters
      of those inside it (both by name), which returns the next state and the step's metrics.
    """
    optimizer, rate = config.optimizer.build(config.steps), config.optimizer.rate(config.steps)

    def step(
        state: State,
        micro_batches: TokenBatch,
        aux_outputs: Mapping[str, TopK | TextLabels] = {},
        aux_params: Mapping[str, Params] = {},
    ) -> tuple[State, dict[str, Array]]:
        def bind_all(params: Params, aux_outputs: AuxOutputs) -> tuple[Decoder, AuxInputs]:
            params = decoder_params(params)
            decoder = config.lora.bind(model, aux_params[BASE], params) if config.lora else bind(model, params)
            return decoder, dict(aux_outputs) | {name: bind(models[name], aux_params[name]) for name in aux_params}

        inputs = (micro_batches, aux_outputs)
        grads, means = compute_grads(objective, bind_all, state["params"], inputs)
        # Divided once, by the weights of all micro-batches: accumulation and unevenly filled rows change nothing.
        means = {name: WeightedSum(jnp.sum(mean.total), jnp.sum(mean.weight)) for name, mean in means.items()}
        weights = {name: jnp.where(mean.weight > 0, mean.weight, 1) for name, mean in means.items()}
        grads = jax.tree.map(lambda g: g / weights["loss"], grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        metrics = {name: mean.total / weights[name] for name, mean in means.items()} | {
            "weight": means["loss"].weight,
            "targets": jnp.sum(micro_batches.targets != NO_TARGET),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(state["step"]),
            "tokens": jnp.sum(micro_batches.token_labels.example_id > PADDING),
        }
        metrics["update_norm"] = optax.tree.norm(updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    return step


def _restore_or_init(
    checkpointer: ocp.training.Checkpointer,
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh,
    batches: ShardedBatches,
    init: Callable[[], Params] | None,
    objective: Objective | Contrastive,
) -> State:
    loss_params = objective.init() if isinstance(objective, Contrastive) else {}
    restored = restore(checkpointer, {"state": abstract_state(model, config, mesh, loss_params), "data": batches})
    if restored is not None:
        return restored["state"]
    if config.lora:
        params = config.lora.init(abstract_params(model, mesh), config.seed)
    elif init is not None:
        params = _cast(_load_initial(model, init, mesh).on(mesh), "float32")
    else:
        params = init_params(master(model), mesh, config.seed)
    params = with_loss_params(params, jax.device_put(loss_params, NamedSharding(mesh, jax.P())))
    return jax.jit(_initial(config), donate_argnums=0)(params)


def master(model: ModelConfig) -> ModelConfig:
    """The model with float32 weights, as it is trained."""
    return model.model_copy(update={"param_dtype": "float32"})


def _cast(params: Params, dtype: Dtype) -> Params:
    """Parameters in a dtype; arrays that have it are not copied."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _load_initial(model: ModelConfig, init: Callable[[], Params], mesh: Mesh) -> FrozenModel:
    """The parameters of `init`; raises ValueError if they do not fit `model`."""
    params = init()
    sizes = [
        {jax.tree_util.keystr(path): (*leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (abstract_params(model, mesh), params)
    ]
    for name in sizes[0] | sizes[1]:
        expected, actual = (tree_sizes.get(name) for tree_sizes in sizes)
        if expected != actual:
            raise ValueError(
                f"the parameters to start from do not fit model '{model.name}': {name} is {actual}, not {expected}"
            )
    return FrozenModel(model, params)


def _initial(config: TrainConfig) -> Callable[[Params], State]:
    optimizer = config.optimizer.build(config.steps)

    def init(params: Params) -> State:
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    return init


def abstract_state(model: ModelConfig, config: TrainConfig, mesh: Mesh, loss_params: Mapping[str, Any] = {}) -> State:
    """Makes a training state's shapes, dtypes and shardings; call it with the mesh in context.

    Args:
      model: the shape of the decoder.
      config: of the training run.
      mesh: that the state is sharded over.
      loss_params: parameters of the objective: scalars, on every device.

    Returns:
      A tree of `jax.ShapeDtypeStruct`.
    """
    params = config.lora.abstract(abstract_params(model, mesh)) if config.lora else abstract_params(master(model), mesh)
    params = with_loss_params(params, jax.eval_shape(lambda: dict(loss_params)))
    # Every leaf with its sharding on this mesh: Orbax would restore a leaf without one to the mesh it was saved from.
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else jax.P())
        ),
        jax.eval_shape(_initial(config), params),
    )


def abstract_batch(config: TrainConfig, mesh: Mesh) -> TokenBatch:
    """Shapes, dtypes and shardings of a step's batch, [micro-batches, rows, tokens], over `mesh`."""
    shape = (
        config.gradient_accumulation_steps,
        config.batch_size // config.gradient_accumulation_steps,
        config.seq_len,
    )
    field: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    weights: Any = field.update(dtype=jnp.float32)
    return TokenBatch(field, field, TokenLabels(field, field, field), field, weights, field, field)


def _open_metrics(folder: Path, start: int, steps: int) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """The writer of `metrics.jsonl` from step `start` on; None on all processes but process zero."""
    return MetricsWriter(folder, start, steps) if distributed.is_process_zero() else contextlib.nullcontext()


class _StepLog:
    """Metrics of steps. Each step's are read while the next step runs: reading waits for the device.

    Args:
      writer: of the rows; None where they are only checked.
      folder: gets the batch of a step that is not finite.
      shards: the records, to name those of that batch.
    """

    def __init__(self, writer: MetricsWriter | None, folder: Path, shards: Shards):
        self._writer, self._folder, self._shards = writer, folder, shards
        self._pending: tuple[int, TokenBatch, dict[str, Array]] | None = None

    def add(self, step: int, batch: TokenBatch, metrics: dict[str, Array]) -> None:
        """Writes the step before, and holds this one, which has been dispatched."""
        self.flush()
        self._pending = step, batch, metrics

    def flush(self) -> None:
        """Waits for the step that is held, and writes it; raises NonFiniteError if it is not finite."""
        if self._pending is None:
            return
        (step, batch, metrics), self._pending = self._pending, None
        row = {name: value.item() for name, value in metrics.items()}
        if not np.isfinite([row["loss"], row["grad_norm"], row["update_norm"]]).all():
            raise self._non_finite(step, batch, row)
        if self._writer:
            self._writer.write(step, row)

    def _non_finite(self, step: int, batch: TokenBatch, row: dict[str, float]) -> NonFiniteError:
        """Saves the batch, and returns the error that names its records."""
        suffix = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        saved = self._folder / f"bad_batch_step_{step}{suffix}.npz"
        np.savez(saved, **batch._asdict() | batch.token_labels._asdict())
        sources = "\n  ".join(describe_sources(self._shards, batch))
        return NonFiniteError(
            f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}, update norm {row['update_norm']}. "
            f"Its batch is in {saved}, "
            f"its {np.sum(batch.targets != NO_TARGET)} targets come from:\n  {sources}\n"
            "The last checkpoint is from before it; lower the learning rate or look at these examples."
        )
