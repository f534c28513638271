"""What retrieval is judged on: queries as of their moment, recall by its definition, and the baselines."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from brewjax.cli_retrieve import app
from brewjax.retrieve import baselines
from brewjax.retrieve.baselines import BASELINES
from brewjax.retrieve.evaluation import evaluate_retrieval, rank, recall_at
from brewjax.retrieve.queries import select_queries
from tests.data.conftest import Event, moment


@pytest.fixture(scope="module")
def dataset(jobs_with):
    """Members 0 to 3 went on to items 0 and 1 together, 4 and 5 to items 2 and 3; then 6 to item 0, and later to 1."""
    past = [
        Event(member, item, "applied", day + member + item / 10, 1.0)
        for day, member, items in ((0, m, (0, 1) if m < 4 else (2, 3)) for m in range(6))
        for item in items
    ]
    return jobs_with([*past, Event(6, 0, "applied", 20, 1.0), Event(6, 1, "applied", 30, 1.0)], items=8)


@pytest.fixture(scope="module")
def queries(dataset, task):
    task = task.model_copy(update={"split": type(task.split)(validation="2025-01-20", test="2025-01-25")})
    return select_queries(dataset, task)


def test_queries_know_nothing_later(queries):
    (example,) = queries.examples
    assert (example.member, example.cutoff_time, queries.time) == (6, moment(30), moment(24))
    assert [items.tolist() for items in queries.positives] == [[1]]
    assert [items.tolist() for items in queries.excluded] == [[0]]
    assert queries.history.toarray().tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    assert queries.past.sum(0).astype(int).tolist() == [[5, 4, 2, 2, 0, 0, 0, 0]]
    assert queries.num_past_events.tolist() == [1]


@pytest.mark.parametrize("name", BASELINES)
def test_each_baseline_finds_what_it_should(dataset, queries, name, monkeypatch):
    monkeypatch.setattr(baselines, "FACTORS", 2)  # fewer than items
    scores = BASELINES[name](dataset, queries)
    assert scores.shape == (1, 8)
    (items,) = rank(scores, queries.excluded, 8)
    assert 0 not in items  # seen
    if name == "BM25":  # by its words: the other job of the same title and company
        assert dataset.item_name(items[0]).split()[0] == dataset.item_name(0).split()[0]
    else:
        assert items[0] == 1


def test_recall_is_the_share_of_positives_among_the_first():
    ranked = [np.array([5, 3, 1, 2]), np.array([0, 1])]
    positives = [np.array([1, 5, 9]), np.array([7])]
    np.testing.assert_allclose(recall_at(ranked, positives, 3), [2 / 3, 0])
    np.testing.assert_allclose(recall_at(ranked, positives, 1), [1 / 3, 0])


def test_equal_scores_come_in_the_order_of_rows():
    assert [x.tolist() for x in rank(np.zeros((1, 5)), [np.array([1])], 3)] == [[0, 2, 3]]


def test_the_whole_catalogue_holds_every_positive(make_encoder, jobs):
    rows = evaluate_retrieval(make_encoder(), jobs, (5, 2000), bootstrap=20)
    assert {row.method for row in rows} == {"encoder", *BASELINES}
    everyone = [row for row in rows if row.past_events == "all"]
    assert all(row.recall == 1 and row.lead == 0 for row in everyone if row.k == 2000)
    assert any(0 <= row.recall < 1 for row in everyone if row.k == 5)
    sizes = {row.past_events: row.queries for row in rows}
    assert sum(sizes.values()) == 2 * sizes["all"]


def test_by_the_command_line(make_encoder, jobs, tmp_path):
    make_encoder().save(tmp_path / "model")

    def retrieve(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    output = retrieve("evaluate", tmp_path / "model", jobs.path, "--k", "5,40").output
    for word in ("Recall@5", "Recall@40", "item-kNN", "ALS", "BM25", "popularity", "encoder"):
        assert word in output
    assert "expected whole numbers above 0" in str(retrieve("evaluate", "m", "d", "--k", "5,x").exception)
    table = tmp_path / "items.parquet"
    assert (
        "40 vectors of 8 dimensions"
        in retrieve("embed", tmp_path / "model", jobs.path, table, "--dimensions", 8).output
    )
    assert "8 vectors of 16" in retrieve("embed", tmp_path / "model", jobs.path, table, "--side", "members").output
