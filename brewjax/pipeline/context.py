"""`Run`: a recipe and the folder of its outputs, with what several of its stages need of each surface."""

from __future__ import annotations

import dataclasses
import re
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import NamedTuple

from brewjax.bundle.bundle import TOKENIZER, Bundle
from brewjax.bundle.surface import SCALES, SURFACES, Surface
from brewjax.bundle.training import TrainedOn, Training
from brewjax.config import ConfigError
from brewjax.data.prompts.overlong import OverlongLog
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.dataset import Dataset, dataset_names, hash_dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.union import load_card
from brewjax.data.tasks.examples import RankingExample, sample_examples
from brewjax.data.tasks.task import Split, Task, load_tasks
from brewjax.data.text.encode import EncodedPrompt
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.fingerprint import hash_json
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL, Params
from brewjax.pipeline.recipe import PruneStage, QuantizeStage, Recipe, RecipeSurface


@dataclasses.dataclass(frozen=True)
class RunSurface:
    """A surface of a run, with its tables; they are read once.

    Attributes:
      run: the run.
      name: among its surfaces.
      config: of the recipe.
    """

    run: Run
    name: str
    config: RecipeSurface

    def prefixed(self, name: str) -> str:
        """The name of something of the surface within the run: "jobs/apply"; "apply" where there is one surface."""
        return f"{self.name}/{name}" if len(self.run.surfaces) > 1 else name

    @cached_property
    def dataset(self) -> Dataset:
        return Dataset.load(self.config.dataset)

    @property
    def tables(self) -> str:
        """SHA-256 of the dataset's folder."""
        return hash_dataset(Path(self.config.dataset))

    @property
    def task_files(self) -> list[str]:
        """The files that fit the recipe's patterns; a pattern that fits none is kept, so that an error can name it."""
        return [path for pattern in self.config.tasks for path in sorted(glob(pattern)) or [pattern]]

    @cached_property
    def tasks(self) -> list[RunTask]:
        """The tasks, checked. All must split time alike, or a test period would be trained on.

        Raises:
          ConfigError: a task is wrong, or has another split.
        """
        tasks = load_tasks(self.task_files, self.dataset)
        for task in tasks[1:]:
            if task.boundaries(self.dataset) != tasks[0].boundaries(self.dataset):
                message = f"not the split of task '{tasks[0].name}'; tasks trained together on a surface share one"
                raise task.error(message, "split")
        return [RunTask(self, task) for task in tasks]

    @property
    def until(self) -> int:
        """The end of the training period, in microseconds since 1970."""
        return self.tasks[0].task.boundaries(self.dataset)[0]

    @property
    def scales_file(self) -> Path:
        """Where the step `prepare` leaves the scales."""
        return self.run.folder / "prepare" / SURFACES / self.name / SCALES

    @cached_property
    def scales(self) -> Scales:
        return Scales.load(self.scales_file)

    @cached_property
    def verbalizer(self) -> Verbalizer:
        prompts = self.run.recipe.prompts
        verbalizer = Verbalizer(self.dataset, self.scales, self.run.tokenizer, prompts.max_tokens, prompts.chat)
        verbalizer.overlong = self.run.overlong.within(self.prefixed(""))
        return verbalizer

    def trained(self) -> Surface:
        """What a model knows of it."""
        return Surface(self.name, self.dataset.card, self.scales, tuple(each.task for each in self.tasks))


class RunTask(NamedTuple):
    """A task of a surface of a run."""

    surface: RunSurface
    task: Task

    @property
    def name(self) -> str:
        """Unique within the run: "apply", or "jobs/apply" where it has several surfaces."""
        return self.surface.prefixed(self.task.name)

    def sample(self, split: Split, max_examples: int | None) -> list[RankingExample]:
        """Examples of a split, at most so many, chosen at random; without questions that are too long to be asked."""
        style = self.surface.run.recipe.prompts.score_style
        examples = sample_examples(self.surface.dataset, self.task, split, max_examples)
        return [*self.surface.verbalizer.all_fitting(self.task, examples, style)]


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe and the folder of its outputs; what several steps need is read once."""

    recipe: Recipe
    folder: Path

    @cached_property
    def surfaces(self) -> dict[str, RunSurface]:
        """The recipe's surfaces by name; that of a recipe with one `dataset` is called as its card is."""
        recipe = self.recipe
        configs = recipe.surfaces
        if recipe.dataset:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", load_card(Path(recipe.dataset)).name).strip("-._") or "dataset"
            configs = {name: RecipeSurface(dataset=recipe.dataset, tasks=recipe.tasks)}
        return {name: RunSurface(self, name, config) for name, config in configs.items()}

    @cached_property
    def tasks(self) -> dict[str, RunTask]:
        """The tasks of all surfaces, by their names within the run, checked."""
        return {each.name: each for surface in self.surfaces.values() for each in surface.tasks}

    @property
    def data_hash(self) -> str:
        """SHA-256 of all datasets."""
        return hash_json({name: surface.tables for name, surface in self.surfaces.items()})

    @property
    def base(self) -> Path | None:
        """The folder of the model that the recipe starts from, whose tokenizer is used; None where it starts from a
        config."""
        return Path(self.recipe.model) if Path(self.recipe.model).is_dir() else None

    @cached_property
    def test_examples(self) -> dict[str, list[RankingExample]]:
        """The test examples that models and baselines score, at most `evaluate.max_examples` of each task, by its
        name."""
        return {name: each.sample("test", self.recipe.evaluate.max_examples) for name, each in self.tasks.items()}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, which its step `prepare` wrote."""
        return Tokenizer.load(self.folder / "prepare" / TOKENIZER)

    def known_tokenizer(self) -> Tokenizer | None:
        """The recipe's tokenizer, before any step has run; None where it is still to be trained."""
        trained = self.recipe.tokenizer
        if trained and not trained.path:
            return None
        return Tokenizer.load(trained.path if trained and trained.path else Path(self.recipe.model) / TOKENIZER)

    @cached_property
    def overlong(self) -> OverlongLog:
        """Counts the texts of all surfaces that did not fit."""
        return OverlongLog()

    def model(self, name: str | None) -> Path:
        """Finds the folder of a model.

        Args:
          name: of the stage that makes it, or a folder itself.

        Returns:
          The folder; that of a stage need not be there yet.

        Raises:
          ConfigError: `name` is None, because no stage comes before.
        """
        if name is None:
            raise ConfigError("there is no model to start from: put this stage after another")
        return self.folder / name / "model" if name in self.recipe.stages else Path(name)

    def calibration(self, bundle: Bundle, count: int) -> list[EncodedPrompt]:
        """Prompts of the training period, as they are scored, to prune by.

        Args:
          bundle: whose tokenizer encodes them.
          count: about how many, of all tasks in equal parts.

        Returns:
          The prompts, encoded.
        """
        style, number = self.recipe.prompts.score_style, -(-count // len(self.tasks))
        return [
            bundle.encode(each.surface.verbalizer.prompt(each.task, example, style))
            for each in self.tasks.values()
            for example in each.sample("train", number)
        ]

    def first_model(self) -> ModelConfig:
        """The recipe's model, with the tokenizer's vocabulary where it names none.

        Returns:
          The config of a new model, or of the one that the recipe starts from.

        Raises:
          ConfigError: its vocabulary is smaller than the tokenizer's.
          ValueError: it reads fewer tokens than a prompt may have.
        """
        config, size = ModelConfig.load(self.base / MODEL if self.base else self.recipe.model), self._vocab_size()
        config.check_length(self.recipe.prompts.max_tokens, "prompts.max_tokens of the recipe")
        if not config.vocab_size:
            return config.model_copy(update={"vocab_size": size})
        if config.vocab_size < size:
            raise config.error(f"{config.vocab_size} is too small for the tokenizer's {size} tokens", "vocab_size")
        return config

    def _vocab_size(self) -> int:
        """The tokenizer's size, or the size in the recipe where it is still to be trained."""
        if (self.folder / "prepare" / TOKENIZER).exists():
            return self.tokenizer.vocab_size
        tokenizer = self.known_tokenizer()
        return tokenizer.vocab_size if tokenizer else self.recipe.tokenizer.vocab_size  # type: ignore[union-attr,return-value]

    def shape(self, name: str) -> ModelConfig:
        """The config of a model; nothing needs to have been run.

        Args:
          name: of the stage that makes it, or of its folder.

        Returns:
          The config.

        Raises:
          ConfigError: a stage before cannot be what its settings say.
        """
        if name not in self.recipe.stages:
            return ModelConfig.load(Path(name) / MODEL)
        stage = self.recipe.stages[name]
        if not stage.init_from:
            return self.first_model()
        start = self.shape(stage.init_from)
        if isinstance(stage, PruneStage):
            return stage.config(self.shape(stage.match_sizes_of) if stage.match_sizes_of else None).target(start)
        return stage.target(start) if isinstance(stage, QuantizeStage) else start

    def bundle(self, model: ModelConfig, params: Params) -> Bundle:
        """A trained model with the tokenizer, prompts and surfaces of this run.

        Args:
          model: the shape of the decoder.
          params: its parameters.

        Returns:
          The bundle; what it was trained on is all data of the run.
        """
        surfaces = {name: self.surfaces[name].trained() for name in sorted(self.surfaces)}
        return Bundle(model, params, self.tokenizer, self.recipe.prompts, surfaces, self.training)

    @cached_property
    def training(self) -> Training:
        """What the models of this run were trained on, with what the model that they start from was."""
        before = Training.of_model(self.base) if self.base else None
        data = [
            TrainedOn(
                dataset=name,
                tables=tables,
                until=surface.until,
                tasks=tuple(each.task.name for each in surface.tasks),
            )
            for surface in self.surfaces.values()
            for name, tables in dataset_names(Path(surface.config.dataset))
        ]
        return Training(data=(*(before.data if before else ()), *data))
