"""Proposes facts for a card: every fact that its columns allow, by what each adds on the validation period."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from brewjax.console import track
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.facts import GROUPS, Fact, FactGroup, Facts
from brewjax.data.tables.statistics import FactValues
from brewjax.data.tables.union import parse_card
from brewjax.data.tables.vectors import VECTORS
from brewjax.data.tasks.examples import RankingExample, sample_examples
from brewjax.data.tasks.task import Task
from brewjax.evaluate.features import CandidateRows
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.regression import FactRegression, stated_numbers
from brewjax.evaluate.results import OVERALL, evaluate
from brewjax.paths import write_text

SHRINK = 5.0  # events
RECENT_DAYS = 30.0
MIN_GAIN = 5e-4  # of log loss, for a fact to be proposed
MAX_EXAMPLES = 2000  # of each period


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a fact adds to those proposed before it, by the fact regression on the validation period.

    Attributes:
      gauc, auc, log_loss: the metrics with it, less those without it; a lower log loss is a gain.
    """

    group: FactGroup
    fact: Fact
    gauc: float
    auc: float
    log_loss: float


def propose_facts(dataset: Dataset, task: Task, max_facts: int = 12) -> list[Gain]:
    """Chooses facts one by one, each time the one that lowers the validation log loss most, of those that alone did.

    Args:
      dataset: whose card says what facts there can be.
      task: that the facts are to help with.
      max_facts: at most so many are proposed.

    Returns:
      The facts in the order of their choice, with what each added to those before.

    Raises:
      ConfigError: a period has no question.
    """
    train, validation = (sample_examples(dataset, task, split, MAX_EXAMPLES) for split in ("train", "validation"))
    for name, examples in (("train", train), ("validation", validation)):
        if not examples:
            raise task.error(f"no question falls into the {name} period", "split")
    score = _Judge(dataset, task, train, validation)
    base = score(())
    candidates = list(candidate_facts(task.side_of(dataset.card), _answer_columns(dataset, task)))
    if (dataset.path / VECTORS).is_file():
        candidates.append(("pairs", Fact(name="similarity", similarity=VECTORS)))
    alone = [(base[2] - score((candidate,))[2], candidate) for candidate in track(candidates, "facts")]
    promising = [candidate for gain, candidate in sorted(alone, key=lambda pair: -pair[0]) if gain > MIN_GAIN]
    chosen: list[Gain] = []
    for group, fact in track(promising, "together"):
        current = tuple((gain.group, gain.fact) for gain in chosen)
        metrics = score((*current, (group, fact)))
        if base[2] - metrics[2] > MIN_GAIN and len(chosen) < max_facts:
            chosen.append(Gain(group, fact, *(new - old for new, old in zip(metrics, base, strict=True))))
            base = metrics
    return chosen


def _answer_columns(dataset: Dataset, task: Task) -> list[str]:
    """The numeric event columns that answers are read from: what they were in the past often says what they will be."""
    matched = dict.fromkeys(column for label in task.labels for column in label.match or ())
    types = {column: dataset.event_column(column).type for column in matched}
    return [column for column, type_ in types.items() if pa.types.is_integer(type_) or pa.types.is_floating(type_)]


def candidate_facts(card: Card, answer_columns: Sequence[str] = ()) -> Iterator[tuple[FactGroup, Fact]]:
    """Every fact worth trying for a card: counts, means and rates of members, items and pairs, similarities.

    Args:
      card: of the dataset.
      answer_columns: numeric event columns that are no attributes of the card, and whose means are worth trying too.

    Yields:
      Each fact with its group.
    """
    actions = tuple(card.events.actions)
    numbers = [attribute.column for attribute in card.events.attributes if attribute.kind == "number"]
    columns = list(dict.fromkeys([*numbers, *answer_columns]))
    timed = card.events.time is not None
    shared = [attribute.column for attribute in card.items.attributes if attribute.kind in ("category", "list")]
    cohorts = [attribute.column for attribute in card.members.attributes if attribute.kind in ("category", "list")]
    for action in actions:
        for group in ("members", "items"):
            yield group, Fact(name=f"{action}", count=(action,))
            if timed:
                yield group, Fact(name=f"{action} lately", count=(action,), days=RECENT_DAYS)
            if len(actions) > 1:
                yield group, Fact(name=f"rate {action}", rate=(action,), shrink=SHRINK)
        if timed:
            yield "members", Fact(name=f"days since {action}", days_since=(action,))
            yield "pairs", Fact(name=f"days since {action} it", days_since=(action,))
        yield "pairs", Fact(name=f"{action} it", count=(action,))
        yield "pairs", Fact(name=f"{action} together", together=(action,))
        for column in shared:
            yield "pairs", Fact(name=f"{action} {column} share", share=(action,), by=column)
            if len(actions) > 1:
                yield "pairs", Fact(name=f"rate {action} {column}", rate=(action,), by=column, shrink=SHRINK)
        if len(actions) > 1:
            for column in cohorts:
                yield "pairs", Fact(name=f"rate {action} of same {column}", rate=(action,), among=column, shrink=SHRINK)
    for value in columns:
        yield "items", Fact(name=f"mean {value}", mean=value, shrink=SHRINK)
        yield "members", Fact(name=f"{value} above average", mean=value, less="items", shrink=SHRINK)
        yield "pairs", Fact(name=f"{value} neighbors", neighbors=value, shrink=1)
        for column in shared:
            yield "pairs", Fact(name=f"{value} of {column}", mean=value, less="items", by=column, shrink=SHRINK)
        for column in cohorts:
            yield "pairs", Fact(name=f"{value} of same {column}", mean=value, among=column, shrink=SHRINK)
    for attribute in card.items.attributes:
        if attribute.kind in ("number", "date"):
            yield "pairs", Fact(name=f"{attribute.column} apart", distance=attribute.column)
        if attribute.kind == "date":
            yield "items", Fact(name=f"days since {attribute.column}", age=attribute.column)


def facts_yaml(gains: Sequence[Gain]) -> str:
    """The section `facts` of a card, as YAML, with the facts of `gains`."""
    facts: dict[str, list[dict]] = {}
    for group in GROUPS:
        entries = [gain.fact.model_dump(mode="json", exclude_defaults=True) for gain in gains if gain.group == group]
        if entries:
            facts[group] = entries
    return yaml.safe_dump({"facts": facts}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def write_facts(folder: Path, gains: Sequence[Gain]) -> None:
    """Writes facts into the card of a dataset folder, in place of those it has; the rest of the file stays.

    Args:
      folder: of the dataset.
      gains: the facts.

    Raises:
      ConfigError: the card is wrong with them; it stays as it is.
    """
    path = folder / CARD
    lines = path.read_text().splitlines(keepends=True)
    starts = [index for index, line in enumerate(lines) if line[:1].strip() and not line.startswith("#")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if lines[start].startswith("facts:"):
            lines[start:end] = []
            break
    text = "".join(lines)
    text += ("" if text.endswith("\n") else "\n") + facts_yaml(gains)
    parse_card(text, folder)
    write_text(path, text)


class _Judge:
    """Metrics of the fact regression with some facts, on fixed examples. The numbers of a fact are computed once."""

    def __init__(
        self, dataset: Dataset, task: Task, train: Sequence[RankingExample], validation: Sequence[RankingExample]
    ):
        bare = dataclasses.replace(dataset, card=task.side_of(dataset.card).model_copy(update={"facts": Facts()}))
        self._facts, self._sides = FactValues.of(dataset), (train, validation)
        self._rows = [CandidateRows.from_examples(examples) for examples in self._sides]
        self._attributes = [stated_numbers(bare, task, examples) for examples in self._sides]
        self._numbers: dict[tuple[FactGroup, str], list[np.ndarray]] = {}
        self._task = task.model_copy(update={"metrics": ("gauc", "auc", "log_loss")})

    def __call__(self, facts: Sequence[tuple[FactGroup, Fact]]) -> tuple[float, float, float]:
        train, validation = (dict(numbers) for numbers in self._attributes)
        for group, fact in facts:
            for numbers, values in zip((train, validation), self._values(group, fact), strict=True):
                numbers[f"{group}.{fact.name}"] = values
        labels, count = self._rows[0].label, len(self._rows[1].label)
        fitted = FactRegression.fit_numbers(train, labels, len(self._task.words), {})
        table = from_examples(self._sides[1], fitted.predict_numbers(validation, count))
        metrics = evaluate(table, self._task, bootstrap=0)[OVERALL].metrics
        gauc, auc, log_loss = (float(metrics[name].value) for name in self._task.metrics)
        return gauc, auc, log_loss

    def _values(self, group: FactGroup, fact: Fact) -> list[np.ndarray]:
        if (group, fact.name) not in self._numbers:
            self._numbers[group, fact.name] = [
                self._facts.values(group, fact, rows.member, rows.item, rows.cutoff_time) for rows in self._rows
            ]
        return self._numbers[group, fact.name]
