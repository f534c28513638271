"""What less than float32 does to a model's answers: in its head, its products, and its layers' weights and activations.

    python -m benchmarks.precision runs/demo/big/model data/movielens-100k configs/tasks/movielens/liked.yaml
        [--only products]

The talk that 360Brew is known from says that the head and the logits must be float32, "otherwise predictions collapse".
This shows whether they do, and how: pairs of items of one prompt with exactly the same score, which no order can tell
apart; the AUC, with its paired difference from float32 and a 95% interval over members; log loss and calibration; and
the most that a score moves. Products are float32 but in the row that says otherwise, which is what a CPU with bfloat16
instructions does by default (see `pallas_kernels.platform.product_dtype`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from brewjax.bundle.bundle import Bundle
from brewjax.compress.quantize import QuantizeConfig, quantize, with_head
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import sample_examples
from brewjax.data.tasks.task import Task, load_tasks
from brewjax.evaluate.predict import TaskExamples, predict
from brewjax.evaluate.predictions import scores
from brewjax.evaluate.results import OVERALL, evaluate
from brewjax.model.config import HeadPrecision

PRODUCTS = "products of layers bfloat16, sums float32"
HEADS = {
    "head bfloat16, logits float32": HeadPrecision(product="bfloat16"),
    "head bfloat16, logits bfloat16": HeadPrecision(product="bfloat16", logits="bfloat16"),
    "head e4m3, logits float32": HeadPrecision(product="e4m3"),
    "head e4m3, logits bfloat16": HeadPrecision(product="e4m3", logits="bfloat16"),
}
LAYERS = {
    "layers e4m3, activations bfloat16": QuantizeConfig(activations=None),
    "layers e4m3, activations by token": QuantizeConfig(),
    "layers e4m3 by tensor, activations by token": QuantizeConfig(scales="per_tensor"),
    "layers e4m3, activations by tensor": QuantizeConfig(activations="per_tensor"),
    "layers int8, activations by token": QuantizeConfig(dtype="int8"),
    "layers int8 by tensor, activations by token": QuantizeConfig(dtype="int8", scales="per_tensor"),
}


def ties(predictions: pa.Table, task: Task) -> float:
    """The share of pairs of questions of one prompt that have the same score to the bit."""
    score, example = scores(predictions, task), predictions["example"].to_numpy()
    equal = pairs = 0
    for example_id in np.unique(example):
        _, counts = np.unique(score[example == example_id], return_counts=True)
        n = counts.sum()
        equal += int((counts * (counts - 1)).sum())
        pairs += int(n * (n - 1))
    return equal / max(1, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of a float32 model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("tasks", type=Path, nargs="+")
    parser.add_argument("--only", help="of the rows those with this in their name, and float32")
    parser.add_argument("--examples", type=int, default=400, help="of each task")
    arguments = parser.parse_args()

    dataset, whole = Dataset.load(arguments.dataset), Bundle.load(arguments.model)
    bundles = {"float32": whole, PRODUCTS: whole} | {name: with_head(whole, head) for name, head in HEADS.items()}
    bundles |= {name: quantize(arguments.model, config) for name, config in LAYERS.items()}
    bundles["layers e4m3 by token, head bfloat16, logits bfloat16"] = with_head(
        bundles["layers e4m3, activations by token"], HEADS["head bfloat16, logits bfloat16"]
    )
    metrics = {"metrics": ("auc", "log_loss", "calibration_error")}
    tasks = [task.model_copy(update=metrics) for task in load_tasks(arguments.tasks, dataset)]
    examples = [
        TaskExamples(dataset, task, sample_examples(dataset, task, "test", arguments.examples)) for task in tasks
    ]
    predictions_by_model = {}
    for name, bundle in bundles.items():
        if arguments.only and arguments.only not in name and name != "float32":
            continue
        with jax.default_matmul_precision("bfloat16" if name == PRODUCTS else "float32"):
            predictions_by_model[name] = predict(bundle, examples)
    for number, task in enumerate(tasks):
        _show(task, {name: predictions[number].table for name, predictions in predictions_by_model.items()})


def _show(task: Task, predictions: dict[str, pa.Table]) -> None:
    results = {name: evaluate(table, task)[OVERALL] for name, table in predictions.items()}
    table = Table(title=f"{task.name}: {results['float32'].rows:,} questions", title_justify="left")
    for column in ("", "AUC", "less than float32's by", "log loss", "calibration error", "ties", "scores move by"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        loss = results["float32"].metrics["auc"] - result.metrics["auc"]
        table.add_row(
            name,
            f"{result.metrics['auc'].value:.4f}",
            f"{loss.value:.4f} ±{loss.error:.4f}" if name != "float32" else "",
            f"{result.metrics['log_loss'].value:.4f}",
            f"{result.metrics['calibration_error'].value:.4f}",
            f"{ties(predictions[name], task):.2%}",
            f"{np.abs(scores(predictions[name], task) - scores(predictions['float32'], task)).max():.4f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
