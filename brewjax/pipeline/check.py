"""Finds everything that would stop a run, before its first byte is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from brewjax import distributed
from brewjax.bundle.bundle import TOKENIZER
from brewjax.config import Config, ConfigError
from brewjax.data.prompts.styles import code
from brewjax.data.records.contrastive import ContrastiveConfig
from brewjax.data.records.preferences import AlignConfig
from brewjax.data.records.pretrain import PretrainConfig, general_files
from brewjax.data.records.sft import SftConfig
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.evaluate.out_of_fold import LIGHTGBM
from brewjax.model.config import ModelConfig
from brewjax.model.params import abstract_params
from brewjax.model.sharding import MeshConfig
from brewjax.pipeline.context import Run
from brewjax.pipeline.recipe import ContrastiveStage, DistillStage, Stage, TrainedStage


def check_run(run: Run) -> None:
    """Checks a run before anything is written: its tables, tasks, models, meshes, and how they fit.

    Args:
      run: to check; its datasets are read.

    Raises:
      ConfigError: a line for each thing that is wrong.
    """
    problems: list[str] = []
    surfaces = {}
    with _collect(problems):
        surfaces = run.surfaces
    for surface in surfaces.values():
        with _collect(problems):
            _ = surface.tasks  # which reads the dataset
    if not problems:
        with _collect(problems):
            _check_ids(run)
        with _collect(problems):
            _check_tokens(run)
        for name, stage in run.recipe.stages.items():
            with _collect(problems):
                _check_stage(run, name, stage)
    with _collect(problems), _blame(run.recipe, "evaluate", "mesh"):
        run.recipe.evaluate.mesh.build()
    if watch := run.recipe.evaluate.watch:
        with _collect(problems), _blame(run.recipe, "evaluate", "watch"):
            watch.check()
            if jax.process_count() > 1:
                raise ValueError("a suite is run by a single process, and here are several")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


@contextlib.contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        problems.append(str(error))


def _check_ids(run: Run) -> None:
    """Ids of two tables must not be called alike: one token would stand for two things."""
    owners: dict[str, str] = {}
    for surface in run.surfaces.values():
        card = surface.dataset.card
        for table, described in (("members", card.members), ("items", card.items), ("events", card.events)):
            for name in (code(attribute.name) for attribute in described.attributes if attribute.kind == "id"):
                owner = f"{table} of surface '{surface.name}'"
                if name in owners:
                    message = f"ids of {owners[name]} and of {owner} are both called '{name}', and would be the same"
                    raise card.error(f"{message} tokens; give one of them another display_name", table)
                owners[name] = owner


def _check_tokens(run: Run) -> None:
    """The vocabulary, the label words, and the tokenizers of models from elsewhere."""
    run.first_model()
    tokenizer = run.known_tokenizer()
    if tokenizer:
        for _, task in run.tasks.values():
            task.check_words(tokenizer)
    for name in run.recipe.stages:
        check_foreign_tokenizers(run, name, tokenizer)


def check_foreign_tokenizers(run: Run, name: str, tokenizer: Tokenizer | None) -> None:
    """Checks that a stage's models of other folders have the recipe's tokenizer.

    Args:
      run: of the recipe.
      name: of the stage.
      tokenizer: the recipe's; None where it is still to be trained.

    Raises:
      ConfigError: a model has another one.
    """
    for key in ("init_from", "teacher"):
        model = getattr(run.recipe.stages[name], key, None)
        if not model or model in run.recipe.stages:
            continue
        if tokenizer is None or Tokenizer.load(Path(model) / TOKENIZER).hf.get_vocab() != tokenizer.hf.get_vocab():
            hint = "make it the recipe's `model`, or its tokenizer's `path`"
            raise run.recipe.error(f"the tokenizer of {model} is not this recipe's; {hint}", "stages", name, key)


def _check_stage(run: Run, name: str, stage: Stage) -> None:
    recipe, model = run.recipe, run.shape(name)
    if not isinstance(stage, TrainedStage):
        _check_mesh(recipe, model, stage.mesh, "stages", name, "mesh")
        return
    with _blame(recipe, "stages", name, "data"):
        _check_data(run, stage.data)
    _check_mesh(recipe, model, stage.train.mesh, "stages", name, "train", "mesh")
    with _blame(recipe, "stages", name, "train"):
        stage.train.check_rows(stage.train.mesh.build())
    if isinstance(stage, ContrastiveStage):
        stage.loss.check_model(model.d_model)
    if isinstance(stage, DistillStage):
        teacher = run.shape(stage.teacher)
        if stage.loss.teacher_placement != "same_mesh":
            _check_mesh(recipe, teacher, stage.loss.mesh, "stages", name, "loss", "mesh")
        with _blame(recipe, "stages", name, "teacher"):
            stage.loss.check_models(teacher, model)


def _check_mesh(config: Config, model: ModelConfig, mesh: MeshConfig, *location: str) -> None:
    """That the devices of this machine make the mesh, and the mesh divides the model."""
    with _blame(config, *location):
        abstract_params(model, mesh.build())


@contextlib.contextmanager
def _blame(config: Config, *location: str) -> Iterator[None]:
    """Blames the key at `location` for errors that name none."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise config.error(str(error), *location) from None


def _check_data(run: Run, data: SftConfig | AlignConfig | PretrainConfig | ContrastiveConfig) -> None:
    names = [*run.tasks]
    if isinstance(data, SftConfig):
        data.mix.check_names(names)
        if data.soft_labels not in (None, LIGHTGBM) and len(run.surfaces) > 1:
            message = f"the ids of a file are of one surface, and there are several; give {LIGHTGBM}"
            raise data.error(message, "soft_labels")
        for name in data.loss_weights:
            if name not in names:
                raise data.error(f"no task '{name}'; tasks: {', '.join(names)}", "loss_weights", name)
    elif isinstance(data, AlignConfig):
        for index, name in enumerate(data.tasks):
            if name not in names:
                raise data.error(f"no task '{name}'; tasks: {', '.join(names)}", "tasks", index)
    elif isinstance(data, ContrastiveConfig):
        data.choose(run.tasks)
        for key in ("mined_negatives", "ranker"):
            if getattr(data, key) and distributed.process_index_and_count()[1] > 1:
                raise data.error("made by one process before training, and this run has several", key)
    elif data.general_text and not general_files(Path(data.general_text)):
        raise data.error(f"{data.general_text}: no .txt or .jsonl files there", "general_text")
