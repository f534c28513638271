"""Supervised fine-tuning data: a task's training examples said as prompts, their answers label words or item names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pydantic

from brewjax.config import Config, Seed
from brewjax.console import track
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.mixture import MixConfig
from brewjax.data.records.provenance import Provenance, provenance, task_rng
from brewjax.data.tasks.examples import Choice, RankingExample, sample_examples
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt, encode


class SftConfig(Config):
    """Supervised fine-tuning data.

    Attributes:
      passes: how often every example is said, each time in a style drawn anew.
      choices: the share of the examples that are said once more with questions of which item it is, answered by its
        name; of tasks that say how to ask (`questions.choose`).
      candidates: items to choose from, where there are as many.
    """

    repeats: int = pydantic.Field(default=1, gt=0)
    max_examples: int | None = pydantic.Field(default=None, gt=0)
    """Of each task and pass; a random choice where there are more."""
    choice_fraction: float = pydantic.Field(default=0.0, ge=0, le=1)
    num_choices: int = pydantic.Field(default=4, ge=2)
    loss_weights: dict[str, pydantic.PositiveFloat] = {}
    """Of a task's targets; 1 for a task that is not named."""
    mix: MixConfig = MixConfig()
    """How the tasks share the tokens of a run."""
    seed: Seed = 0


def sft_records(
    verbalizer: Verbalizer, task: Task, prompts: PromptConfig, config: SftConfig
) -> Iterator[tuple[EncodedPrompt, Provenance]]:
    """Records of the training period of one task, for `write_shards`. The same seed gives the same records."""
    rng = task_rng(config.seed, task)
    weight = config.loss_weights.get(task.name, 1.0)
    for number in range(config.repeats):
        examples = sample_examples(verbalizer.dataset, task, "train", config.max_examples, config.seed + number)
        for example in track(examples, f"sft {task.name}"):
            style = prompts.draw(rng)
            example = verbalizer.fitting(task, example, style)
            said = [verbalizer.prompt(task, example, style)] if len(example.candidates) else []
            if task.questions.choice_question and rng.random() < config.choice_fraction:
                choices = draw_choices(verbalizer, task, example, config.num_choices, rng)
                chosen = verbalizer.prompt(task, example, style, choices=choices) if choices else None
                said += [chosen] if chosen and chosen.questions else []
            for prompt in said:
                encoded = encode(prompt, verbalizer.tokenizer, prompts.layout)
                yield dataclasses.replace(encoded, weight=weight), provenance(verbalizer, task, example, style)
    verbalizer.print_overlong()


def draw_choices(
    verbalizer: Verbalizer, task: Task, example: RankingExample, candidates: int, rng: np.random.Generator
) -> list[Choice]:
    """Each item of the example with the task's best answer once, among others with worse ones, in random order.

    No two of them have the same name, or the answer would be in doubt.
    """
    values = task.values[example.labels]
    names = np.array(verbalizer.names(example.candidates))
    choices = []
    for best in rng.permutation(np.flatnonzero(values == task.values.max())):
        worse = rng.permutation(np.flatnonzero((values < values[best]) & (names != names[best])))
        _, first = np.unique(names[worse], return_index=True)
        chosen = np.append(worse[np.sort(first)][: candidates - 1], best)
        if len(chosen) > 1:
            order = rng.permutation(chosen)
            choices.append(Choice(example.candidates[order], int(np.flatnonzero(order == best)[0])))
    return choices
