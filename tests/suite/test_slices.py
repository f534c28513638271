"""Slices of the leaderboard, notes that are followed or not, and counts, with predictors whose figures are known."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from brewjax.data.simulate.network import simulate_network
from brewjax.data.simulate.truth import oracle
from brewjax.paths import CONFIGS
from brewjax.suite.board import HEADLINE, make_board
from brewjax.suite.page import print_difference, write_page
from brewjax.suite.predictors import POPULARITY
from brewjax.suite.runs import predictions_folder, run
from brewjax.suite.slices import COLD, MONTHS, NEW, slice_masks
from brewjax.suite.suite import Suite
from tests.suite.conftest import SUITE, Fake, noisy, right

DAY = 24 * 3600 * 1_000_000


def right_if(condition) -> Fake:
    """Is right about questions of (example) that fulfil the condition, and wrong about the others."""
    return Fake("half", lambda example: np.where(condition(example), right(example), 1 - right(example)))


@pytest.fixture
def long_suite(suite, tmp_path) -> Suite:
    """The suite over 250 days, 150 of them of training; nobody had the first twenty films then."""
    shutil.copytree("ratings", tmp_path / "copy")
    path = tmp_path / "copy" / "events.parquet"
    events = pq.read_table(path)
    time = events["time"].cast(pa.int64()).to_numpy()
    time = time.min() + 10 * (time - time.min())
    days = (time - time.min()) / DAY
    events = events.set_column(events.schema.names.index("time"), "time", pa.array(time).cast(events["time"].type))
    pq.write_table(events.filter(pa.array((events["item_id"].to_numpy() >= 20) | (days >= 150))), path)
    (tmp_path / "ratings").unlink()
    (tmp_path / "copy").rename(tmp_path / "ratings")
    for name in ("liked", "watched"):
        (tmp_path / f"{name}.yaml").write_text(
            (tmp_path / f"{name}.yaml").read_text().replace("60%", '"2025-05-31"').replace("80%", '"2025-07-10"')
        )
    return suite


def test_new_items_are_a_slice(long_suite):
    run(long_suite, "quick", [right_if(lambda example: example.candidates < 20)], ["films"])
    (row,) = make_board(long_suite, "quick").rows
    for task in ("films/liked", "films/watched"):
        assert row.slices[NEW, task, "new"].value == 1
        assert row.slices[NEW, task, "known"].value == 0
        assert 0 < row.tasks[task][HEADLINE].value < 1


def test_months_after_training_are_slices(long_suite):
    end = np.datetime64("2025-05-31", "us").astype(int)
    run(long_suite, "quick", [right_if(lambda example: example.cutoff_time < end + 60 * DAY)], ["films"])
    board = make_board(long_suite, "quick")
    (row,) = board.rows
    values = {
        name: each.value for (kind, task, name), each in row.slices.items() if (kind, task) == (MONTHS, "films/liked")
    }
    assert values == {"1 to 2": 1, "2 to 3": 0}
    assert "<h2>months after training</h2>" in write_page(board).read_text()


def test_months_from_the_third_on_are_one_slice_and_what_divides_nothing_is_none():
    masks = slice_masks(pa.table({NEW: [False] * 4, MONTHS: [0, 3, 7, 1]}))
    assert {name: mask.tolist() for (_, name), mask in masks.items()} == {
        "0 to 1": [True, False, False, False],
        "1 to 2": [False, False, False, True],
        "3 or more": [False, True, True, False],
    }


def test_tables_that_no_slice_divides_have_none(suite):
    run(suite, "quick", [Fake("right", right)])
    (row,) = make_board(suite, "quick").rows
    assert {key[:2] for key in row.slices} == {(COLD, "films/liked")}


def test_a_cold_start_is_read_beside_all_events(suite):
    run(
        suite,
        "quick",
        [Fake("past", lambda example: right(example) if example.num_past_events else 1 - right(example))],
    )
    (row,) = make_board(suite, "quick").rows
    values = {name: each.value for (_, _, name), each in row.slices.items()}
    assert values == {"0 past events": 0, "3 past events": 1, "all past events": 1}


class Reader(Fake):
    """Answers with the truth under a note that depends on whether the task states its own."""

    def __init__(self, name: str, stated: str, otherwise: str):
        super().__init__(name, right)
        self.notes = stated, otherwise

    def predict(self, dataset, task, examples, visible):
        truth = oracle(visible, task, examples, self.notes[0 if task.steering_note else 1])
        return truth, {"seconds": 1.0, "tokens": 0}


def test_notes_are_followed_or_not(suite, tmp_path):
    simulate_network(tmp_path / "network", 300, months=2)
    for name in ("applies", "applies_location"):
        text = (CONFIGS / "tasks" / "network" / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace("80%", "30%").replace("90%", "50%"))
    tasks = "[{file: applies.yaml, tier: T3}, {file: applies_location.yaml, tier: T3}]"
    surface = f"  jobs: {{dataset: network/jobs, domain: network, tasks: {tasks}}}\n"
    suite = Suite.parse(SUITE.replace("questions: 40, lists: 8", "questions: 150, lists: 25") + surface, "suite.yaml")
    readers = {"follows": ("location", "none"), "ignores": ("none", "none"), "defies": ("none", "location")}
    run(suite, "quick", [Reader(name, *notes) for name, notes in readers.items()], ["jobs"])
    before = len([*predictions_folder(suite, "quick").glob("*.parquet")])
    baseline = Fake("baseline", noisy(0.5))
    baseline.folder = None
    run(suite, "quick", [baseline], ["jobs"])
    assert len([*predictions_folder(suite, "quick").glob("*.parquet")]) == before + 2, "no baseline reads notes"
    board = make_board(suite, "quick")
    followed = {row.name: {name: each.value for name, each in row.notes.items()} for row in board.rows}
    assert followed["ignores"] == {"jobs/applies_location": 0.5}, "a task without a note has none to follow"
    assert followed["follows"]["jobs/applies_location"] > 0.99 > 0.01 > followed["defies"]["jobs/applies_location"]
    assert followed["baseline"] == {}
    assert "<h2>notes followed</h2>" in write_page(board).read_text()


def test_tasks_above_popularity_and_above_chance_are_counted(suite):
    constant = Fake(POPULARITY, lambda example: np.full(len(example.candidates), 0.5))
    run(suite, "quick", [constant, Fake("right", right), Fake("wrong", lambda example: 1 - right(example))])
    run(suite, "quick", [Fake("random", noisy(1.0, 1)), Fake("part", right)], ["films"])
    board = make_board(suite, "quick")
    counts = {row.name: [board.counts(row, tier) for tier in ("T1", "T3")] for row in board.rows}
    assert counts["right"] == [(2, 2, 2), (1, 1, 1)]
    assert counts["wrong"] == counts[POPULARITY] == [(2, 0, 0), (1, 0, 0)]
    assert counts["part"] == [(2, 2, 2), (0, 0, 0)]
    assert counts["random"][0][2] == 0, "whatever is within the interval is not above chance"
    console = Console(file=io.StringIO(), width=200)
    print_difference(board, board.row("right"), board.row("wrong"), 0, console)
    assert [console.file.getvalue().count(f"{count} of 2") for count in (2, 0)] == [2, 2]
    assert "<h2>number of tasks</h2>" in write_page(board).read_text()
