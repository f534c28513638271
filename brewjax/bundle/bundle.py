"""`Bundle`: a folder with all that scoring needs: weights, tokenizer, and how prompts were rendered in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float

from brewjax import distributed
from brewjax.bundle.surface import SURFACES, Surface
from brewjax.bundle.training import TRAINING, Training
from brewjax.config import ConfigError
from brewjax.console import print_line
from brewjax.data.prompts.attributes import stated_kinds
from brewjax.data.prompts.styles import STYLES, PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset, hash_dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.statistics import FactSource
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

TOKENIZER, PROMPTS = "tokenizer", "prompts.yaml"
SHORTEST_ROW = 256  # tokens; rows of the bundle's own scorer double from here, so that few shapes are ever compiled


def check_folder(folder: Path) -> None:
    """Checks that a folder is a model's.

    Args:
      folder: to check.

    Raises:
      ConfigError: it is not; with a guess at what was meant.
    """
    if (folder / CARD).is_file():
        raise ConfigError(f"{folder}: written by an earlier brewjax, with {CARD} outside of {SURFACES}; train it anew")
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
      surfaces: what it was trained on, by name: the card, scales and tasks of each; none of an imported model.
      training: what it was trained on; None where nobody wrote it down.
      mesh: the devices that hold the parameters.
    """

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    prompts: PromptConfig
    surfaces: Mapping[str, Surface] = dataclasses.field(default_factory=dict)
    training: Training | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __repr__(self) -> str:
        tasks = ", ".join(self.task_names) or "none"
        return (
            f"Bundle({self.model.name}: {num_parameters(self.params):,} parameters in {self.model.param_dtype}, "
            f"{self.tokenizer.vocab_size:,} tokens in the vocabulary; tasks: {tasks})"
        )

    @property
    def task_names(self) -> list[str]:
        """The tasks that it was trained to answer: "apply", or "jobs/apply" where it has several surfaces."""
        several = len(self.surfaces) > 1
        return [
            f"{surface.name}/{task.name}" if several else task.name
            for surface in self.surfaces.values()
            for task in surface.tasks
        ]

    def save(self, folder: Path) -> None:
        """Writes the folder, the weights last, so that a folder with weights is complete.

        Args:
          folder: is made if it is not there; every process of a distributed run calls this.
        """
        if distributed.is_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(folder / TOKENIZER)
            self.prompts.save(folder / PROMPTS)
            for surface in self.surfaces.values():
                surface.save(folder / SURFACES / surface.name)
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
          folder: a model folder, from which tokenizer, prompts, scales, card and tasks are read.
          mesh: the devices that the parameters are on.

        Returns:
          The bundle.
        """
        return cls(
            model,
            params,
            Tokenizer.load(folder / TOKENIZER),
            PromptConfig.load(folder / PROMPTS),
            {path.name: Surface.load(path) for path in sorted((folder / SURFACES).glob("*"))},
            Training.of_model(folder),
            mesh,
        )

    def surface(self, name: str = "") -> Surface:
        """Finds a surface by its name; the only one where none is named.

        Args:
          name: of the surface.

        Returns:
          The surface.

        Raises:
          ConfigError: there is none of this name, or several and none is named.
        """
        if not self.surfaces:
            raise ConfigError("this model was imported: it has no surface, and so no dataset's card and no tasks")
        if not name and len(self.surfaces) == 1:
            return next(iter(self.surfaces.values()))
        if name not in self.surfaces:
            known = ", ".join(self.surfaces)
            raise ConfigError(f"no surface '{name}'; there are: {known}" if name else f"name a surface, one of {known}")
        return self.surfaces[name]

    def surface_of(self, dataset: Dataset, name: str = "") -> Surface | None:
        """Finds the surface that a dataset is of.

        Args:
          dataset: the tables.
          name: of the surface; without it, it is the one with the dataset's card, else the only one.

        Returns:
          The surface; None for a dataset that the model has never seen.

        Raises:
          ConfigError: there is none of this name; or several have a card of the dataset's name, and none is named.
        """
        if name or len(self.surfaces) == 1:
            return self.surface(name)
        fitting = self._surfaces_of_card(dataset)
        if len(fitting) > 1:
            names = ", ".join(surface.name for surface in fitting)
            message = f"{dataset.path}: several surfaces of the model have a card '{dataset.card.name}'"
            raise ConfigError(f"{message}: name one of {names}")
        return fitting[0] if fitting else None

    def _surfaces_of_card(self, dataset: Dataset) -> list[Surface]:
        return [surface for surface in self.surfaces.values() if surface.card.name == dataset.card.name]

    def verbalizer(
        self, dataset: Dataset, task: Task, surface: str = "", scales_of: Dataset | None = None
    ) -> Verbalizer:
        """Makes a verbalizer that renders examples of a dataset as in training.

        Args:
          dataset: the tables.
          task: whose label words the tokenizer must have as single tokens.
          surface: the name of the one whose scales are used, whatever the dataset; by default they are those of
            the dataset in training, and on a dataset that was not trained on they are fitted to it, before `task`'s
            validation split.
          scales_of: the tables that scales are chosen for or fitted to, silently; by default `dataset`, and a line
            says where they are not those of training. Of tables that events were taken out of, what is left would have
            others.

        Returns:
          The verbalizer, with this model's tokenizer and prompt budget.

        Raises:
          ConfigError: a label word is not one token; there is no such surface, or it has another card.
        """
        task.check_words(self.tokenizer)
        if not surface:
            return self._verbalizer_of_tables(dataset, task, scales_of)
        known = self.surface(surface)
        if missing := Scales.keys_of(dataset) - known.scales.fitted_keys:
            message = f"{dataset.path}: surface '{surface}' of the model has no scales of {min(missing)}"
            raise ConfigError(f"{message}, which the dataset's card has; leave the surface out, or name another")
        return self.request_verbalizer(known, dataset)

    def _verbalizer_of_tables(self, dataset: Dataset, task: Task, scales_of: Dataset | None) -> Verbalizer:
        """With the scales of the surface whose training had the very tables of `scales_of`, or those that they were
        until its training ended; with scales of its own for a dataset that was not trained on. Of an excerpt of
        tables that are not training's to the byte, the tables are read whole."""
        tables = scales_of or dataset
        likely = self._surfaces_of_card(tables) or self.surfaces.values()
        if tables.summary:
            digest = hash_dataset(tables.path)
            for surface in likely:
                if surface.scales.tables == digest:
                    return self.request_verbalizer(surface, dataset)
        whole = tables if tables.summary is None else Dataset.load(tables.path)
        for surface in likely:
            if surface.scales.fits(whole):
                return self.request_verbalizer(surface, dataset)
        fitted = Scales.fit(whole, task.boundaries(whole)[0])
        # A token of an id means nothing in tables that the model was not trained on.
        unknown: dict[str, list[str]] = {key: [] for key in fitted.vocabularies}
        scales = Scales(until=fitted.until, quantiles=fitted.quantiles, vocabularies=unknown)
        if self.surfaces and scales.fitted_keys and scales_of is None:
            line = f"{whole.path}: not the dataset that the model was trained on; scales are fitted to this one"
            print_line(line, stderr=True)
        return self._verbalizer(dataset, scales)

    def request_verbalizer(self, surface: Surface, dataset: Dataset, facts: FactSource | None = None) -> Verbalizer:
        """Makes a verbalizer for a request, with the scales of training and the surface's temperatures.

        Args:
          surface: one of the model's.
          dataset: the request's tables, which follow the surface's card.
          facts: those that the request brings; by default they are computed from the dataset's events.

        Returns:
          The verbalizer.
        """
        return self._verbalizer(dataset, surface.scales, facts, surface.temperatures)

    def _verbalizer(
        self,
        dataset: Dataset,
        scales: Scales,
        facts: FactSource | None = None,
        temperatures: Mapping[str, float] | None = None,
    ) -> Verbalizer:
        prompts, budget = self.prompts, self.prompts.max_tokens
        return Verbalizer(dataset, scales, self.tokenizer, budget, prompts.chat, facts, temperatures, self._kinds)

    @cached_property
    def _kinds(self) -> set[str] | None:
        """The kinds of numbers that training stated, if any: the tokens of others have learnt nothing."""
        if not any(STYLES[name].by_kind for name in self.prompts.styles):
            return None
        return set().union(*(stated_kinds(surface.card) for surface in self.surfaces.values())) or None

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
