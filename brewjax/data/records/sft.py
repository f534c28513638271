"""Supervised fine-tuning records: training examples rendered as prompts, answered by label words or item names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import pydantic

from brewjax.config import Config, Seed, Words
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.mixture import MixConfig
from brewjax.data.records.provenance import Provenance, example_rng, provenance, training_examples
from brewjax.data.tables.partition import WHOLE, Partition
from brewjax.data.tasks.examples import Choice, RankingExample
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt, encode

Predict = Callable[[Sequence[RankingExample]], Sequence[np.ndarray]]


class SftConfig(Config):
    """The data of supervised fine-tuning."""

    ALIASES: ClassVar = {"passes": "repeats", "choices": "choice_fraction", "candidates": "num_choices"}

    repeats: int = pydantic.Field(default=1, gt=0)
    """How many times every example is rendered, each time in a newly drawn style."""
    max_examples: int | None = pydantic.Field(default=None, gt=0)
    """The most examples of each task and repeat, chosen at random if there are more; by default all."""
    choice_fraction: float = pydantic.Field(default=0.0, ge=0, le=1)
    """The fraction of examples that are rendered once more, with multiple-choice questions answered by an item's name;
    only of tasks with a `choice_question`."""
    num_choices: int = pydantic.Field(default=4, ge=2)
    """The most items to choose from in a multiple-choice question."""
    loss_weights: dict[str, pydantic.PositiveFloat] = {}
    """Loss weight of each target by the name of its task; 1 for a task that is not named."""
    mix: MixConfig = MixConfig()
    """How the tasks share the tokens of a run."""
    soft_labels: Words | None = None
    """Another ranker to learn from, besides the answers: "LightGBM", which the recipe then trains out of fold; or a
    Parquet file with its probabilities, a column for each label word, and the ids of member and item and the time of
    the event under their names in the card (out of fold too: who has seen an answer teaches it as certain)."""
    seed: Seed = 0
    """Seed of the choice of examples, styles and choices."""


def sft_records(
    verbalizer: Verbalizer,
    task: Task,
    prompts: PromptConfig,
    config: SftConfig,
    predict: Predict | None = None,
    partition: Partition = WHOLE,
    name: str = "",
) -> Iterator[tuple[EncodedPrompt, Provenance]]:
    """Makes the records of a task's training period with their provenance, for `write_shard`.

    Each example is rendered in a style, and in a phrasing of the task, that are drawn for it. They are in order of
    the hashes of the members' ids, then of cutoff time, and the seed decides each by itself.

    Args:
      verbalizer: of the dataset.
      task: whose questions are asked and answered.
      prompts: the styles that are drawn from, the most tokens and the layout of the history.
      config: how many examples, how often, and how many of them are multiple choice.
      predict: gives the soft labels of examples, float [candidates, labels] each; None for none.
      partition: only the records of its members.
      name: of the task among those of the run, "jobs/apply" where it has several surfaces; by default its own.

    Yields:
      Each record with its provenance.
    """
    weight = config.loss_weights.get(name or task.name, 1.0)
    examples = training_examples(verbalizer.dataset, task, config, partition, config.repeats)
    for example in verbalizer.with_facts(examples):
        rng = example_rng(example, task)
        if predict:
            example = dataclasses.replace(example, soft_labels=predict([example])[0])
        style = prompts.draw(rng)
        phrased = task.draw_phrasing(rng)
        example = verbalizer.fitting(phrased, example, style)
        rendered = [verbalizer.prompt(phrased, example, style)] if len(example.candidates) else []
        if task.questions.choice_question and rng.random() < config.choice_fraction:
            choices = draw_choices(verbalizer, task, example, config.num_choices, rng)
            choice_prompt = verbalizer.prompt(phrased, example, style, choices=choices) if choices else None
            rendered += [choice_prompt] if choice_prompt and choice_prompt.questions else []
        for prompt in rendered:
            encoded = encode(prompt, verbalizer.tokenizer, prompts.layout)
            if example.soft_labels is not None and prompt is rendered[0]:
                encoded = dataclasses.replace(encoded, soft_labels=list(example.soft_labels))
            yield dataclasses.replace(encoded, weight=weight), provenance(verbalizer, task, example, style)


def draw_choices(
    verbalizer: Verbalizer, task: Task, example: RankingExample, num_choices: int, rng: np.random.Generator
) -> list[Choice]:
    """Draws, for each candidate with the task's best answer, a multiple-choice question with worse candidates.

    The items of a question are in random order, and no two have the same name: the answer would be ambiguous.

    Args:
      num_choices: the most items of a question.
    """
    values = task.values[example.labels]
    names = np.array(verbalizer.names(example.candidates))
    choices = []
    for best in rng.permutation(np.flatnonzero(values == task.values.max())):
        worse = rng.permutation(np.flatnonzero((values < values[best]) & (names != names[best])))
        _, first = np.unique(names[worse], return_index=True)
        chosen = np.append(worse[np.sort(first)][: num_choices - 1], best)
        if len(chosen) > 1:
            order = rng.permutation(chosen)
            choices.append(Choice(example.candidates[order], int(np.flatnonzero(order == best)[0])))
    return choices
