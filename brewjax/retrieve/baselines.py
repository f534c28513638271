"""What an encoder is compared with: popularity, item-kNN and ALS by `implicit`, and BM25 on the items' text by `bm25s`.

Each scores every item for every query from what is known at the start of the test period, and from the query's history.

Axis letters: Q queries, I items.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from brewjax.data.tables.dataset import Dataset
from brewjax.retrieve.queries import Queries

NEIGHBOURS, FACTORS = 100, 64
Scores = Float[np.ndarray, "Q I"]


def popularity(dataset: Dataset, queries: Queries) -> Scores:
    """How many positives an item had."""
    counts = np.asarray(queries.past.sum(0)).ravel()
    return np.broadcast_to(counts, (len(queries), len(counts)))


def item_knn(dataset: Dataset, queries: Queries) -> Scores:
    """Cosine similarity of the members of two items, summed over a query's past positives."""
    from implicit.nearest_neighbours import CosineRecommender

    model = CosineRecommender(K=NEIGHBOURS)
    model.fit(queries.past, show_progress=False)
    return np.asarray((queries.history @ model.similarity).todense())


def als(dataset: Dataset, queries: Queries) -> Scores:
    """Alternating least squares (Hu, Koren and Volinsky 2008); a query's factors are solved from its past positives."""
    import threadpoolctl
    from implicit.als import AlternatingLeastSquares

    with threadpoolctl.threadpool_limits(1, "blas"):  # implicit has threads of its own
        model = AlternatingLeastSquares(factors=FACTORS, random_state=0)
        model.fit(queries.past, show_progress=False)
        factors = model.recalculate_user(np.arange(len(queries)), queries.history)
    return np.asarray(factors) @ np.asarray(model.item_factors).T


def bm25(dataset: Dataset, queries: Queries) -> Scores:
    """BM25 of an item's textual attributes, for the texts of a query's past positives."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    texts = item_texts(dataset)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    scores = np.zeros((len(queries), len(texts)), np.float32)
    for query in range(len(queries)):
        joined = " ".join(texts[item] for item in queries.history[query].indices)
        (words,) = bm25s.tokenize([joined], stopwords="en", return_ids=False, show_progress=False)
        if words:
            scores[query] = index.get_scores(words)
    return scores


BASELINES: dict[str, Callable[[Dataset, Queries], Scores]] = {
    "popularity": popularity,
    "item-kNN": item_knn,
    "ALS": als,
    "BM25": bm25,
}


def item_texts(dataset: Dataset) -> list[str]:
    """The textual attributes of each item, joined by spaces."""
    columns = [
        dataset.items[attribute.column].to_pylist()
        for attribute in dataset.card.items.attributes
        if attribute.kind in ("text", "category", "list")
    ]
    texts = []
    for values in zip(*columns, strict=True):
        words = [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values if value]
        texts.append(" ".join(words))
    return texts or [""] * len(dataset.items)
