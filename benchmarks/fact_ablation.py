"""What a fact of a card is worth within the list: the regression and LightGBM with it, less without it.

`python -m benchmarks.fact_ablation FOLDER TASK similarity` trains both on examples of the training period, with all
facts of the card and with all but the named ones, and prints metrics of the test period, paired over members.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection

import numpy as np

from brewjax.data.tables.card import Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import Percentiles
from brewjax.data.tasks.examples import sample_examples
from brewjax.data.tasks.task import load_tasks
from brewjax.evaluate.baselines import LightGBM
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.regression import FactRegression
from brewjax.evaluate.results import OVERALL, evaluate


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
    arguments = parser.parse_args()
    whole = Dataset.load(arguments.folder)
    (task,) = load_tasks([arguments.task], whole)
    task = task.model_copy(update={"metrics": ("gauc", "ndcg@10", "log_loss")})
    bare = dataclasses.replace(whole, card=without(whole.card, arguments.facts))
    counts = {"train": arguments.max_examples, "validation": arguments.max_examples // 3, "test": None}
    train, validation, test = (sample_examples(whole, task, split, count) for split, count in counts.items())
    print("| ranker | metric | without | with | gain |\n|---|---|---|---|---|")
    results = []
    for dataset in (bare, whole):
        percentiles = Percentiles.fit(dataset, task.boundaries(dataset)[0])
        regression = FactRegression.fit(dataset, task, train, percentiles).predict(dataset, task, test)
        trees = LightGBM.fit(dataset, task, train, validation, 1).predict(dataset, task, test)
        predicted = {"fact regression": np.asarray(regression), "LightGBM": np.asarray(trees)}
        results.append(
            {name: evaluate(from_examples(test, table), task)[OVERALL].metrics for name, table in predicted.items()}
        )
    for name in results[0]:
        for metric, before in results[0][name].items():
            after = results[1][name][metric]
            gain, shown = after - before, [f"{each.value:.4f} ±{each.error:.4f}" for each in (before, after)]
            print(f"| {name} | {metric} | {' | '.join(shown)} | {gain.value:+.4f} ±{gain.error:.4f} |")


if __name__ == "__main__":
    main()
