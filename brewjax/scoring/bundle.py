"""A model as a folder that scores: weights, tokenizer, and how prompts were said when it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydantic
from jaxtyping import Float

from brewjax import hosts
from brewjax.config import Config
from brewjax.data.dataset import CARD, Card, Dataset
from brewjax.data.numbers import Percentiles
from brewjax.data.prompt import Prompt
from brewjax.data.task import Task
from brewjax.data.tokenizer import Tokenizer
from brewjax.data.tokens import EncodedPrompt, HistoryLayout, encode
from brewjax.data.verbalize import STYLES, Verbalizer
from brewjax.model.config import ModelConfig
from brewjax.model.params import Params, load_model, save_model
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.buckets import choose_buckets
from brewjax.scoring.scorer import Scorer

TOKENIZER, PROMPTS, PERCENTILES, TASKS = "tokenizer", "prompts.yaml", "percentiles.yaml", "tasks"


class PromptConfig(Config):
    """How prompts are said and cut.

    Attributes:
      styles: the styles that training draws from, with their weights.
      score_style: the one that evaluation and serving use.
      max_tokens: budget for the center, the history and one question; the oldest events go first. Training packs the
        questions into what is left of a row: half a row or less lets many questions share a history.
      layout: dense, or star: events do not see each other.
    """

    styles: dict[str, float] = {"compact": 1.0}
    score_style: str = "compact"
    max_tokens: int = pydantic.Field(default=1024, gt=0)
    layout: HistoryLayout = "dense"

    @pydantic.model_validator(mode="after")
    def _known_styles(self) -> PromptConfig:
        for style in [*self.styles, self.score_style]:
            if style not in STYLES:
                raise ValueError(f"no style '{style}'; styles: {', '.join(STYLES)}")
        if not self.styles or min(self.styles.values()) <= 0:
            raise ValueError("styles: give at least one style, each with a weight above 0")
        return self


class PercentileScale(Config):
    """`Percentiles` and the dataset they were fitted on."""

    dataset: str
    quantiles: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What `brewjax run` and `brewjax import` leave, and what evaluation, `brewjax score` and serving start from.

    Attributes:
      scale, card, tasks: of the dataset it was trained on, and what it was trained to answer; an imported model was
        trained on none.
    """

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    prompts: PromptConfig
    scale: PercentileScale | None = None
    card: Card | None = None
    tasks: tuple[Task, ...] = ()

    def save(self, folder: Path) -> None:
        """Writes the folder; weights last, so that a folder with weights is complete."""
        if hosts.is_first():
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
        return cls.around(*load_model(folder, (mesh or MeshConfig()).build()), folder)

    @classmethod
    def around(cls, model: ModelConfig, params: Params, folder: Path) -> Bundle:
        """A model with all that a bundle's folder holds beside its weights."""
        return cls(
            model,
            params,
            Tokenizer.load(folder / TOKENIZER),
            PromptConfig.load(folder / PROMPTS),
            PercentileScale.load(folder / PERCENTILES) if (folder / PERCENTILES).exists() else None,
            Card.load(folder / CARD) if (folder / CARD).exists() else None,
            tuple(Task.load(path) for path in sorted((folder / TASKS).glob("*.yaml"))),
        )

    def verbalizer(self, dataset: Dataset, task: Task) -> Verbalizer:
        """Says examples as in training; on a dataset other than that, percentiles are fitted before `task`'s split."""
        task.check_words(self.tokenizer)
        if self.scale and dataset.card.name == self.scale.dataset:
            percentiles = Percentiles(self.scale.quantiles)
        else:
            percentiles = Percentiles.fit(dataset, task.boundaries(dataset)[0])
        return Verbalizer(dataset, percentiles, self.tokenizer, self.prompts.max_tokens)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Tokens of a prompt as the model was trained to see them; ValueError where they are more than it reads."""
        encoded = encode(prompt, self.tokenizer, self.prompts.layout)
        self.model.check_context(encoded.context, "a prompt with one question")
        return encoded

    def score(self, prompt: Prompt) -> Float[np.ndarray, "Q L"]:
        """Probability of each label for each question of one prompt, by a scorer made for it."""
        return self.scorer([self.encode(prompt)]).score(prompt)

    def scorer(self, prompts: Sequence[EncodedPrompt]) -> Scorer:
        """A scorer with shapes chosen for prompts like these."""
        buckets = choose_buckets([len(prompt) for prompt in prompts])
        return Scorer(self.model, self.params, self.tokenizer, self.prompts.layout, buckets)
