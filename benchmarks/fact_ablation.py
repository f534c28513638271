"""What a fact of a card is worth within the list: the regression and LightGBM with it, less without it.

`python -m benchmarks.fact_ablation FOLDER TASK similarity` trains both on examples of the training period, with all
facts of the card and with all but the named ones, and prints metrics of the test period, paired over members.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from brewjax.data.tables.card import Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import RankingExample, sample_examples
from brewjax.data.tasks.task import Task, load_tasks
from brewjax.evaluate.baselines import LightGBM
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.regression import FactRegression
from brewjax.evaluate.results import OVERALL, evaluate

Examples = Sequence[RankingExample]


def without(card: Card, names: Collection[str]) -> Card:
    """The card without facts of these names."""
    groups = {
        group: tuple(fact for fact in getattr(card.facts, group) if fact.name not in names)
        for group in type(card.facts).model_fields
    }
    return card.model_copy(update={"facts": card.facts.model_copy(update=groups)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("task")
    parser.add_argument("facts", nargs="+")
    parser.add_argument("--max-examples", type=int, default=3000, help="of the training period")
    arguments = parser.parse_intermixed_args()
    whole = Dataset.load(arguments.folder)
    (task,) = load_tasks([arguments.task], whole)
    task = task.model_copy(update={"metrics": ("gauc", "ndcg@10", "log_loss")})
    bare = dataclasses.replace(whole, card=without(whole.card, arguments.facts))
    counts = {"train": arguments.max_examples, "validation": arguments.max_examples // 3, "test": None}
    train, validation, test = (sample_examples(whole, task, split, count) for split, count in counts.items())
    print("| ranker | metric | without | with | gain |\n|---|---|---|---|---|")
    for name, predict in {"fact regression": predict_by_regression, "LightGBM": predict_by_trees}.items():
        predicted = [predict(dataset, task, train, validation, test) for dataset in (bare, whole)]
        metrics = [evaluate(from_examples(test, each), task)[OVERALL].metrics for each in predicted]
        for metric, before in metrics[0].items():
            gain = metrics[1][metric] - before
            cells = [f"{each.value:.4f} ±{each.error:.4f}" for each in (before, metrics[1][metric])]
            print(f"| {name} | {metric} | {' | '.join(cells)} | {gain.value:+.4f} ±{gain.error:.4f} |", flush=True)


def predict_by_regression(dataset: Dataset, task: Task, train: Examples, _: Examples, test: Examples) -> np.ndarray:
    scales = Scales.fit(dataset, task.boundaries(dataset)[0])
    return FactRegression.fit(dataset, task, train, scales).predict(dataset, task, test)


def predict_by_trees(dataset: Dataset, task: Task, train: Examples, validation: Examples, test: Examples) -> np.ndarray:
    return LightGBM.fit(dataset, task, train, validation, 1).predict(dataset, task, test)


if __name__ == "__main__":
    main()
