"""Alignment data: lists of one preferred item among others, from what members did, and to teach a developer's note."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pydantic

from brewjax.config import Config, Seed
from brewjax.console import track
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer, is_unknown
from brewjax.data.records.provenance import Provenance, provenance, task_rng
from brewjax.data.tables.card import Attribute
from brewjax.data.tasks.examples import RankingExample, sample_examples
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt, encode


class AlignConfig(Config):
    """Lists of one preferred item among others that it should be ranked above.

    Attributes:
      size: items of a list, where there are as many; 2: pairs.
      lists: of an example, at most. They share its history, each with its own copies of the questions.
      notes: the share of the examples that teach to follow a developer's note, in place of what the member did.
    """

    tasks: tuple[str, ...] = ()
    """By name, those whose best answer is what should rank high; none: all."""
    list_size: int = pydantic.Field(default=8, ge=2)
    lists_per_example: int = pydantic.Field(default=2, gt=0)
    steering_fraction: float = pydantic.Field(default=0.25, ge=0, le=1)
    max_examples: int | None = pydantic.Field(default=None, gt=0)
    """Of each task; a random choice where there are more."""
    seed: Seed = 0


class Contrast(NamedTuple):
    """Two notes that want the opposite: the first puts every item of `one` above every item of `other`, the second
    the other way round. Items are places in an example's questions."""

    steering_note: str
    opposite_note: str
    higher: np.ndarray
    lower: np.ndarray


def align_records(
    verbalizer: Verbalizer, task: Task, prompts: PromptConfig, config: AlignConfig
) -> Iterator[tuple[EncodedPrompt, Provenance]]:
    """Records of the training period of one task, for `write_shards`. The same seed gives the same records.

    A candidate is a question that is answered with the word of the task's best label, "Yes": log P("Yes" | question)
    is what a list compares (S-DPO, arXiv 2406.09215, on label words). From what members did: the preferred item has
    the task's best answer, the others have worse ones, as shown or as sampled (`questions.sampled_negatives`). From
    notes: all items of a list have the same answer, so nothing but the note can rank them; each example is said with a
    note and with its opposite, under which what was preferred is rejected. A note says what should rank high: give it
    tasks whose best answer is what one wants to rank high, `liked` and not `disliked`.
    """
    rng = task_rng(config.seed, task)
    for example in track(
        sample_examples(verbalizer.dataset, task, "train", config.max_examples, config.seed),
        f"align {task.name}",
    ):
        style = prompts.draw(rng)
        example = verbalizer.fitting(task, example, style)
        contrast = draw_contrast(verbalizer, task, example, rng) if rng.random() < config.steering_fraction else None
        if contrast:
            for note, best, worse in (
                (contrast.steering_note, contrast.higher, contrast.lower),
                (contrast.opposite_note, contrast.lower, contrast.higher),
            ):
                lists = [
                    _draw_list(one, worse, config.list_size, rng)
                    for one in rng.permutation(best)[: config.lists_per_example]
                ]
                said = _say(verbalizer, task, prompts, example, style, lists, note)
                yield said, provenance(verbalizer, task, example, style) | {"steering_note": note}
        elif lists := _draw_lists(task, example, config, rng):
            yield _say(verbalizer, task, prompts, example, style, lists), provenance(verbalizer, task, example, style)
    verbalizer.print_overlong()


def _draw_lists(task: Task, example: RankingExample, config: AlignConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Lists from what the member did, as places in the example's questions, the preferred one first."""
    values = task.values[example.labels]
    best = rng.permutation(np.flatnonzero(values == task.values.max()))
    worse = np.flatnonzero(values < task.values.max())
    return (
        [_draw_list(one, worse, config.list_size, rng) for one in best[: config.lists_per_example]]
        if len(worse)
        else []
    )


def _draw_list(best: int, worse: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    return np.append(best, rng.permutation(worse)[: size - 1])


def _say(
    verbalizer: Verbalizer,
    task: Task,
    prompts: PromptConfig,
    example: RankingExample,
    style: str,
    lists: list[np.ndarray],
    note: str = "",
) -> EncodedPrompt:
    """One prompt with a question for every item of every list."""
    asked = example.select(np.concatenate(lists))
    asked = dataclasses.replace(asked, labels=np.full(len(asked.candidates), np.argmax(task.values), np.int32))
    encoded = encode(verbalizer.prompt(task, asked, style, note), verbalizer.tokenizer, prompts.layout)
    preference = [number if place == 0 else -number for number, one in enumerate(lists, 1) for place in range(len(one))]
    return dataclasses.replace(encoded, preference_lists=preference, answer_offsets=[])


def draw_contrast(
    verbalizer: Verbalizer, task: Task, example: RankingExample, rng: np.random.Generator
) -> Contrast | None:
    """A note about an attribute that questions say, its opposite, and what they rank, among the example's items of one
    answer; None where no attribute tells these items apart."""
    attributes = [
        attribute
        for attribute in verbalizer.dataset.card.items.attributes
        if attribute.kind in CONTRASTS and "question" in attribute.where
    ]
    for label in rng.permutation(np.unique(example.labels)):
        places = np.flatnonzero(example.labels == label)
        for index in rng.permutation(len(attributes)):
            attribute = attributes[index]
            values = verbalizer.item_values(attribute, example.candidates[places], example.cutoff_time)
            known = np.array([not is_unknown(value) for value in values], bool)
            contrast = CONTRASTS[attribute.kind](
                verbalizer, attribute, places[known], [v for v, k in zip(values, known, strict=True) if k], rng
            )
            if contrast:
                return contrast
    return None


def _of_values(
    verbalizer: Verbalizer, attribute: Attribute, places: np.ndarray, values: list, rng: np.random.Generator
) -> Contrast | None:
    """Items with one value and without another, against those with the other and without the one."""
    clean = verbalizer.tokenizer.clean
    of_item = [{clean(str(v)) for v in (value if attribute.kind == "list" else [value])} - {""} for value in values]
    relation = "include" if attribute.kind == "list" else "is"
    note = lambda value: (  # noqa: E731
        f"focus on {verbalizer.dataset.card.items.plural} whose {attribute.name} {relation} {value}"
    )
    pairs = [
        (a, b) for a in range(len(of_item)) for b in range(a) if of_item[a] - of_item[b] and of_item[b] - of_item[a]
    ]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    first, second = (str(rng.choice(sorted(of_item[x] - of_item[y]))) for x, y in ((a, b), (b, a)))
    one = np.array([first in own and second not in own for own in of_item])
    other = np.array([second in own and first not in own for own in of_item])
    return Contrast(note(first), note(second), places[one], places[other])


def _of_order(
    verbalizer: Verbalizer, attribute: Attribute, places: np.ndarray, values: list, rng: np.random.Generator
) -> Contrast | None:
    """The items in the highest third of a number or date against those in the lowest."""
    numbers = np.array(values, np.float64)
    low, high = np.quantile(numbers, [1 / 3, 2 / 3]) if values else (0, 0)
    if low >= high:
        return None
    more, less = ("recent", "long ago") if attribute.kind == "date" else ("high", "low")
    note = f"prefer {verbalizer.dataset.card.items.plural} whose {attribute.name} is"
    return Contrast(f"{note} {more}", f"{note} {less}", places[numbers >= high], places[numbers <= low])


CONTRASTS: dict[str, Callable[..., Contrast | None]] = {
    "category": _of_values,
    "list": _of_values,
    "number": _of_order,
    "date": _of_order,
}
