"""What the history is worth: quality against the token budget, and beside prompts of facts alone.

    python -m benchmarks.budget runs/movielens/xl/model data/movielens-100k configs/tasks/movielens/*.yaml

The same questions are asked in the style `compact`, whose history is as long as each budget allows, and in `numbers`,
which states facts in buckets and nothing else. Of each: events and tokens before the questions, AUC and NDCG@10 within
the list, and how far the AUC is ahead of facts alone, paired over members. A model can only use what its training had
in both styles (`prompts.styles`), and budgets beyond that of its training are strange to it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import sample_examples
from brewjax.data.tasks.task import load_tasks
from brewjax.evaluate.predict import TaskExamples, predict
from brewjax.evaluate.results import OVERALL, evaluate

FACTS, HISTORY = "numbers", "compact"  # styles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model's folder")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("tasks", type=Path, nargs="+")
    parser.add_argument("--budgets", type=int, nargs="+", default=[96, 160, 240, 320], help="tokens of a prompt")
    parser.add_argument("--examples", type=int, default=400, help="of each task")
    arguments = parser.parse_args()

    dataset, bundle = Dataset.load(arguments.dataset), Bundle.load(arguments.model)
    tasks = load_tasks(arguments.tasks, dataset)
    questions = [
        TaskExamples(dataset, task, sample_examples(dataset, task, "test", arguments.examples)) for task in tasks
    ]
    results, sizes = {}, {}
    for style, budget in [(FACTS, max(arguments.budgets)), *((HISTORY, budget) for budget in arguments.budgets)]:
        prompts = bundle.prompts.model_copy(update={"score_style": style, "max_tokens": budget})
        row = style if style == FACTS else f"{style}, {budget} tokens"
        rendered = dataclasses.replace(bundle, prompts=prompts)
        predictions = predict(rendered, questions)
        results[row] = [evaluate(each.table, task)[OVERALL] for each, task in zip(predictions, tasks, strict=True)]
        sizes[row] = [measure(rendered, each, style) for each in questions]
    for number, task in enumerate(tasks):
        table = Table(title=f"{task.name}: {results[FACTS][number].rows:,} questions", title_justify="left")
        for column in ("", "events", "tokens", "AUC within the list", "NDCG@10", "AUC minus that of facts alone"):
            table.add_column(column, justify="right" if column else "left")
        for row, by_task in results.items():
            metrics, (events, tokens) = by_task[number].metrics, sizes[row][number]
            gain = metrics["gauc"] - results[FACTS][number].metrics["gauc"]
            table.add_row(
                row,
                f"{events:.1f}",
                f"{tokens:.0f}",
                f"{metrics['gauc'].value:.4f}",
                f"{metrics['ndcg@10'].value:.4f}",
                f"{gain.value:+.4f} ±{gain.error:.4f}" if row != FACTS else "",
            )
        Console(width=120).print(table)


def measure(bundle: Bundle, questions: TaskExamples, style: str) -> tuple[float, float]:
    """Events and tokens before the questions, on average."""
    verbalizer = bundle.verbalizer(questions.dataset, questions.task)
    prompts = [verbalizer.prompt(questions.task, example, style) for example in questions.examples]
    tokens = [bundle.encode(prompt).prefix_length for prompt in prompts]
    return float(np.mean([len(prompt.events) for prompt in prompts])), float(np.mean(tokens))


if __name__ == "__main__":
    main()
