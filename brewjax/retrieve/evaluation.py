"""Recall over the whole catalogue: an encoder's, and that of the baselines on the same queries."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from brewjax.console import plain_console, print_line
from brewjax.data.tables.dataset import Dataset
from brewjax.retrieve.baselines import BASELINES, Scores
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.index import Index, IndexConfig
from brewjax.retrieve.queries import Queries, select_queries

ENCODER_NAME = "encoder"
KS = (10, 100, 2000)
WIDTH = 140  # columns of the table, whatever the terminal has
SLICES = {"all": (0, np.inf), "0-10": (0, 10), "11-100": (11, 100), "over 100": (101, np.inf)}  # past events


class Recall(NamedTuple):
    """A method's recall on a slice of queries.

    Attributes:
      method: "encoder", or the name of a baseline.
      past_events: the slice: members with so many past events.
      k: items retrieved for each query.
      queries, members: how many the slice has.
      recall: mean over queries of the share of a query's positives that are among the k items.
      error: half of its 95% interval, 1.96 standard errors over resampled members; NaN for a single member.
      lead, lead_error: the encoder's recall minus this one, on the same resamples.
    """

    method: str
    past_events: str
    k: int
    queries: int
    members: int
    recall: float
    error: float
    lead: float
    lead_error: float


def evaluate_retrieval(
    encoder: Encoder,
    dataset: Dataset,
    ks: Sequence[int] = KS,
    max_examples: int | None = None,
    dimensions: int | None = None,
    bootstrap: int = 200,
) -> list[Recall]:
    """Recall of the encoder and of the baselines in the test period of the encoder's task.

    Items are described as of the start of the test period, as an index that was built then has them; members as of
    each query's own time. Items that the task would not ask about at that time, such as those that the
    member knows, are retrieved by no method.

    Args:
      encoder: to evaluate.
      dataset: the tables.
      ks: how many items are retrieved; a k beyond the catalogue retrieves all of it.
      max_examples: the most queries, chosen at random where there are more.
      dimensions: what vectors are truncated to.
      bootstrap: resamples of members behind each interval.

    Returns:
      A row for each method, slice and k.
    """
    queries = select_queries(dataset, encoder.task, max_examples)
    ranks = {ENCODER_NAME: search_catalogue(encoder, dataset, queries, max(ks), dimensions)}
    for name, compute in BASELINES.items():
        try:
            ranks[name] = rank(compute(dataset, queries), queries.excluded, max(ks))
        except ModuleNotFoundError as error:
            print_line(f"{name} is left out: pip install {error.name}", stderr=True)
    recalls = {name: {k: recall_at(ranked, queries.positives, k) for k in ks} for name, ranked in ranks.items()}
    return _summarize(queries, recalls, ks, bootstrap)


def search_catalogue(
    encoder: Encoder, dataset: Dataset, queries: Queries, k: int, dimensions: int | None = None
) -> list[np.ndarray]:
    """Searches an index of the whole catalogue, described as of the start of the test period.

    Args:
      encoder: embeds members and items.
      dataset: the tables.
      queries: whose `excluded` items are not found.
      k: how many items are found for each, fewer where a query has fewer.
      dimensions: what vectors are truncated to.

    Returns:
      int64 [k] for each query, rows of the nearest items, the nearest first.
    """
    rows = np.flatnonzero(dataset.items_of(encoder.task.questions.actions[0]))
    members = encoder.embed_members(dataset, queries.examples, dimensions)
    with tempfile.TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "items", IndexConfig(dimensions=members.shape[1]))
        index.upsert(rows.tolist(), encoder.embed_items(dataset, rows, queries.time, dimensions))
        hits = index.search(members, k, exclude=[items.tolist() for items in queries.excluded])
        index.close()
    return [np.array(ids, np.int64) for ids, _ in hits]


def rank(scores: Scores, excluded: Sequence[np.ndarray], k: int) -> list[np.ndarray]:
    """Rows of the k best items of each query without those in `excluded`; equal scores come in the order of rows."""
    ranked = []
    for query_scores, absent in zip(scores, excluded, strict=True):
        order = np.argsort(-query_scores, kind="stable")
        ranked.append(order[~np.isin(order, absent)][:k])
    return ranked


def recall_at(ranked: Sequence[np.ndarray], positives: Sequence[np.ndarray], k: int) -> np.ndarray:
    """float64 [queries]: the share of a query's positives among its first k items."""
    pairs = zip(ranked, positives, strict=True)
    return np.array([np.isin(items, rows[:k]).mean() for rows, items in pairs])


def _summarize(
    queries: Queries, recalls: dict[str, dict[int, np.ndarray]], ks: Sequence[int], bootstrap: int
) -> list[Recall]:
    weights, member = resample_members(queries, bootstrap)
    past, rows = queries.num_past_events, []
    for past_events, (low, high) in SLICES.items():
        chosen = np.flatnonzero((past >= low) & (past <= high))
        if not len(chosen):
            continue
        of_query = weights[:, chosen]
        members = len(np.unique(member[chosen]))
        for k in ks:
            of_encoder = recalls[ENCODER_NAME][k][chosen]
            for method, by_k in recalls.items():
                values = by_k[k][chosen]
                error, lead_error = (
                    interval(of_query, x) if members > 1 else np.nan for x in (values, of_encoder - values)
                )
                mean, lead = float(values.mean()), float((of_encoder - values).mean())
                rows.append(Recall(method, past_events, k, len(chosen), members, mean, error, lead, lead_error))
    return rows


def resample_members(queries: Queries, bootstrap: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws members with replacement.

    Args:
      queries: of one or more members.
      bootstrap: how many times they are drawn.

    Returns:
      How often each query counts in each draw, int [bootstrap, queries]; and the member of each query, int [queries].
    """
    _, member = np.unique([example.member for example in queries.examples], return_inverse=True)
    num_members = int(member.max()) + 1
    weights = np.random.default_rng(0).multinomial(num_members, np.full(num_members, 1 / num_members), bootstrap)
    return weights[:, member], member


def interval(weights: np.ndarray, values: np.ndarray) -> float:
    """Half of the 95% interval of a mean, 1.96 standard errors, by the bootstrap.

    Args:
      weights: int [bootstrap, values], how often each value is in each resample.
      values: float64 [values].

    Returns:
      In the unit of the values.
    """
    totals = weights.sum(1)
    means = (weights[totals > 0] @ values) / totals[totals > 0]
    return 1.96 * float(means.std(ddof=1))


def print_recall(title: str, rows: Sequence[Recall]) -> None:
    """Prints a table with a line for each method and slice, and a column for each k.

    Args:
      title: above the table.
      rows: as `evaluate_retrieval` makes them.
    """
    ks = list(dict.fromkeys(row.k for row in rows))
    table = Table("past events", "queries", "method", *(f"Recall@{k}" for k in ks), title=title, title_justify="left")
    by_key = {(row.past_events, row.method, row.k): row for row in rows}
    for past_events, method in dict.fromkeys((row.past_events, row.method) for row in rows):
        cells = [by_key[past_events, method, k] for k in ks]
        lead = lambda row: "" if row.method == ENCODER_NAME else f" ({row.lead:+.3f} ±{row.lead_error:.3f})"  # noqa: E731
        shown = [f"{row.recall:.3f} ±{row.error:.3f}{lead(row)}" for row in cells]
        table.add_row(past_events, f"{cells[0].queries:,}", method, *shown)
    table.caption = "in brackets: how far the encoder is ahead"
    plain_console(width=max(plain_console().width, WIDTH)).print(table, crop=False)
