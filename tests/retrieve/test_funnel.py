"""Retrieve, then rank, against ranking the whole catalogue."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from typer.testing import CliRunner

from brewjax.cli_retrieve import app
from brewjax.evaluate.funnel import evaluate_funnel
from brewjax.evaluate.ranking import rank
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.evaluation import search_catalogue
from brewjax.retrieve.queries import select_queries


@pytest.fixture(scope="module")
def encoder(make_encoder) -> Encoder:
    return make_encoder()


def test_the_ranker_orders_what_is_retrieved_and_nothing_else(encoder, jobs):
    """Each row by its definition: the gain of what is relevant among the first ten that are left."""
    ranker = encoder.bundle  # whose scores are not the order in which it retrieves
    rows = {row.method: row for row in evaluate_funnel(encoder, ranker, jobs, (10, 12, 40), bootstrap=20)}
    queries = select_queries(jobs, encoder.task)
    nearest_items = search_catalogue(encoder, jobs, queries, 40)
    verbalizer = ranker.verbalizer(jobs, encoder.task)
    expected = {10: [], 12: [], 40: []}
    for example, positives, nearest in zip(queries.examples, queries.positives, nearest_items, strict=True):
        unknown = np.full(len(nearest), -1)
        question = dataclasses.replace(example, candidates=nearest, labels=unknown, exposures=unknown)
        ranking = rank(ranker, verbalizer, encoder.task, question)
        for k, qualities in expected.items():
            order = np.argsort(-(ranking.probabilities[:k] @ encoder.task.values), kind="stable")
            gains = np.isin(nearest[order], positives) / np.log2(np.arange(2, len(order) + 2))
            ideal = 1 / np.log2(np.arange(2, len(positives) + 2))
            qualities.append(gains[:10].sum() / ideal[:10].sum())
    for k, qualities in expected.items():
        assert rows[f"retrieve {k}, then rank"].ndcg == pytest.approx(np.mean(qualities), abs=1e-6)
    assert rows["retrieve 40, then rank"].ndcg == rows["rank everything"].ndcg
    assert rows["retrieve 40, then rank"].lead == rows["rank everything"].lead == 0
    assert rows["retrieve 10, then rank"].ranked == 10 < rows["rank everything"].ranked <= 40
    assert rows["retrieve alone"].ranked == 0
    assert len({rows[name].ndcg for name in ("rank everything", "retrieve alone", "retrieve 10, then rank")}) == 3


def test_by_the_command_line(encoder, jobs, tmp_path):
    encoder.save(tmp_path / "encoder")
    encoder.bundle.save(tmp_path / "ranker")
    arguments = ["evaluate", tmp_path / "encoder", jobs.path, "--k", "10", "--ranker", tmp_path / "ranker"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    for words in ("retrieve 10, then rank", "NDCG@10"):
        assert words in result.output
