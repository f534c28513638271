"""`Bundle`: a folder with all that scoring needs: weights, tokenizer, and how prompts were rendered in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float

from brewjax import distributed
from brewjax.bundle.training import TRAINING, Training
from brewjax.config import Config, ConfigError
from brewjax.console import print_line
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset, hash_dataset
from brewjax.data.tables.statistics import FactSource, Percentiles
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt, encode
from brewjax.data.text.prompt import Prompt
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL, Params, load_model, num_parameters, save_model
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.buckets import PACK_TO, choose_buckets
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer

TOKENIZER, PROMPTS, PERCENTILES, TASKS = "tokenizer", "prompts.yaml", "percentiles.yaml", "tasks"
SHORTEST_ROW = 256  # tokens; rows of the bundle's own scorer double from here, so that few shapes are ever compiled


def check_folder(folder: Path) -> None:
    """Checks that a folder is a model's.

    Args:
      folder: to check.

    Raises:
      ConfigError: it is not; with a guess at what was meant.
    """
    if (folder / MODEL).is_file():
        return
    if not folder.exists():
        raise ConfigError(f"{folder}: no such model folder; `brewjax run` and `brewjax import` write model folders")
    if folder.is_file():
        hint = f"; `brewjax import {folder} OUT` makes one of it" if folder.suffix == ".gguf" else ""
        raise ConfigError(f"{folder}: a file; expected a model's folder, which holds {MODEL}{hint}")
    if (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: a Hugging Face folder; `brewjax import {folder} OUT` makes a model folder of it")
    inside = sorted(path.parent for path in [*folder.glob(f"*/{MODEL}"), *folder.glob(f"*/*/{MODEL}")])
    hint = f"did you mean '{inside[0]}'?" if inside else "`brewjax run` and `brewjax import` write model folders"
    raise ConfigError(f"{folder}: no {MODEL} there, so not a model's folder; {hint}")


class PercentileScale(Config):
    """`Percentiles` of the dataset that a model was trained on, and the time before which they were fitted."""

    until: int
    """Microseconds since 1970; the percentiles were fitted to values from before this time."""
    tables: str = ""
    """SHA-256 of the dataset's tables; empty where they were not read from a folder."""
    quantiles: dict[str, list[float]]
    """Quantiles of each attribute that is shown as a percentile, in ascending order, by the attribute's name."""

    @classmethod
    def fit(cls, dataset: Dataset, until: int, tables: str = "") -> PercentileScale:
        """Fits the percentiles of a dataset as of `until`, in microseconds since 1970."""
        return cls(until=until, tables=tables, quantiles=Percentiles.fit(dataset, until).quantiles)

    def fits(self, dataset: Dataset) -> bool:
        """Whether `dataset` has the same attributes and, before `until`, the same values; its name does not matter."""
        refitted = Percentiles.fit(dataset, self.until).quantiles
        return refitted.keys() == self.quantiles.keys() and all(
            len(refitted[name]) == len(scale) and np.allclose(refitted[name], scale, rtol=1e-9, atol=0)
            for name, scale in self.quantiles.items()
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Bundle:
    """A model with all that turns requests into scores.

    `brewjax run` and `brewjax import` write bundles; evaluation, `brewjax score` and serving start from them.

        >>> bundle = Bundle.load(folder)  # such as runs/demo/turbo/model
        >>> questions = (Question("Job: Nurse. Applies? "), Question("Job: Cook. Applies? "))
        >>> prompt = Prompt("Member: a nurse. ", ("Viewed: Nurse. ",), questions, labels=("Yes", "No"))
        >>> bundle.score(prompt).shape  # probabilities [questions, labels]
        (2, 2)

    Attributes:
      model: the shape of the decoder.
      params: its parameters.
      tokenizer: encodes prompts.
      prompts: styles, token budget and layout of prompts in training.
      scale: percentiles of the training dataset; None for an imported model, which has no dataset.
      card: the card of the training dataset; None for an imported model.
      tasks: the tasks that it was trained to answer.
      training: what it was trained on; None where nobody wrote it down.
      mesh: the devices that hold the parameters.
    """

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    prompts: PromptConfig
    scale: PercentileScale | None = None
    card: Card | None = None
    tasks: tuple[Task, ...] = ()
    training: Training | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __repr__(self) -> str:
        tasks = ", ".join(task.name for task in self.tasks) or "none"
        return (
            f"Bundle({self.model.name}: {num_parameters(self.params):,} parameters in {self.model.param_dtype}, "
            f"{self.tokenizer.vocab_size:,} tokens in the vocabulary; tasks: {tasks})"
        )

    def save(self, folder: Path) -> None:
        """Writes the folder, the weights last, so that a folder with weights is complete.

        Args:
          folder: is made if it is not there; every process of a distributed run calls this.
        """
        if distributed.is_process_zero():
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
            if self.training:
                self.training.save(folder / TRAINING)
        save_model(folder, self.model, self.params)

    @classmethod
    def load(cls, folder: str | Path, mesh: MeshConfig | None = None) -> Bundle:
        """Reads a model folder.

        Args:
          folder: as `save`, `brewjax run` or `brewjax import` wrote it.
          mesh: the devices to place the parameters on; by default all devices, split by batch only.

        Returns:
          The bundle, its parameters in the model's `param_dtype`.

        Raises:
          ConfigError: there is no such folder, or a file in it is wrong; names the file, and in it line and key.
          ValueError: the folder has no complete weights.
        """
        folder = Path(folder)
        check_folder(folder)
        mesh = mesh or MeshConfig()
        return cls.from_params(*load_model(folder, mesh.build()), folder, mesh)

    @classmethod
    def from_params(cls, model: ModelConfig, params: Params, folder: Path, mesh: MeshConfig) -> Bundle:
        """Makes a bundle of parameters that are on a mesh already.

        Args:
          model: the shape of the decoder.
          params: its parameters, on `mesh`.
          folder: a model folder, from which tokenizer, prompts, percentiles, card and tasks are read.
          mesh: the devices that the parameters are on.

        Returns:
          The bundle.
        """
        return cls(
            model,
            params,
            Tokenizer.load(folder / TOKENIZER),
            PromptConfig.load(folder / PROMPTS),
            PercentileScale.load(folder / PERCENTILES) if (folder / PERCENTILES).exists() else None,
            Card.load(folder / CARD) if (folder / CARD).exists() else None,
            tuple(Task.load(path) for path in sorted((folder / TASKS).glob("*.yaml"))),
            Training.of_model(folder),
            mesh,
        )

    def verbalizer(self, dataset: Dataset, task: Task) -> Verbalizer:
        """Makes a verbalizer that renders examples of a dataset as in training.

        Args:
          dataset: the tables. On one other than that of training, percentiles are fitted to it, before `task`'s
            validation period.
          task: whose label words the tokenizer must have as single tokens.

        Returns:
          The verbalizer, with this model's tokenizer and prompt budget.

        Raises:
          ConfigError: a label word is not one token.
        """
        task.check_words(self.tokenizer)
        return self._verbalizer(dataset, self._percentiles(dataset, task))

    def _percentiles(self, dataset: Dataset, task: Task) -> Percentiles:
        """See `verbalizer`. Of an excerpt of other tables than those of training, the tables are read whole."""
        is_known = self.scale and dataset.summary and self.scale.tables == hash_dataset(dataset.path)
        whole = dataset if is_known or dataset.summary is None else Dataset.load(dataset.path)
        if self.scale and (is_known or self.scale.fits(whole)):
            return Percentiles(self.scale.quantiles)
        percentiles = Percentiles.fit(whole, task.boundaries(whole)[0])
        if self.scale and percentiles.quantiles:
            line = f"{dataset.path}: not the dataset that the model was trained on; percentiles are fitted to this one"
            print_line(line, stderr=True)
        return percentiles

    def request_verbalizer(self, dataset: Dataset, facts: FactSource | None = None) -> Verbalizer:
        """Makes a verbalizer for a request, with the percentiles of training.

        Args:
          dataset: the request's tables, which follow the model's card.
          facts: those that the request brings; by default they are computed from the dataset's events.

        Returns:
          The verbalizer.
        """
        return self._verbalizer(dataset, Percentiles(self.scale.quantiles if self.scale else {}), facts)

    def _verbalizer(self, dataset: Dataset, percentiles: Percentiles, facts: FactSource | None = None) -> Verbalizer:
        prompts = self.prompts
        return Verbalizer(dataset, percentiles, self.tokenizer, prompts.max_tokens, prompts.chat, facts)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Tokenizes a prompt in the layout of training.

        Args:
          prompt: to be scored.

        Returns:
          The tokens of each of its pieces.

        Raises:
          ValueError: a label word is not one token, a question is empty, or the prefix with a question is longer than
            the model reads.
        """
        encoded = encode(prompt, self.tokenizer, self.prompts.layout)
        self.model.check_length(encoded.context, "a prompt with one question")
        return encoded

    def score(self, prompt: Prompt) -> Float[np.ndarray, "Q L"]:
        """Scores the questions of one prompt.

        The first prompt of a length compiles; later ones of about this length use the same program.

        Args:
          prompt: with one question or more.

        Returns:
          The probability of each label for each question, float32 [questions, labels]; a row sums to 1.

        Raises:
          ValueError: as `encode`.
        """
        return self._scorer_for([self.encode(prompt)]).score(prompt)

    def score_encoded(self, prompts: Sequence[EncodedPrompt]) -> list[Float[np.ndarray, "Q L"]]:
        """Scores many prompts in one call, packed together.

        Args:
          prompts: as `encode` returns them.

        Returns:
          For each prompt, as `score`.
        """
        return self._scorer_for(prompts).score_encoded(prompts)

    def scorer(self, prompts: Sequence[EncodedPrompt]) -> Scorer:
        """Makes a scorer whose compiled shapes are chosen for the lengths of these prompts, for when all are known.

        Args:
          prompts: those that will be scored.

        Returns:
          The scorer; it compiles a shape when it first uses it.
        """
        return self.make_scorer(choose_buckets([len(prompt) for prompt in prompts]))

    def make_scorer(self, buckets: Sequence[Bucket]) -> Scorer:
        """Makes a scorer of given compiled shapes.

        Args:
          buckets: the shapes.

        Returns:
          The scorer; it compiles a shape when it first uses it.
        """
        return Scorer(self.model, self.params, self.tokenizer, self.prompts.layout, buckets, self.mesh.build())

    @cached_property
    def _own_scorer(self) -> Scorer:
        return self.make_scorer([Bucket(SHORTEST_ROW)])

    def _scorer_for(self, prompts: Sequence[EncodedPrompt]) -> Scorer:
        """The scorer that the bundle keeps, with rows in which these prompts fit; a shape that no prompt needs is never
        compiled."""
        longest, tokens = self._own_scorer.buckets[-1].tokens, max([PACK_TO, *(prompt.context for prompt in prompts)])
        while longest < tokens:
            longest *= 2
            self._own_scorer.buckets += (Bucket(longest),)
        return self._own_scorer
