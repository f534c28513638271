"""Preference records: lists of one chosen item among rejected ones, from members' actions or from steering notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import pydantic

from brewjax.config import Config, Seed
from brewjax.data.prompts.attributes import is_unknown
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.provenance import Provenance, example_rng, provenance, training_examples
from brewjax.data.tables.card import Attribute
from brewjax.data.tables.partition import WHOLE, Partition
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt, encode


class AlignConfig(Config):
    """The data of preference training: lists of one chosen item, which should rank above the rejected ones."""

    ALIASES: ClassVar = {"size": "list_size", "lists": "lists_per_example", "notes": "steering_fraction"}

    tasks: tuple[str, ...] = ()
    """Names of the tasks whose best answer should rank high; by default all tasks of the run."""
    list_size: int = pydantic.Field(default=8, ge=2)
    """The most items of a list, the chosen one included; 2 makes pairs."""
    lists_per_example: int = pydantic.Field(default=2, gt=0)
    """The most lists of an example. They share its history, each with copies of its questions."""
    steering_fraction: float = pydantic.Field(default=0.25, ge=0, le=1)
    """The fraction of examples that teach to follow a steering note, instead of what the member did."""
    max_examples: int | None = pydantic.Field(default=None, gt=0)
    """The most examples of each task, chosen at random if there are more; by default all."""
    seed: Seed = 0
    """Seed of the choice of examples, styles, lists and notes."""


class Contrast(NamedTuple):
    """Two steering notes that ask for opposite rankings.

    Attributes:
      steering_note: ranks every item of `higher` above every item of `lower`.
      opposite_note: ranks every item of `lower` above every item of `higher`.
      higher: int [items], indices into an example's candidates.
      lower: int [items], likewise.
    """

    steering_note: str
    opposite_note: str
    higher: np.ndarray
    lower: np.ndarray


def align_records(
    verbalizer: Verbalizer, task: Task, prompts: PromptConfig, config: AlignConfig, partition: Partition = WHOLE
) -> Iterator[tuple[EncodedPrompt, Provenance]]:
    """Makes the records of a task's training period with their provenance, for `write_shard`.

    Every candidate is a question answered by the label word of the task's best label, "Yes": a list compares
    log P("Yes" | question) of its items (S-DPO, arXiv 2406.09215, on label words).

    From members' actions: the chosen item has the task's best answer, and the rejected ones have worse answers, shown
    or sampled (`questions.sampled_negatives`). From steering notes: all items of a list have the same answer, so only
    the note can rank them; each example is rendered with a note and with the opposite note, which swaps chosen and
    rejected items. A note says what should rank high, so use tasks whose best answer should: `liked`, not `disliked`.

    They are in order of the hashes of the members' ids, then of cutoff time, and the seed decides each by itself.

    Args:
      verbalizer: of the dataset.
      task: whose label words answer.
      prompts: the styles that are drawn from, and the most tokens.
      config: how many lists of how many items an example gives, and how often under a note.
      partition: only the records of its members.

    Yields:
      Each record with its provenance; of a record under a note, with the note too.
    """
    for example in training_examples(verbalizer.dataset, task, config, partition):
        rng = example_rng(example, task)
        style, phrased = prompts.draw(rng), task.draw_phrasing(rng)
        example = verbalizer.fitting(phrased, example, style)
        contrast = draw_contrast(verbalizer, task, example, rng) if rng.random() < config.steering_fraction else None
        if contrast:
            for note, best, worse in (
                (contrast.steering_note, contrast.higher, contrast.lower),
                (contrast.opposite_note, contrast.lower, contrast.higher),
            ):
                lists = [
                    _draw_list(chosen, worse, config.list_size, rng)
                    for chosen in rng.permutation(best)[: config.lists_per_example]
                ]
                encoded = _encode_lists(verbalizer, phrased, prompts, example, style, lists, note)
                yield encoded, provenance(verbalizer, task, example, style) | {"steering_note": note}
        elif lists := _draw_lists(task, example, config, rng):
            encoded = _encode_lists(verbalizer, phrased, prompts, example, style, lists)
            yield encoded, provenance(verbalizer, task, example, style)


def _draw_lists(task: Task, example: RankingExample, config: AlignConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Lists from the member's actions, as indices into the example's candidates, the chosen one first."""
    values = task.values[example.labels]
    best = rng.permutation(np.flatnonzero(values == task.values.max()))
    worse = np.flatnonzero(values < task.values.max())
    return (
        [_draw_list(chosen, worse, config.list_size, rng) for chosen in best[: config.lists_per_example]]
        if len(worse)
        else []
    )


def _draw_list(chosen: int, worse: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    return np.append(chosen, rng.permutation(worse)[: size - 1])


def _encode_lists(
    verbalizer: Verbalizer,
    task: Task,
    prompts: PromptConfig,
    example: RankingExample,
    style: str,
    lists: list[np.ndarray],
    note: str = "",
) -> EncodedPrompt:
    """Encodes one prompt with a question for every item of every list."""
    example = example.select(np.concatenate(lists))
    labels = np.full(len(example.candidates), np.argmax(task.values), np.int32)
    example = dataclasses.replace(example, labels=labels)
    encoded = encode(verbalizer.prompt(task, example, style, note), verbalizer.tokenizer, prompts.layout)
    preference_lists = [
        list_number if index == 0 else -list_number
        for list_number, items in enumerate(lists, 1)
        for index in range(len(items))
    ]
    return dataclasses.replace(encoded, preference_lists=preference_lists, answer_offsets=[])


def draw_contrast(
    verbalizer: Verbalizer, task: Task, example: RankingExample, rng: np.random.Generator
) -> Contrast | None:
    """Draws two opposite notes about an attribute, and the candidates that they rank, all with the same answer.

    Returns:
      None if no attribute of the questions differs among candidates with the same answer.
    """
    plural = task.side_of(verbalizer.dataset.card).items.plural
    for label in rng.permutation(np.unique(example.labels)):
        indices = np.flatnonzero(example.labels == label)
        stated = verbalizer.question_values(example.candidates[indices], example.cutoff_time)
        stated = [(attribute, values) for attribute, values in stated if attribute.kind in CONTRASTS]
        for attribute_index in rng.permutation(len(stated)):
            attribute, values = stated[attribute_index]
            known = np.array([not is_unknown(value) for value in values], bool)
            contrast = CONTRASTS[attribute.kind](
                verbalizer, plural, attribute, indices[known], [v for v, k in zip(values, known, strict=True) if k], rng
            )
            if contrast:
                return contrast
    return None


def _contrast_values(
    verbalizer: Verbalizer,
    plural: str,
    attribute: Attribute,
    indices: np.ndarray,
    values: list,
    rng: np.random.Generator,
) -> Contrast | None:
    """Contrasts items with a first value and without a second against items with the second and without the first."""
    clean = verbalizer.tokenizer.clean
    item_values = [{clean(str(v)) for v in (value if attribute.kind == "list" else [value])} - {""} for value in values]
    relation = "include" if attribute.kind == "list" else "is"
    note = lambda value: (  # noqa: E731
        f"focus on {plural} whose {attribute.name} {relation} {value}"
    )
    pairs = [
        (a, b)
        for a in range(len(item_values))
        for b in range(a)
        if item_values[a] - item_values[b] and item_values[b] - item_values[a]
    ]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    first, second = (str(rng.choice(sorted(item_values[x] - item_values[y]))) for x, y in ((a, b), (b, a)))
    only_first = np.array([first in item and second not in item for item in item_values])
    only_second = np.array([second in item and first not in item for item in item_values])
    return Contrast(note(first), note(second), indices[only_first], indices[only_second])


def _contrast_order(
    verbalizer: Verbalizer,
    plural: str,
    attribute: Attribute,
    indices: np.ndarray,
    values: list,
    rng: np.random.Generator,
) -> Contrast | None:
    """Contrasts the items in the highest third of a number or date with those in the lowest third."""
    numbers = np.array(values, np.float64)
    low, high = np.quantile(numbers, [1 / 3, 2 / 3]) if values else (0, 0)
    if low >= high:
        return None
    more, less = ("recent", "long ago") if attribute.kind == "date" else ("high", "low")
    note = f"prefer {plural} whose {attribute.name} is"
    return Contrast(f"{note} {more}", f"{note} {less}", indices[numbers >= high], indices[numbers <= low])


CONTRASTS: dict[str, Callable[..., Contrast | None]] = {
    "category": _contrast_values,
    "list": _contrast_values,
    "number": _contrast_order,
    "date": _contrast_order,
}
