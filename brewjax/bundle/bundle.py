"""A model as a folder that scores: weights, tokenizer, and how prompts were said when it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from brewjax import distributed as hosts
from brewjax.config import Config, ConfigError
from brewjax.console import plain_console
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import Percentiles
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt, encode
from brewjax.data.text.prompt import Prompt
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL, Params, load_model, save_model
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.buckets import choose_buckets
from brewjax.scoring.scorer import Scorer

TOKENIZER, PROMPTS, PERCENTILES, TASKS = "tokenizer", "prompts.yaml", "percentiles.yaml", "tasks"


def check_folder(folder: Path) -> None:
    """Raises ConfigError where `folder` is not a model's, with what it may be instead."""
    if (folder / MODEL).is_file():
        return
    if not folder.exists():
        raise ConfigError(f"{folder}: no such model folder; `brewjax run` and `brewjax import` leave some")
    if folder.is_file():
        hint = f"; `brewjax import {folder} OUT` makes one of it" if folder.suffix == ".gguf" else ""
        raise ConfigError(f"{folder}: a file; expected a model's folder, which holds {MODEL}{hint}")
    if (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: a Hugging Face folder; `brewjax import {folder} OUT` makes a model folder of it")
    inside = sorted(path.parent for path in [*folder.glob(f"*/{MODEL}"), *folder.glob(f"*/*/{MODEL}")])
    hint = f"did you mean '{inside[0]}'?" if inside else "`brewjax run` and `brewjax import` leave some"
    raise ConfigError(f"{folder}: no {MODEL} there, so not a model's folder; {hint}")


class PercentileScale(Config):
    """`Percentiles`, and until when they were fitted on the dataset that a model was trained on."""

    until: int
    """Microseconds since 1970; only what happened before it counted."""
    quantiles: dict[str, list[float]]

    @classmethod
    def fit(cls, dataset: Dataset, until: int) -> PercentileScale:
        """Those of a dataset as of `until`."""
        return cls(until=until, quantiles=Percentiles.fit(dataset, until).quantiles)

    def fits(self, dataset: Dataset) -> bool:
        """Whether these are the percentiles of `dataset`: it has the same attributes, and until then the same values,
        whatever it is called and whatever came later."""
        own = Percentiles.fit(dataset, self.until).quantiles
        return own.keys() == self.quantiles.keys() and all(
            len(own[name]) == len(scale) and np.allclose(own[name], scale, rtol=1e-9, atol=0)
            for name, scale in self.quantiles.items()
        )


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What `brewjax run` and `brewjax import` leave, and what evaluation, `brewjax score` and serving start from.

    Attributes:
      scale, card, tasks: of the dataset it was trained on, and what it was trained to answer; an imported model was
        trained on none.
      mesh: where the parameters lie.
    """

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    prompts: PromptConfig
    scale: PercentileScale | None = None
    card: Card | None = None
    tasks: tuple[Task, ...] = ()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def save(self, folder: Path) -> None:
        """Writes the folder; weights last, so that a folder with weights is complete."""
        if hosts.is_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(folder / TOKENIZER)
            self.prompts.save(folder / PROMPTS)
            if self.scale:
                self.scale.save(folder / PERCENTILES)
            if self.card:
                self.card.save(folder / CARD)
            (folder / TASKS).mkdir(exist_ok=True)
            for task in self.tasks:
                task.save(folder / TASKS / f"{task.name}.yaml")
        save_model(folder, self.model, self.params)

    @classmethod
    def load(cls, folder: Path, mesh: MeshConfig | None = None) -> Bundle:
        """Reads a folder; ValueError names what is missing."""
        check_folder(folder)
        mesh = mesh or MeshConfig()
        return cls.from_params(*load_model(folder, mesh.build()), folder, mesh)

    @classmethod
    def from_params(cls, model: ModelConfig, params: Params, folder: Path, mesh: MeshConfig) -> Bundle:
        """A model, on a mesh, with all that a bundle's folder holds beside its weights."""
        return cls(
            model,
            params,
            Tokenizer.load(folder / TOKENIZER),
            PromptConfig.load(folder / PROMPTS),
            PercentileScale.load(folder / PERCENTILES) if (folder / PERCENTILES).exists() else None,
            Card.load(folder / CARD) if (folder / CARD).exists() else None,
            tuple(Task.load(path) for path in sorted((folder / TASKS).glob("*.yaml"))),
            mesh,
        )

    def verbalizer(self, dataset: Dataset, task: Task) -> Verbalizer:
        """Says examples as in training; on a dataset other than that, percentiles are fitted before `task`'s split."""
        task.check_words(self.tokenizer)
        if self.scale and self.scale.fits(dataset):
            return self.request_verbalizer(dataset)
        percentiles = Percentiles.fit(dataset, task.boundaries(dataset)[0])
        if self.scale and percentiles.quantiles:
            line = f"{dataset.path}: not the data that the model was trained on; percentiles are fitted to it"
            plain_console(stderr=True).print(line, soft_wrap=True)
        return self._verbalizer(dataset, percentiles)

    def request_verbalizer(self, dataset: Dataset) -> Verbalizer:
        """Says examples of a request, which has what the model's own card says, on the scale of training."""
        return self._verbalizer(dataset, Percentiles(self.scale.quantiles if self.scale else {}))

    def _verbalizer(self, dataset: Dataset, percentiles: Percentiles) -> Verbalizer:
        return Verbalizer(dataset, percentiles, self.tokenizer, self.prompts.max_tokens, self.prompts.chat)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Tokens of a prompt as the model was trained to see them; ValueError where they are more than it reads."""
        encoded = encode(prompt, self.tokenizer, self.prompts.layout)
        self.model.check_length(encoded.context, "a prompt with one question")
        return encoded

    def score(self, prompt: Prompt) -> Float[np.ndarray, "Q L"]:
        """Probability of each label for each question of one prompt, by a scorer made for it."""
        return self.scorer([self.encode(prompt)]).score(prompt)

    def scorer(self, prompts: Sequence[EncodedPrompt]) -> Scorer:
        """A scorer with shapes chosen for prompts like these."""
        buckets = choose_buckets([len(prompt) for prompt in prompts])
        return Scorer(self.model, self.params, self.tokenizer, self.prompts.layout, buckets, self.mesh.build())
