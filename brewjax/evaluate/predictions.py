"""Tables of predictions: one row per question, the same rows for the model and for every baseline of a task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task

SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "example": pa.int64(),
        "list": pa.int64(),
        "member": pa.int64(),
        "item": pa.int64(),
        "num_past_events": pa.int64(),
        "label": pa.int64(),
        "probabilities": pa.list_(pa.float32()),
    }
)
QUESTION = [name for name in SCHEMA.names if name != "probabilities"]


def from_examples(examples: Sequence[RankingExample], probabilities: np.ndarray) -> pa.Table:
    """The table of predictions for some examples.

    Args:
      examples: all of their labels are known.
      probabilities: float [questions, labels], of all candidates of all examples in order; each row sums to 1.

    Returns:
      A table with the columns of SCHEMA; `example` is the index in `examples`; `list` is the same for the candidates
      that are ranked against each other, those of a request or, where there is none, all of a member; the others are as
      in `RankingExample`.

    Raises:
      ValueError: a row is wrong; names the first.
    """
    sizes = np.array([len(example.candidates) for example in examples], int)
    if len(probabilities) != sizes.sum():
        raise ValueError(f"{sizes.sum()} questions in the examples, but {len(probabilities)} rows of probabilities")
    labels = np.concatenate([example.labels for example in examples]) if len(examples) else np.zeros(0, int)
    bad = ~(np.isclose(probabilities.sum(axis=1), 1, atol=1e-3) & (probabilities >= 0).all(axis=1))
    if bad.any():
        row = np.flatnonzero(bad)[0]
        raise ValueError(f"row {row}: expected probabilities that sum to 1, found {probabilities[row].tolist()}")
    if (labels < 0).any():
        raise ValueError(f"row {np.flatnonzero(labels < 0)[0]}: the question has no known label to judge it by")
    # Requests are numbered from 0 on, so that below 0 there is room for members.
    lists = np.array([-1 - example.member if example.request < 0 else example.request for example in examples], int)
    columns = {
        "task": np.repeat(np.array([example.task for example in examples], object), sizes),
        "example": np.repeat(np.arange(len(examples)), sizes),
        "list": np.repeat(lists, sizes),
        "member": np.repeat(np.array([example.member for example in examples], int), sizes),
        "item": np.concatenate([example.candidates for example in examples]) if len(examples) else np.zeros(0, int),
        "num_past_events": np.repeat(np.array([example.num_past_events for example in examples], int), sizes),
        "label": labels,
        "probabilities": list(probabilities.astype(np.float32)),
    }
    return pa.table(columns, schema=SCHEMA)


def probabilities(predictions: pa.Table, task: Task) -> np.ndarray:
    """float64 [rows, labels]: the predicted probability of each label."""
    flat = predictions["probabilities"].combine_chunks().flatten().to_numpy().astype(np.float64)
    return flat.reshape(len(predictions), len(task.labels))


def scores(predictions: pa.Table, task: Task) -> np.ndarray:
    """The scores by which items are ranked.

    Args:
      predictions: as `from_examples` makes them.
      task: whose labels have values.

    Returns:
      float64 [rows]: the expected value of the answer.
    """
    # Not `@`: BLAS may round equal rows differently by their position, and that would break ties.
    return (probabilities(predictions, task) * task.values).sum(axis=1)


def true_values(predictions: pa.Table, task: Task) -> np.ndarray:
    """float64 [rows]: the value of the true answer."""
    return task.values[predictions["label"].to_numpy()]


def check_same_questions(first: pa.Table, second: pa.Table) -> None:
    """Checks that two tables answer the same questions in the same order.

    Raises:
      ValueError: they do not; names the first row that differs.
    """
    if len(first) != len(second):
        raise ValueError(f"predictions of {len(first)} and {len(second)} questions cannot be compared")
    for name in QUESTION:
        if not first[name].equals(second[name]):
            row = np.flatnonzero(first[name].to_numpy() != second[name].to_numpy())[0]
            raise ValueError(
                f"predictions of different questions cannot be compared: row {row} has {name} "
                f"{first[name][row]} in one and {second[name][row]} in the other"
            )
