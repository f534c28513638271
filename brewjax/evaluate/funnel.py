"""Retrieve, then rank: how good a member's first ten items are, against those of ranking the whole catalogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from brewjax.bundle.bundle import Bundle
from brewjax.console import plain_console, track
from brewjax.data.tables.dataset import Dataset
from brewjax.evaluate.metrics import ndcg
from brewjax.evaluate.ranking import rank
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.evaluation import interval, resample_members, search_catalogue
from brewjax.retrieve.queries import Queries, select_queries

EVERYTHING = "rank everything"
NOT_SHOWN = -1.0  # the score of an item that is not ranked; label values that NDCG takes are not negative


class FunnelRow(NamedTuple):
    """A way to find the first ten items, over all queries.

    Attributes:
      method: "rank everything", "retrieve 200, then rank", or "retrieve alone".
      ranked: items that the ranker scores for a query, on average.
      ndcg: NDCG@10 over the whole catalogue, in which the items that the member went on to are the relevant ones.
      error: half of its 95% interval, 1.96 standard errors over resampled members; NaN for a single member.
      lead, lead_error: this one minus "rank everything", on the same resamples.
    """

    method: str
    ranked: float
    ndcg: float
    error: float
    lead: float
    lead_error: float


def evaluate_funnel(
    encoder: Encoder,
    ranker: Bundle,
    dataset: Dataset,
    ks: Sequence[int],
    max_examples: int | None = None,
    dimensions: int | None = None,
    bootstrap: int = 200,
) -> list[FunnelRow]:
    """Judges retrieval by what the ranker makes of it, in the test period of the encoder's task.

    The ranker scores every item once, since a score does not depend on the other items: with retrieval, only those of
    the k nearest count. Queries, catalogue and moments are those of `evaluate_retrieval`.

    Args:
      encoder: that retrieves.
      ranker: that ranks; the encoder's task is one of its own.
      dataset: the tables.
      ks: how many items are retrieved, at least 10 each.
      max_examples: the most queries, chosen at random where there are more.
      dimensions: what the encoder's vectors are truncated to.
      bootstrap: resamples of members behind each interval.

    Returns:
      A row for ranking everything, for each k, and for the encoder's own order.
    """
    task, num_items = encoder.task, len(dataset.items)
    queries = select_queries(dataset, task, max_examples)
    nearest_items = search_catalogue(encoder, dataset, queries, num_items, dimensions)
    verbalizer = ranker.verbalizer(dataset, task)
    names = [EVERYTHING, *(f"retrieve {k}, then rank" for k in ks), "retrieve alone"]
    scores = np.full((len(names), len(queries), num_items), NOT_SHOWN)
    ranked = np.zeros((len(names), len(queries)))
    for query, (example, excluded, nearest) in enumerate(
        track([*zip(queries.examples, queries.excluded, nearest_items, strict=True)], "queries")
    ):
        eligible = np.setdiff1d(np.arange(num_items), excluded)
        unknown = np.full(len(eligible), -1)
        question = dataclasses.replace(example, candidates=eligible, labels=unknown, exposures=unknown)
        ranking = rank(ranker, verbalizer, task, question)
        scores[0, query, ranking.items] = ranking.probabilities @ task.values
        ranked[0, query] = len(eligible)
        for row, k in enumerate(ks, 1):
            scores[row, query, nearest[:k]] = scores[0, query, nearest[:k]]
            ranked[row, query] = min(k, len(nearest))
        scores[-1, query, nearest] = num_items - np.arange(len(nearest))
    one_list, weights = np.zeros(num_items, int), np.ones(num_items)
    quality = np.empty(ranked.shape)
    for query, positives in enumerate(queries.positives):
        relevant = np.isin(np.arange(num_items), positives).astype(float)
        quality[:, query] = [ndcg(row, relevant, one_list, weights) for row in scores[:, query]]
    return _summarize(names, quality, ranked.mean(1), queries, bootstrap)


def _summarize(
    names: Sequence[str], quality: np.ndarray, ranked: np.ndarray, queries: Queries, bootstrap: int
) -> list[FunnelRow]:
    """`quality`: float64 [methods, queries]; `ranked`: float64 [methods]."""
    of_query, member = resample_members(queries, bootstrap)
    members = len(np.unique(member))
    rows = []
    for name, values, count in zip(names, quality, ranked, strict=True):
        lead = values - quality[0]
        error, lead_error = (interval(of_query, x) if members > 1 else np.nan for x in (values, lead))
        rows.append(FunnelRow(name, float(count), float(values.mean()), error, float(lead.mean()), lead_error))
    return rows


def print_funnel(title: str, rows: Sequence[FunnelRow]) -> None:
    """Prints a line for each way to the first ten items, of the `rows` of a funnel, under `title`."""
    table = Table("method", "items ranked", "NDCG@10", "minus ranking everything", title=title, title_justify="left")
    for row in rows:
        lead = "" if row.method == EVERYTHING else f"{row.lead:+.4f} ±{row.lead_error:.4f}"
        table.add_row(row.method, f"{row.ranked:,.0f}", f"{row.ndcg:.4f} ±{row.error:.4f}", lead)
    plain_console().print(table)
