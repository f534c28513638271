"""`Run`: a recipe and the folder of its outputs, with what several of its stages need."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from glob import glob
from pathlib import Path

from brewjax.bundle.bundle import PERCENTILES, TOKENIZER, Bundle, PercentileScale
from brewjax.bundle.training import TrainedOn, Training
from brewjax.config import ConfigError
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.dataset import Dataset, hash_dataset
from brewjax.data.tables.statistics import Percentiles
from brewjax.data.tasks.examples import RankingExample, sample_examples
from brewjax.data.tasks.task import Task, load_tasks
from brewjax.data.text.encode import EncodedPrompt
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL, Params
from brewjax.pipeline.recipe import PruneStage, QuantizeStage, Recipe


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe and the folder of its outputs; what several steps need is read once."""

    recipe: Recipe
    folder: Path

    @cached_property
    def dataset(self) -> Dataset:
        return Dataset.load(self.recipe.dataset)

    @property
    def task_files(self) -> list[str]:
        """The files that fit the recipe's patterns; a pattern that fits none is kept, so that an error can name it."""
        return [path for pattern in self.recipe.tasks for path in sorted(glob(pattern)) or [pattern]]

    @cached_property
    def tasks(self) -> list[Task]:
        """The recipe's tasks, checked. All must split time alike, or a test period would be trained on."""
        tasks = load_tasks(self.task_files, self.dataset)
        for task in tasks[1:]:
            if task.boundaries(self.dataset) != tasks[0].boundaries(self.dataset):
                raise task.error(f"not the split of task '{tasks[0].name}'; tasks trained together share one", "split")
        return tasks

    @property
    def base(self) -> Path | None:
        """The folder of the model that the recipe starts from, if any; its tokenizer is used."""
        return Path(self.recipe.model) if Path(self.recipe.model).is_dir() else None

    @cached_property
    def test_examples(self) -> dict[str, list[RankingExample]]:
        """The test examples that models and baselines score, by task name."""
        max_examples = self.recipe.evaluate.max_examples
        style = self.recipe.prompts.score_style
        return {
            task.name: [
                *self.verbalizer.all_fitting(task, sample_examples(self.dataset, task, "test", max_examples), style)
            ]
            for task in self.tasks
        }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "prepare" / TOKENIZER)

    def known_tokenizer(self) -> Tokenizer | None:
        """The recipe's tokenizer, before any step has run; None where it is still to be trained."""
        trained = self.recipe.tokenizer
        if trained and not trained.path:
            return None
        return Tokenizer.load(trained.path if trained and trained.path else Path(self.recipe.model) / TOKENIZER)

    @cached_property
    def scale(self) -> PercentileScale:
        return PercentileScale.load(self.folder / "prepare" / PERCENTILES)

    @cached_property
    def verbalizer(self) -> Verbalizer:
        prompts, percentiles = self.recipe.prompts, Percentiles(self.scale.quantiles)
        return Verbalizer(self.dataset, percentiles, self.tokenizer, prompts.max_tokens, prompts.chat)

    def model(self, name: str | None) -> Path:
        """Where the stage of that name leaves its model; or a folder that is named itself."""
        if name is None:
            raise ConfigError("there is no model to start from: put this stage after another")
        return self.folder / name / "model" if name in self.recipe.stages else Path(name)

    def calibration(self, bundle: Bundle, count: int) -> list[EncodedPrompt]:
        """About `count` prompts of the training period, as they are scored, of all tasks in equal parts."""
        style, each = self.recipe.prompts.score_style, -(-count // len(self.tasks))
        return [
            bundle.encode(self.verbalizer.prompt(task, example, style))
            for task in self.tasks
            for example in self.verbalizer.all_fitting(task, sample_examples(self.dataset, task, "train", each), style)
        ]

    def first_model(self) -> ModelConfig:
        """The recipe's model, with the tokenizer's vocabulary where it names none."""
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
        """The model that a stage makes, or of a folder; nothing needs to have been run."""
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
        """A trained model with the tokenizer, prompts and tasks of this run."""
        prompts, card, tasks = self.recipe.prompts, self.dataset.card, tuple(self.tasks)
        return Bundle(model, params, self.tokenizer, prompts, self.scale, card, tasks, self.training)

    @cached_property
    def training(self) -> Training:
        """What the models of this run were trained on, with what the model that they start from was."""
        before = Training.of_model(self.base) if self.base else None
        return Training(
            data=(
                *(before.data if before else ()),
                TrainedOn(
                    dataset=self.dataset.card.name,
                    tables=hash_dataset(Path(self.recipe.dataset)),
                    until=self.tasks[0].boundaries(self.dataset)[0],
                    tasks=tuple(task.name for task in self.tasks),
                ),
            )
        )
