"""A suite of two small surfaces, a shop with choice sets and ratings without, and predictors with known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset, write_tables
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.suite.suite import Suite

SHOP = """\
name: shop
items: {noun: product, plural: products, attributes: [{column: brand, kind: category}]}
events:
  request: trip
  actions: {bought: {past: has bought}, passed: {past: has passed}}
facts:
  pairs: [{name: own share, rate: [bought], shrink: 2}]
"""
RATINGS = """\
name: ratings
items: {noun: film, plural: films, attributes: [{column: title, kind: text}]}
events:
  actions: {rated: {past: has rated}}
  attributes: [{column: stars, kind: number}]
facts:
  items: [{name: mean stars, mean: stars, shrink: 2}]
"""
BUYS = """\
name: buys
instruction: Predict.
history: {actions: [bought]}
questions: {question: Will the member buy it, actions: [bought, passed], per_request: true, repeats: true}
labels:
  - {word: "Yes", value: 1, match: {action: bought}}
  - {word: "No", value: 0, match: {action: passed}}
split: {validation: 60%, test: 80%}
"""
LIKED = """\
name: liked
instruction: Predict.
history: {actions: [rated]}
questions: {question: Will the member like it, actions: [rated], span_days: 40}
labels:
  - {word: "Yes", value: 1, match: {stars: [4, 5]}}
  - {word: "No", value: 0, match: {stars: [1, 2, 3]}}
split: {validation: 60%, test: 80%}
"""
WATCHED = """\
name: watched
instruction: Predict.
history: {actions: [rated]}
questions:
  question: Will the member watch it
  actions: [rated]
  span_days: 40
  sampled_negatives: {label: "No", per_event: 3}
labels:
  - {word: "Yes", value: 1, match: {action: rated}}
  - {word: "No", value: 0}
split: {validation: 60%, test: 80%}
"""
SUITE = """\
name: small
seed: 3
bootstrap: 100
draws: {quick: {questions: 40, lists: 8}, full: {questions: 80, lists: 16}}
tiers: {T1: {title: trained, may_train_on: tasks}, T3: {title: held out}}
surfaces:
  shop: {dataset: shop, domain: shopping, tasks: [{file: buys.yaml, tier: T3}]}
  films:
    dataset: ratings
    domain: films
    tasks: [{file: liked.yaml, tier: T1, past_events: [0, 3]}, {file: watched.yaml, tier: T1}]
"""


@pytest.fixture(scope="session")
def _tables(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    rng, start = np.random.default_rng(0), np.datetime64("2025-01-01", "us")
    shop: dict[str, list] = {name: [] for name in ("member_id", "item_id", "action", "time", "trip")}
    for trip in range(400):
        member, hour = trip % 40, trip // 40 * 24 + trip % 40
        favorite = member % 4
        chosen = favorite if rng.random() < 0.7 else int(rng.integers(4))
        for item in range(4):
            values = (member, item, "bought" if item == chosen else "passed", start + np.timedelta64(hour, "h"), trip)
            for name, value in zip(shop, values, strict=True):
                shop[name].append(value)
    ratings: dict[str, list] = {name: [] for name in ("member_id", "item_id", "action", "time", "stars")}
    for member in range(30):
        for place, item in enumerate(rng.permutation(60)[:30].tolist()):
            hour = place * 20 + member % 7
            stars = int(np.clip(round(3 + (item % 5 - 2) / 2 + rng.normal()), 1, 5))
            values = (member, item, "rated", start + np.timedelta64(hour, "h"), stars)
            for name, value in zip(ratings, values, strict=True):
                ratings[name].append(value)
    for name, card, events, items in (
        ("shop", SHOP, shop, {"item_id": range(4), "brand": ["A", "B", "C", "D"]}),
        ("ratings", RATINGS, ratings, {"item_id": range(60), "title": [f"Film {item}" for item in range(60)]}),
    ):
        (folder / name).mkdir()
        members = {"member_id": sorted(set(events["member_id"]))}
        events["time"] = pa.array(np.array(events["time"])).cast(pa.timestamp("us", "UTC"))
        tables = {"members": pa.table(members), "items": pa.table({k: list(v) for k, v in items.items()})}
        write_tables(folder / name, **tables, events=pa.table(events))
        (folder / name / CARD).write_text(card)
    return folder


@pytest.fixture
def suite(_tables, tmp_path, monkeypatch) -> Suite:
    """The suite, in a folder of its own that is the current one; its tables are shared and must not be changed."""
    monkeypatch.chdir(tmp_path)
    for name in ("shop", "ratings"):
        (tmp_path / name).symlink_to(_tables / name)
    for name, text in (("buys", BUYS), ("liked", LIKED), ("watched", WATCHED), ("suite", SUITE)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return Suite.load("suite.yaml")


class Fake:
    """Answers by a function of the rows of candidates; counts the questions that it was asked."""

    folder = Path("models/fake")
    training = None

    def __init__(self, name: str, score: Callable[[RankingExample], np.ndarray], version: Any = 1):
        self.name, self.score, self.identity, self.questions = name, score, {"fake": name, "version": version}, 0

    def can_answer(self, dataset: Dataset, task: Task) -> bool:
        return True

    def predict(
        self, dataset: Dataset, task: Task, examples: Sequence[RankingExample], visible: Dataset
    ) -> tuple[np.ndarray, dict[str, float]]:
        self.questions += sum(len(example.candidates) for example in examples)
        yes = np.clip(np.concatenate([self.score(example) for example in examples]), 0, 1)
        return np.stack([yes, 1 - yes], axis=1), {"seconds": 1.0, "tokens": 0}


def right(example: RankingExample) -> np.ndarray:
    """The probability of Yes, by the answer."""
    return (example.labels == 0).astype(float)


def noisy(share: float, seed: int = 0) -> Callable[[RankingExample], np.ndarray]:
    """The answer, with noise; the same for the same question."""

    def score(example: RankingExample) -> np.ndarray:
        seeds = [[seed, example.member, int(item)] for item in example.candidates]
        noise = np.array([np.random.default_rng(each).random() for each in seeds])
        return (1 - share) * right(example) + share * noise

    return score
