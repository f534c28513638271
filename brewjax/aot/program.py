"""The programs of a run, traced over abstract devices: nothing is allocated."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from brewjax.model.config import ModelConfig
from brewjax.model.flops import model_flops
from brewjax.model.params import abstract_params
from brewjax.model.sharding import BATCH_AXES, FSDP_TENSOR, data_parallel_size
from brewjax.scoring.passes import PAGE, Bucket, Pass, build_inputs
from brewjax.scoring.scorer import compute_pass, score_labels
from brewjax.train.loop import TrainConfig, abstract_batch, abstract_state, make_step
from brewjax.train.objectives import BASE, supervised


class TracedProgram(NamedTuple):
    """A program to compile.

    Attributes:
      name: for reports.
      traced: the program.
      arguments: shapes with shardings.
      flops: FLOPs of the model over all devices (see `model_flops`).
      kernel_flops: those of them in kernels, for which the compiler has no estimate.
    """

    name: str
    traced: jax.stages.Traced
    arguments: Any
    flops: float
    kernel_flops: float


def training_step(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> TracedProgram:
    """Traces the step that `brewjax run` trains with; call it with the mesh in context.

    Args:
      model: the shape of the decoder.
      config: of the training run.
      mesh: of abstract devices, or real ones.

    Returns:
      The step.

    Raises:
      ValueError: if rows do not divide over the mesh.
    """
    config.check_rows(mesh)
    base = {BASE: model} if config.lora else {}
    step = jax.jit(make_step(model, config, supervised, base), donate_argnums=0)
    aux_params = {name: abstract_params(base_model, mesh) for name, base_model in base.items()}
    arguments: Any = abstract_state(model, config, mesh), abstract_batch(config, mesh), {}, aux_params
    other_flops, kernel_flops = (3 * flops for flops in model_flops(model, config.batch_size, config.seq_len))
    return TracedProgram("training step", step.trace(*arguments), arguments, other_flops + kernel_flops, kernel_flops)


def scoring_pass(model: ModelConfig, bucket: Bucket, mesh: Mesh) -> list[TracedProgram]:
    """Traces the two programs of a `Scorer`'s pass; call it with the mesh in context.

    Args:
      model: the shape of the decoder.
      bucket: the pass's shape.
      mesh: of abstract devices, or real ones.

    Returns:
      The pass, and its label scores.

    Raises:
      ValueError: if the bucket is not whole pages, or has cached pages on a mesh that splits rows.
    """
    num_devices = data_parallel_size(mesh)
    if bucket.tokens % PAGE:
        raise ValueError(f"--score: {bucket.tokens} tokens are not whole pages of {PAGE}")
    if bucket.cached_pages and num_devices > 1:
        raise ValueError(f"--score TOKENS,PAST: a past needs data=1, fsdp=1 and expert=1, not {dict(mesh.shape)}")
    params = abstract_params(model, mesh)
    row_sharding = NamedSharding(mesh, jax.P(BATCH_AXES, None))
    rows = build_inputs([Pass(bucket, [])], num_devices)
    inputs, labels = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding),
        ((*rows[:4], rows.cached_pages, rows.new_pages), rows.labels),
    )
    pool = None
    if bucket.cached_pages:
        pages = 1 + bucket.cached_pages + bucket.tokens // PAGE
        shape = (model.layers, pages, PAGE, model.kv_heads, model.head_dim)
        sharding = FSDP_TENSOR.named(mesh, shape, "layers", None, None, "heads", None)
        pool = (jax.ShapeDtypeStruct(shape, model.compute_dtype, sharding=sharding),) * 2
    run = jax.jit(functools.partial(compute_pass, model), donate_argnums=1)
    hidden_shape = (num_devices, bucket.max_candidates, model.d_model)
    batch = NamedSharding(mesh, FSDP_TENSOR.spec("batch", None, None))
    hidden = jax.ShapeDtypeStruct(hidden_shape, model.compute_dtype, sharding=batch)
    head = jax.jit(functools.partial(score_labels, model), static_argnums=3)
    other_flops, kernel_flops = model_flops(model, num_devices, bucket.tokens, bucket.cached_pages * PAGE)
    pass_arguments, head_arguments = (params, pool, *inputs), (params, hidden, labels)
    return [
        TracedProgram(
            "scoring pass", run.trace(*pass_arguments), pass_arguments, other_flops + kernel_flops, kernel_flops
        ),
        TracedProgram("its label scores", head.trace(*head_arguments, "labels"), head_arguments, 0.0, 0.0),
    ]
