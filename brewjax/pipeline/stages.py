"""What each stage of a recipe does, and all of them as steps, each model followed by its evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from brewjax import distributed
from brewjax.bundle.bundle import TOKENIZER, Bundle
from brewjax.bundle.surface import SURFACES
from brewjax.compress.prune import LayerReport, prune
from brewjax.compress.quantize import quantize
from brewjax.console import plain_console
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.contrastive import ContrastiveConfig, ItemTable
from brewjax.data.records.mixture import MixConfig
from brewjax.data.records.preferences import AlignConfig
from brewjax.data.records.pretrain import PretrainConfig, domain_texts
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import sample_examples
from brewjax.data.tasks.task import Task
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.evaluate.calibration import calibrate
from brewjax.evaluate.predict import TaskExamples
from brewjax.fingerprint import hash_folder
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL, Params, load_model
from brewjax.paths import check_renames, locked
from brewjax.pipeline.check import check_foreign_tokenizers, check_run
from brewjax.pipeline.context import Run
from brewjax.pipeline.evaluation import (
    EVALUATE,
    baselines_stage,
    budgets_stage,
    evaluate_stage,
    report_stage,
    retrieve_stage,
)
from brewjax.pipeline.preparation import GENERAL, DataConfig, WriteUnits, aligned_tasks, domain_name, write_data
from brewjax.pipeline.recipe import (
    AlignStage,
    ContrastiveStage,
    DistillStage,
    PretrainStage,
    PruneStage,
    QuantizeStage,
    Recipe,
    SftStage,
    TrainedStage,
)
from brewjax.pipeline.runner import Step, run_steps
from brewjax.pipeline.workers import write_on_this_host
from brewjax.retrieve.encoder import Encoder, EncoderConfig
from brewjax.suite.watch import Watch
from brewjax.train.align import REFERENCE
from brewjax.train.contrastive import ITEMS, Contrastive
from brewjax.train.distill import TEACHER, Distill
from brewjax.train.loop import train
from brewjax.train.objectives import Objective, supervised
from brewjax.train.teachers import AuxModel, FrozenModel, SoftLabels

# The folders whose code makes what a step leaves.
BUDGETS = {"budgets", "budget_style"}  # settings of evaluation that the figures of models do not depend on
DATA = ("data",)
TRAIN = ("train", "model", "../pallas_kernels")
COMPRESS = ("compress", "model", "../pallas_kernels")
SCORE = ("evaluate", "scoring", "model", "../pallas_kernels")
RETRIEVE = ("retrieve", "scoring", "model", "../pallas_kernels")
TOKENIZER_EXAMPLES = 400  # prompts of each task that a tokenizer is trained on


# --- data


def prepare(run: Run, folder: Path) -> None:
    """Writes the tokenizer of all surfaces, and the scales of each."""
    if run.base:
        Tokenizer.load(run.base / TOKENIZER).save(folder / TOKENIZER)
    for surface in run.surfaces.values():
        surface.scales_file.parent.mkdir(parents=True, exist_ok=True)
        Scales.fit(surface.dataset, surface.until, surface.tables).save(surface.scales_file)
    config = run.recipe.tokenizer
    if config and config.path:
        Tokenizer.load(config.path).save(folder / TOKENIZER)
    elif config:
        _train_tokenizer(run, config.vocab_size or 0).save(folder / TOKENIZER)
    run.tokenizer.check_pieces()
    for _, task in run.tasks.values():
        task.check_words(run.tokenizer)
    for name in run.recipe.stages:
        check_foreign_tokenizers(run, name, run.tokenizer)


def _train_tokenizer(run: Run, vocab_size: int) -> Tokenizer:
    """Trained on prompts of every surface's training period, which a tokenizer of single bytes says first."""
    prompts = run.recipe.prompts
    words = sorted({word for _, task in run.tasks.values() for word in task.words})
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for surface in run.surfaces.values():
        verbalizer = Verbalizer(surface.dataset, surface.scales, Tokenizer.byte_level(), max_tokens=1_000_000)
        first = len(texts)
        for _, task in surface.tasks:
            for example in sample_examples(surface.dataset, task, "train", TOKENIZER_EXAMPLES):
                style = prompts.draw(rng)
                for fitting in verbalizer.all_fitting(task, [example], style):
                    texts.append(verbalizer.prompt(task, fitting, style).render())
        if _reads_prose(run.recipe):
            prose = domain_texts(verbalizer, surface.until, PretrainConfig())
            texts += [text for text, _ in itertools.islice(prose, len(texts) - first)]
    return Tokenizer.train(texts, words, vocab_size)


def _reads_prose(recipe: Recipe) -> bool:
    return any(isinstance(stage, PretrainStage) for stage in recipe.stages.values())


def shares(run: Run, config: DataConfig, folder: Path) -> dict[Path, float]:
    """The folders that `write_data` left, with their shares of all tokens."""
    if isinstance(config, ContrastiveConfig):
        return {folder / config.choose(run.tasks).name: 1.0}
    if isinstance(config, PretrainConfig):
        general = config.general_fraction if config.general_text else 0
        weights = {domain_name(surface): surface.config.weight for surface in run.surfaces.values()}
        domain = MixConfig().shares({name: folder / name for name in weights}, weights)
        return {path: share * (1 - general) for path, share in domain.items()} | (
            {folder / GENERAL: general} if general else {}
        )
    tasks = aligned_tasks(run, config) if isinstance(config, AlignConfig) else run.tasks
    mix = MixConfig() if isinstance(config, AlignConfig) else config.mix
    return mix.shares(
        {name: folder / name for name in tasks}, {name: task.surface.config.weight for name, task in tasks.items()}
    )


# --- models


def train_stage(run: Run, stage: TrainedStage, data: Path, folder: Path) -> None:
    """Trains on what is in the folder `data`, and leaves the model in `folder/model`."""
    mesh, shards = stage.train.mesh.build(), shares(run, stage.data, data)
    model, init = _beginning(run, stage, mesh)
    frozen: dict[str, AuxModel] = {}
    objective: Objective | Contrastive = supervised
    if isinstance(stage, DistillStage):
        objective = stage.loss
        teacher = FrozenModel(*load_model(run.model(stage.teacher), mesh))
        frozen = stage.loss.aux_models(teacher, model, stage.train, shards, folder / "teacher")
    elif isinstance(stage, AlignStage):
        objective = stage.loss
        if not stage.train.lora:
            frozen = {REFERENCE: FrozenModel(*load_model(run.model(stage.init_from), mesh))}
    elif isinstance(stage, SftStage) and stage.data.soft_labels:
        objective, frozen = Distill(kd_weight=stage.soft_label_weight), {TEACHER: SoftLabels(shards)}
    elif isinstance(stage, ContrastiveStage):
        objective, frozen = stage.loss, {ITEMS: ItemTable(shards)}
    watch = None
    if (watched := run.recipe.evaluate.watch) and not isinstance(stage, ContrastiveStage):
        watch = Watch(watched, folder, lambda params, path: run.bundle(model, params).save(path))
    bundle = run.bundle(model, train(model, stage.train, shards, folder, objective, init, frozen, watch))
    if isinstance(stage, ContrastiveStage):
        surface, task = stage.data.choose(run.tasks)
        bundle = dataclasses.replace(bundle, surfaces={surface.name: bundle.surfaces[surface.name]})
        Encoder(bundle, _encoder_config(stage, task)).save(folder / "model")
    else:
        bundle.save(folder / "model")


def _encoder_config(stage: ContrastiveStage, task: Task) -> EncoderConfig:
    return EncoderConfig(
        task=task.name,
        member_instruction=stage.data.member_instruction,
        item_instruction=stage.data.item_instruction,
        pooling=stage.loss.pooling,
        dimensions=stage.loss.dimensions,
    )


def _beginning(run: Run, stage: TrainedStage, mesh: Mesh) -> tuple[ModelConfig, Callable[[], Params] | None]:
    """What a stage starts from; nothing that makes parameters: random ones."""
    if not stage.init_from:
        return run.first_model(), None
    start = run.model(stage.init_from)
    return ModelConfig.load(start / MODEL), None if stage.from_scratch else lambda: load_model(start, mesh)[1]


def prune_stage(run: Run, stage: PruneStage, folder: Path) -> None:
    like = ModelConfig.load(run.model(stage.match_sizes_of) / MODEL) if stage.match_sizes_of else None
    config = stage.config(like)
    bundle = Bundle.load(run.model(stage.init_from), config.mesh)
    prune(bundle, run.calibration(bundle, stage.examples), config, _print_layer).save(folder / "model")


def _print_layer(layer: LayerReport) -> None:
    if distributed.is_process_zero():
        loss = f"{layer.attention:.2%} of attention's output is lost, {layer.mlp:.2%} of the MLP's"
        plain_console().print(f"layer {layer.layer}: {loss}")


def quantize_stage(run: Run, stage: QuantizeStage, folder: Path) -> None:
    quantize(run.model(stage.init_from), stage).save(folder / "model")


def make_model(run: Run, name: str, work: Callable[[Path], None], folder: Path) -> None:
    """A stage's own work, of models that read the recipe's tokens."""
    check_foreign_tokenizers(run, name, run.tokenizer)  # again: a stage may be new, and `prepare` done long ago
    work(folder)
    if max_examples := run.recipe.stages[name].calibrate:
        _calibrate(run, max_examples, folder / "model")


def _calibrate(run: Run, max_examples: int, model: Path) -> None:
    """Adds temperatures to a model's folder."""
    validation = [
        TaskExamples(each.surface.dataset, each.task, each.sample("validation", max_examples), each.surface.name)
        for each in run.tasks.values()
    ]
    surfaces = calibrate(Bundle.load(model, run.recipe.evaluate.mesh), validation).surfaces
    if distributed.is_process_zero():
        for name, surface in surfaces.items():
            surface.save(model / SURFACES / name)
            words = ", ".join(f"{task} {temperature:.3f}" for task, temperature in surface.temperatures.items())
            plain_console().print(f"temperatures of {name}: {words}")


# --- the plan


def steps(run: Run, write_units: WriteUnits = write_on_this_host) -> list[Step]:
    """Everything that a recipe asks for, in order. Training data is written by `write_units`."""
    recipe = run.recipe
    surfaces = [
        [name, [Path(path).read_text() for path in surface.task_files]] for name, surface in run.surfaces.items()
    ]
    weights = {name: surface.config.weight for name, surface in run.surfaces.items()}
    tokenizer_path = recipe.tokenizer.path if recipe.tokenizer else run.base and run.base / TOKENIZER
    tokenizer = hash_folder(Path(tokenizer_path)) if tokenizer_path else recipe.model_dump(mode="json")["tokenizer"]
    prompts, judged = (
        recipe.model_dump(mode="json", exclude={"evaluate": {"watch", *BUDGETS}})[key]
        for key in ("prompts", "evaluate")
    )
    settings: Any = [surfaces, tokenizer, prompts, _reads_prose(recipe)]
    plan = [Step("prepare", functools.partial(prepare, run), (), settings, DATA)]
    data: dict[str, str] = {}  # the steps that write training data, by what they write
    for name, stage in recipe.stages.items():
        settings = stage.model_dump(mode="json")
        models = []
        for key in ("init_from", "teacher", "match_sizes_of"):
            source = settings.get(key)
            if source in recipe.stages:
                models.append(source)
            elif source:  # by its content, wherever it lies
                settings[key] = hash_folder(Path(source))
        if not stage.init_from:
            settings["model"] = ModelConfig.load(recipe.model).model_dump(mode="json")
        code = SCORE if stage.calibrate else ()
        if isinstance(stage, TrainedStage):
            own_data = settings.pop("data")
            settings["surface_weights"] = weights
            if own_data.get("general_text"):
                own_data["general_text"] = hash_folder(Path(own_data["general_text"]))
            makers, code_of_data = ["prepare"], [*DATA]
            for of_model, key, code_of_model in (
                (own_data.get("mined_negatives"), "encoder", RETRIEVE),
                (own_data, "ranker", SCORE),
            ):
                if of_model and (source := of_model.get(key)):
                    code_of_data += code_of_model
                    if source in recipe.stages:
                        makers.append(source)
                    else:
                        of_model[key] = hash_folder(Path(source))
            data_key = json.dumps([type(stage.data).__name__, own_data, stage.train.seq_len])
            if data_key not in data:
                data[data_key] = f"data-{name}"
                work = functools.partial(write_data, run, stage.data, stage.train.seq_len, write_units)
                plan.append(
                    Step(
                        data[data_key], work, (*makers,), data_key, (*code_of_data,), resumable=True, all_processes=True
                    )
                )
            work = functools.partial(train_stage, run, stage, run.folder / data[data_key])
            work = functools.partial(make_model, run, name, work)
            plan.append(
                Step(name, work, (data[data_key], *models), settings, code + TRAIN, protected=True, all_processes=True)
            )
        else:
            does: Any = prune_stage if isinstance(stage, PruneStage) else quantize_stage
            work = functools.partial(make_model, run, name, functools.partial(does, run, stage))
            plan.append(Step(name, work, ("prepare", *models), settings, code + COMPRESS, all_processes=True))
        embeds = isinstance(stage, ContrastiveStage)
        work = functools.partial(retrieve_stage if embeds else evaluate_stage, run, name)
        judge = RETRIEVE if embeds else SCORE
        plan.append(Step(f"{EVALUATE}{name}", work, (name,), judged, judge, all_processes=True))
    if recipe.ranking_stages:
        plan.append(Step("baselines", functools.partial(baselines_stage, run), ("prepare",), judged, ("evaluate",)))
        if recipe.evaluate.budgets:
            last, budgets = recipe.ranking_stages[-1], recipe.evaluate.model_dump(mode="json", include=BUDGETS)
            work = functools.partial(budgets_stage, run, last)
            plan.append(Step("budgets", work, (last,), [judged, budgets], SCORE, all_processes=True))
    everything = tuple(step.name for step in plan)
    plan.append(Step("report", functools.partial(report_stage, run, everything), everything, [], ("evaluate",)))
    return plan


def run_recipe(recipe: Recipe, folder: Path, allow_code_mismatch: bool = False, until: str = "report") -> None:
    """Runs a recipe's stages into `folder/<stage>`, each followed by its evaluation; see `run_steps`.

    Args:
      recipe: what is done.
      folder: of the run; what is done there already, with these settings and this code, is not done again.
      allow_code_mismatch: also take what other code has made.
      until: name of the last step to run.

    Raises:
      ConfigError: the run cannot be done (see `check_run`); before anything is written.
      LockedError: another process runs into `folder`.
    """
    run = Run(recipe, folder)
    check_run(run)
    plan = steps(run)
    last = [step.name for step in plan].index(until)
    _run_plan(run, plan[: last + 1], allow_code_mismatch)


def prepare_recipe(recipe: Recipe, folder: Path, write_units: WriteUnits = write_on_this_host) -> None:
    """Writes the tokenizer, the scales and all training data of a recipe, which `run_recipe` then finds.

    Args:
      recipe: whose data is written.
      folder: of the run.
      write_units: writes the shards, on this host or on Beam.

    Raises:
      ConfigError: as `run_recipe`.
      LockedError: as `run_recipe`.
    """
    run = Run(recipe, folder)
    check_run(run)
    _run_plan(run, [step for step in steps(run, write_units) if step.code == DATA])


def _run_plan(run: Run, plan: Sequence[Step], allow_code_mismatch: bool = False) -> None:
    with locked(run.folder) if distributed.is_process_zero() else contextlib.nullcontext():
        distributed.run_on_process_zero(lambda: check_renames(run.folder))
        data_hash = distributed.run_on_process_zero(lambda: run.data_hash)
        run_steps(plan, run.folder, data_hash, allow_code_mismatch)
