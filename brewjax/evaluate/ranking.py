"""Rankings of many items for members of a dataset, in pieces, so that memory does not grow with the catalogue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from brewjax.bundle.bundle import Bundle
from brewjax.config import ConfigError
from brewjax.console import track
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.paths import write_table, write_text

PIECE = 1_000  # candidates that are rendered and scored at a time


class Ranking(NamedTuple):
    """The items of an example with the probabilities of the labels.

    Attributes:
      member: row of the member.
      items: int32 [items], rows of the items.
      probabilities: float32 [items, labels].
    """

    member: int
    items: np.ndarray
    probabilities: np.ndarray


def rank(bundle: Bundle, verbalizer: Verbalizer, task: Task, example: RankingExample, note: str = "") -> Ranking:
    """Scores the candidates of an example, PIECE at a time.

    Args:
      bundle: the model.
      verbalizer: of the bundle, for the example's dataset.
      task: what is asked.
      example: a member as of a time, with candidates.
      note: a steering note in place of the task's.

    Returns:
      The probabilities of the candidates that fit.

    Raises:
      ConfigError: every question is too long and was skipped.
    """
    style = bundle.prompts.score_style
    items, probabilities = [], []
    starts = range(0, len(example.candidates), PIECE)
    for start in track(starts, "items") if len(starts) > 1 else starts:
        fitting = verbalizer.fitting(task, example.select(slice(start, start + PIECE)), style)
        if len(fitting.candidates):
            probabilities.append(bundle.score(verbalizer.prompt(task, fitting, style, note)))
            items.append(fitting.candidates)
    verbalizer.print_overlong()
    if not items:
        raise task.error("every question is too long and was skipped; raise max_tokens", "questions", "overlong")
    return Ranking(example.member, np.concatenate(items), np.concatenate(probabilities))


def write_rankings(path: Path, dataset: Dataset, task: Task, rankings: Sequence[Ranking]) -> None:
    """Writes rankings, the best items of each member first, by ids.

    Args:
      path: .parquet for a table, .json or .jsonl for a JSON object per line.
      dataset: the tables, for ids.
      task: whose values order the items.
      rankings: one for each member.

    Raises:
      ConfigError: the name of the file ends with neither .parquet nor .json.
    """
    if path.suffix not in (".parquet", ".json", ".jsonl"):
        raise ConfigError(f"{path}: expected a name that ends with .parquet, .json or .jsonl")
    columns: dict[str, list] = {name: [] for name in ("member", "item", "rank", *task.words)}
    for ranking in rankings:
        order = np.argsort(-(ranking.probabilities @ task.values), kind="stable")
        columns["member"] += [dataset.member_id(ranking.member)] * len(order)
        columns["item"] += [dataset.item_id(row) for row in ranking.items[order]]
        columns["rank"] += range(1, len(order) + 1)
        for index, word in enumerate(task.words):
            columns[word] += ranking.probabilities[order, index].astype(float).tolist()
    table = pa.table(columns)
    if path.suffix == ".parquet":
        write_table(path, table)
    else:
        write_text(path, "".join(json.dumps(row) + "\n" for row in table.to_pylist()))
