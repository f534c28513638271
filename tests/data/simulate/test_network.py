"""What is written: the same bytes from the same seed, the shares that are asked for, and tasks that are clean."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.simulate.network import SURFACES, simulate_network
from brewjax.data.simulate.utility import ACTIONS, NOTE_SHARE, NOTES
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import DAY
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import build_examples, sample_examples
from brewjax.data.tasks.questions import find_questions
from brewjax.data.tasks.task import Task, load_tasks
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.evaluate.task_check import summarize_splits, suspicions
from brewjax.paths import CONFIGS
from tests.command_line import shown
from tests.data.simulate.conftest import MEMBERS, MONTHS, SEED

TASKS = sorted((CONFIGS / "tasks" / "network").glob("*.yaml"))
FILES = ("members.parquet", "items.parquet", "events.parquet", "truth.parquet", "dataset.yaml")


def surface_of(path: Path) -> str:
    action = Task.load(path).questions.outcomes[0]
    return {"applied": "jobs", "saved": "jobs", "clicked": "posts"}.get(action, "people")


def contents(folder: Path) -> dict[str, bytes]:
    return {f"{name}/{file}": (folder / name / file).read_bytes() for name in SURFACES for file in FILES}


def test_the_same_seed_gives_the_same_bytes_whatever_the_block(tmp_path):
    first = contents(simulate_network(tmp_path / "first", 200, seed=1, months=2))
    assert contents(simulate_network(tmp_path / "again", 200, seed=1, months=2, block=50)) == first
    reseeded = contents(simulate_network(tmp_path / "other", 200, seed=2, months=2))
    assert all(reseeded[name] != first[name] for name in first)


def test_a_network_is_complete_or_absent(tmp_path, refuse, monkeypatch, capsys):
    assert "give at least 100" in refuse("data", "simulate", "network", tmp_path / "few", "--members", 3)
    assert "did you mean 'network'" in refuse("data", "simulate", "netwrok", tmp_path / "few")
    shown(monkeypatch, capsys, "data", "simulate", "network", tmp_path / "new", "--members", 100, "--months", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert "exists" in refuse("data", "simulate", "network", tmp_path / "new", "--members", 100)


def test_members_are_those_of_all_surfaces(surfaces):
    first = surfaces["jobs"].members
    assert len(first) == MEMBERS
    for name in ("posts", "people"):
        assert surfaces[name].members.select(first.column_names).equals(first)


@pytest.mark.parametrize("action", ACTIONS)
def test_actions_follow_as_often_as_they_should(surfaces, action):
    """Members differ in how much they act, and a few act most: the mean of 1,200 is within a fifth."""
    name = {"applied": "jobs", "saved": "jobs", "clicked": "posts", "liked": "posts"}.get(action, "people")
    truth = pq.read_table(surfaces[name].path / "truth.parquet", columns=[action])[action]
    possible = np.count_nonzero(~np.isnan(truth.to_numpy()))
    followed = np.count_nonzero(surfaces[name].has_action([action]))
    assert followed / possible == pytest.approx(ACTIONS[action].share, rel=0.2)


def test_events_are_even_over_the_months_as_members_join(surfaces):
    """A quarter of the members joins during the first nine tenths of the period, so the months grow by so much."""
    times = surfaces["posts"].event_time
    months = (times - times.min()) / DAY / 30.4375
    counts = np.histogram(months, bins=np.arange(MONTHS + 1))[0]
    assert counts.min() > 0.65 * counts.max()
    assert counts[-1] > counts[0]


def test_every_note_stands_over_its_share_of_requests(surfaces):
    events = surfaces["jobs"].events
    notes = events.group_by("request").aggregate([("note", "min"), ("note", "max")])
    assert notes["note_min"].equals(notes["note_max"]), "a request has one note"
    for note in NOTES[1:]:
        share = pc.mean(pc.equal(notes["note_min"], note).cast("float64")).as_py()
        assert share == pytest.approx(NOTE_SHARE, abs=0.015)


@pytest.mark.parametrize("name", SURFACES)
def test_nothing_happens_before_its_item_or_member_exists(surfaces, name):
    dataset = surfaces[name]
    for begins, ends, rows in (
        (*dataset.item_life, dataset.event_item),
        (*dataset.member_life, dataset.event_member),
    ):
        assert (begins[rows] <= dataset.event_time).all()
        assert (dataset.event_time < ends[rows]).all()


@pytest.mark.parametrize("name", SURFACES)
def test_an_item_is_shown_to_a_member_once_in_a_request(surfaces, name):
    dataset = surfaces[name]
    exposures = np.flatnonzero(dataset.has_action(["viewed", "shown", "invited"]))
    triples = np.stack([dataset.event_member, dataset.event_item, dataset.event_action])[:, exposures]
    assert len(np.unique(triples, axis=1).T) == len(exposures)
    assert (dataset.event_request >= 0).all()


def test_nobody_is_suggested_to_themselves_or_to_whom_they_know(surfaces):
    dataset = surfaces["people"]
    assert not pc.any(pc.equal(dataset.events["member_id"], dataset.events["item_id"])).as_py()
    assert pc.max(dataset.events["mutual_connections"]).as_py() > 3


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_every_task_is_clean(surfaces, path):
    dataset = surfaces[surface_of(path)]
    (task,) = load_tasks([path], dataset)
    summaries = summarize_splits(dataset, task)
    assert [summary.split for summary in summaries] == ["train", "validation", "test"]
    assert [line for line in suspicions(dataset, task, summaries) if "say little" not in line] == []
    assert all(0.02 < summary.label_shares[0] < 0.8 for summary in summaries)


def test_the_tasks_of_the_union_are_clean_and_read_one_history(network):
    union = Dataset.load(network)
    tasks = load_tasks(sorted((CONFIGS / "tasks" / "network" / "union").glob("*.yaml")), union)
    assert len(tasks) == len(SURFACES)
    for task in tasks:
        summaries = summarize_splits(union, task)
        assert [line for line in suspicions(union, task, summaries) if "say little" not in line] == []
        examples = sample_examples(union, task, "test", 50)
        items = {union.item_id(row).partition(".")[0] for example in examples for row in example.candidates}
        past = {union.action_name(row).partition(".")[0] for example in examples for row in example.history}
        assert items == {task.questions.actions[0].partition(".")[0]}
        assert past == set(SURFACES)


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_prompts_are_whole_sentences_of_whole_words(surfaces, path):
    dataset = surfaces[surface_of(path)]
    (task,) = load_tasks([path], dataset)
    tokenizer = Tokenizer.train(["a"], words=["Yes", "No"], vocab_size=300)
    verbalizer = Verbalizer(dataset, Scales.fit(dataset, task.boundaries(dataset)[0]), tokenizer, 30_000)
    for example in sample_examples(dataset, task, "test", 5):
        text = verbalizer.prompt(task, example, "sectioned").render()
        assert "## Member Profile\nCurrent position: " in text
        assert not re.search(r"\bNone\b|\bnan\b|\{|\}|  |\|", text)
        assert ("\nNote: Focus on " in text) == bool(task.steering_note)


def test_cold_start_and_requests_are_there_to_be_asked_about(surfaces):
    """Some members have no past yet, some hundreds of events; lists have several items, some of them taken."""
    dataset = surfaces["jobs"]
    (task,) = load_tasks([CONFIGS / "tasks" / "network" / "applies.yaml"], dataset)
    examples = list(build_examples(dataset, task, "train"))
    past = np.array([example.num_past_events for example in examples])
    assert (past == 0).mean() > 0.02
    assert (past > 100).mean() > 0.02
    assert np.mean([len(example.candidates) for example in examples]) > 3
    questions = find_questions(dataset, task)
    assert len(np.unique(dataset.event_request[questions.events])) > 1_000


def test_the_world_of_a_folder_is_found_again(network):
    from brewjax.data.simulate.truth import load_world

    world = load_world(network / "posts")
    assert (world.num_members, world.seed, world.months) == (MEMBERS, SEED, MONTHS)
    assert Dataset.load(network / "posts").members["city"][17].as_py()
