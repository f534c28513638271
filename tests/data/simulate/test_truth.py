"""The oracle: its probabilities are those of the answers, nothing beats it, and notes and twins change it rightly."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.simulate.network import simulate_network
from brewjax.data.simulate.truth import load_world, oracle
from brewjax.data.simulate.twins import SAME, twin_examples
from brewjax.data.simulate.utility import ACTIONS, NOTES
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import sample_examples
from brewjax.data.tasks.task import TimeSplit, load_tasks
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.evaluate.baselines import ORACLE, popularity, predict_baselines
from brewjax.evaluate.metrics import auc
from brewjax.evaluate.regression import FactRegression
from brewjax.paths import CONFIGS

TASKS = CONFIGS / "tasks" / "network"
SURFACE = {"applied": "jobs", "saved": "jobs", "clicked": "posts", "liked": "posts"}


@pytest.fixture(scope="module")
def answers(surfaces):
    """By action, for every exposure that it may follow: its utility, and whether it followed."""

    def read(action: str) -> tuple[np.ndarray, np.ndarray]:
        dataset = surfaces[SURFACE.get(action, "people")]
        truth = pq.read_table(dataset.path / "truth.parquet")
        events = dataset.events.filter(dataset.has_action([action]))
        size = len(dataset.items)
        followed = np.isin(*(t["request"].to_numpy() * size + t["item_id"].to_numpy() for t in (truth, events)))
        utility = truth[action].to_numpy().astype(np.float64)
        possible = ~np.isnan(utility)
        assert not followed[~possible].any()
        return utility[possible], followed[possible]

    return {action: read(action) for action in ACTIONS}


def losses(probability: np.ndarray, yes: np.ndarray) -> np.ndarray:
    clipped = np.clip(probability, 1e-9, 1 - 1e-9)
    return -np.log(np.where(yes, clipped, 1 - clipped))


def questions(dataset, name: str, split, max_examples: int | None = None):
    """The task, its examples, and which answers are yes."""
    (task,) = load_tasks([TASKS / f"{name}.yaml"], dataset)
    examples = sample_examples(dataset, task, split, max_examples)
    return task, examples, np.concatenate([example.labels for example in examples]) == 0


@pytest.mark.parametrize("action", ACTIONS)
def test_actions_are_drawn_with_the_probabilities_of_the_truth(answers, action):
    """Overall and in each tenth of the probabilities, they are within four standard errors."""
    utility, yes = answers[action]
    truth = expit(utility)
    for rows in [np.arange(len(yes)), *np.array_split(np.argsort(truth, kind="stable"), 10)]:
        error = np.sqrt((truth[rows] * (1 - truth[rows])).sum())
        assert abs(yes[rows].sum() - truth[rows].sum()) < 4 * error


@pytest.mark.parametrize("action", ACTIONS)
@given(noise=st.floats(0.05, 3), scale=st.floats(0.2, 3), shift=st.floats(-1, 1), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_no_distortion_of_the_oracle_beats_it(answers, action, noise, scale, shift, seed):
    """Neither a noisy oracle nor one that is too sure, or too hopeful; beyond three standard errors of the answers."""
    utility, yes = answers[action]
    noisy = utility * scale + shift + noise * np.random.default_rng(seed).normal(size=len(utility))
    difference = losses(expit(noisy), yes) - losses(expit(utility), yes)
    assert difference.mean() > -3 * difference.std() / np.sqrt(len(yes))
    assert auc_of(noisy, yes) < auc_of(utility, yes) + 0.005


def auc_of(scores: np.ndarray, yes: np.ndarray) -> float:
    return auc(scores, yes.astype(float), np.ones(len(yes)))


def test_the_oracle_of_a_task_is_the_truth_of_its_questions(surfaces):
    dataset = surfaces["posts"]
    task, examples, yes = questions(dataset, "clicks_post", "test", 300)
    truth = oracle(dataset, task, examples)
    assert truth.sum(axis=1) == pytest.approx(1)
    table = pq.read_table(dataset.path / "truth.parquet").to_pylist()
    by_exposure = {(row["request"], row["item_id"]): row["clicked"] for row in table}
    row = 0
    for example in examples:
        for event in example.exposures:
            key = dataset.events["request"][int(event)].as_py(), dataset.events["item_id"][int(event)].as_py()
            assert truth[row, 0] == pytest.approx(expit(by_exposure[key]))
            row += 1
    assert auc_of(truth[:, 0], yes) > 0.8


def test_the_oracle_of_the_union_is_that_of_its_surfaces(network, surfaces):
    split = TimeSplit(validation="2025-06-01", test="2025-07-01")
    known = []
    for dataset, file in ((surfaces["jobs"], "applies.yaml"), (Dataset.load(network), "union/applies.yaml")):
        task = load_tasks([TASKS / file], dataset)[0].model_copy(update={"split": split})
        examples = sample_examples(dataset, task, "test")
        events = np.concatenate([example.exposures for example in examples])
        ids = zip(*(dataset.events[key].take(events).to_pylist() for key in ("request", "item_id")), strict=True)
        plain = [tuple(int(str(each).removeprefix("jobs.")) for each in pair) for pair in ids]
        known.append(dict(zip(plain, oracle(dataset, task, examples).tolist(), strict=True)))
    assert len(known[0]) > 100
    assert known[0] == known[1]


@pytest.mark.parametrize(("surface", "name"), [("jobs", "applies"), ("people", "accepts")])
def test_no_baseline_beats_the_oracle_and_facts_beat_popularity(surfaces, surface, name):
    dataset = surfaces[surface]
    task, train, _ = questions(dataset, name, "train", 2_000)
    _, test, yes = questions(dataset, name, "test")
    scales = Scales.fit(dataset, task.boundaries(dataset)[0])
    regression = FactRegression.fit(dataset, task, train, scales).predict(dataset, task, test)
    scores = [popularity(dataset, task, train, test), regression, oracle(dataset, task, test)]
    losses_in_order = [losses(score[:, 0], yes).mean() for score in scores]
    aucs = [auc_of(score[:, 0], yes) for score in scores]
    assert losses_in_order[0] > losses_in_order[1] > losses_in_order[2]
    assert aucs[0] < aucs[1] < aucs[2] - 0.03, "there is room between the floor and the oracle"
    assert aucs[0] > 0.52


def test_the_oracle_stands_beside_the_baselines(tmp_path):
    dataset = Dataset.load(simulate_network(tmp_path / "small", 150) / "jobs")
    (task,) = load_tasks([TASKS / "applies.yaml"], dataset)
    examples = sample_examples(dataset, task, "test", 50)
    tables = predict_baselines(dataset, task, examples)
    assert list(tables)[-1] == ORACLE
    expected = oracle(dataset, task, examples)[:, 0].astype(np.float32)
    assert [row[0] for row in tables[ORACLE]["probabilities"].to_pylist()] == expected.tolist()


def test_there_is_no_oracle_without_truth_or_for_what_it_does_not_know(surfaces, tmp_path):
    dataset = surfaces["jobs"]
    (task,) = load_tasks([TASKS / "applies.yaml"], dataset)
    examples = sample_examples(dataset, task, "test", 3)
    copy = shutil.copytree(dataset.path, tmp_path / "jobs")
    (copy / "truth.parquet").unlink()
    assert oracle(Dataset.load(copy), task, examples) is None
    with pytest.raises(ValueError, match="not of a simulated network"):
        load_world(copy)
    shutil.copy(dataset.path.parent / "people" / "truth.parquet", copy / "truth.parquet")
    assert oracle(Dataset.load(copy), task, examples) is None, "people are not applied to"
    truth = pq.read_table(dataset.path / "truth.parquet")
    pq.write_table(truth.slice(0, 10), copy / "truth.parquet")
    with pytest.raises(ValueError, match="of another network"):
        oracle(Dataset.load(copy), task, examples)


@pytest.mark.parametrize("note", NOTES[1:])
def test_what_members_do_follows_their_note(surfaces, note):
    """The truth of a noted task is that under its note, and the answers are likelier under it than without."""
    dataset = surfaces["jobs"]
    task, examples, yes = questions(dataset, f"applies_{note}", "train")
    noted, plain = (oracle(dataset, task, examples, name)[:, 0] for name in (note, "none"))
    assert noted.tolist() == oracle(dataset, task, examples)[:, 0].tolist()
    difference = losses(plain, yes) - losses(noted, yes)
    assert difference.mean() > 3 * difference.std() / np.sqrt(len(yes))


def test_a_note_on_location_brings_the_member_nearer(surfaces):
    """Under the note, jobs in the member's city gain against the others in the same lists."""
    dataset = surfaces["jobs"]
    task, examples, _ = questions(dataset, "applies", "train", 500)
    near = np.concatenate(
        [
            np.array(dataset.items["city"].take(example.candidates)) == dataset.members["city"][example.member].as_py()
            for example in examples
        ]
    )
    noted, plain = (logit(oracle(dataset, task, examples, note)[:, 0]) for note in ("location", "none"))
    gain = np.clip(noted, -20, 20) - np.clip(plain, -20, 20)
    assert gain[near].mean() > gain[~near].mean() + 0.5


def test_twins_are_alike_but_for_one_attribute_and_ordered_by_utility(surfaces):
    dataset = surfaces["jobs"]
    (task,) = load_tasks([TASKS / "applies.yaml"], dataset)
    extended, examples, twins = twin_examples(dataset, task, range(40))
    tokenizer = Tokenizer.train(["a"], words=["Yes", "No"], vocab_size=300)
    verbalizer = Verbalizer(extended, Scales.fit(dataset, task.boundaries(dataset)[0]), tokenizer, 60_000)
    questions = [verbalizer.prompt(task, example, "sectioned").questions for example in examples]
    differing = {"location": {"Location", "Country"}, "level": {"Seniority", "Salary"}, "field": {"Title", "Field"},
                 "skills": {"Description"}, "pay": {"Salary"}, SAME: set()}  # fmt: skip
    assert {pair.attribute for pair in twins} == {*differing}
    names = {attribute.name for attribute in dataset.card.items.attributes}  # facts of pairs follow the attributes
    for pair in twins:
        better, worse = (questions[pair.example][place].text for place in (pair.better, pair.worse))
        lines = [dict(part.split(": ", 1) for part in split_attributes(text)) for text in (better, worse)]
        changed = {name for name in lines[0] if name in names and lines[0][name] != lines[1][name]}
        assert changed <= differing[pair.attribute]
        assert (pair.utility == 0) if pair.attribute == SAME else (changed and pair.utility > 0)


def split_attributes(question: str) -> list[str]:
    """ "[Title: Cook, City: Rome]" as "Title: Cook", "City: Rome": names begin with a capital letter."""
    return re.split(r", (?=[A-Z][a-z ]+: )", question.split("[", 1)[1].rsplit("]", 1)[0])
