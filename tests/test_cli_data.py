"""`brewjax data init`, `check --task` and `facts`, through the command line."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.task import Task
from brewjax.evaluate.fact_search import propose_facts, write_facts
from tests.command_line import shown
from tests.data.conftest import Event, jobs, jobs_with  # noqa: F401
from tests.tables import write_dataset

TASK = """\
name: apply
instruction: Predict.
history: {actions: [viewed, applied]}
questions: {question: Will they apply, actions: [viewed], outcomes: [applied], window_days: 7}
labels: [{word: "Yes", value: 1, match: {action: applied}}, {word: "No", value: 0}]
"""


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_card_is_guessed_from_tables_alone(tmp_path, monkeypatch, capsys, suffix):
    folder = write_dataset(tmp_path / "jobs")
    written = Card.load(folder / CARD)
    (folder / CARD).unlink()
    if suffix == "csv":
        for path in list(folder.glob("*.parquet")):
            table = pq.read_table(path)
            pyarrow.csv.write_csv(table.drop_columns(["skills"]) if "skills" in table.column_names else table,
                                  path.with_suffix(".csv"))  # fmt: skip
            path.unlink()
    assert "one value for each row" in " ".join(shown(monkeypatch, capsys, "data", "init", folder).split())
    guessed = Card.load(folder / CARD)
    assert (guessed.members.id, guessed.items.id) == (written.members.id, written.items.id)
    assert {*guessed.events.actions} == {*written.events.actions}
    assert {a.column for a in guessed.members.attributes} == {a.column for a in written.members.attributes}
    assert next(a.kind for a in guessed.items.attributes if a.column == "posted") == "date"
    dataset = Dataset.load(folder)
    assert (len(dataset.members), len(dataset.items), len(dataset.events)) == (8, 40, 80)


def test_a_card_is_never_overwritten(tmp_path, refuse):
    folder = write_dataset(tmp_path / "jobs")
    assert "it is there already" in refuse("data", "init", folder)


def test_a_folder_without_events_says_what_is_missing(tmp_path, refuse):
    folder = write_dataset(tmp_path / "jobs")
    (folder / CARD).unlink()
    (folder / "events.parquet").unlink()
    assert "no file that looks like events" in refuse("data", "init", folder)


def test_check_shows_what_a_task_asks_and_what_is_suspicious(tmp_path, monkeypatch, capsys):
    folder = write_dataset(tmp_path / "jobs")
    (tmp_path / "apply.yaml").write_text(TASK)
    text = shown(monkeypatch, capsys, "data", "check", folder, "--task", tmp_path / "apply.yaml")
    assert "questions" in text
    assert "gap, days" in text
    assert "suspicious: test: " in text, "so few questions say little"


def test_contradicting_questions_are_suspicious(tmp_path, monkeypatch, capsys):
    """The README's task as it once was: a view says No, and the application after it Yes."""
    contradiction = TASK.replace("outcomes: [applied], window_days: 7", "window_days: 0.001").replace(
        "actions: [viewed],", "actions: [viewed, applied],"
    ).replace('value: 0}', 'value: 0, match: {action: viewed}}')  # fmt: skip

    def viewed_then_applied(table):
        later = table.set_column(table.column_names.index("action"), "action", [["applied"] * len(table)])
        times = pyarrow.compute.add(table["time"], pyarrow.scalar(3_600_000_000, pyarrow.duration("us")))
        later = later.set_column(table.column_names.index("time"), "time", times)
        views = table.set_column(table.column_names.index("action"), "action", [["viewed"] * len(table)])
        return pyarrow.concat_tables([views, later])

    folder = write_dataset(tmp_path / "jobs", events=viewed_then_applied)
    for text, suspicious in ((contradiction, True), (TASK, False)):
        (tmp_path / "apply.yaml").write_text(text)
        printed = shown(monkeypatch, capsys, "data", "check", folder, "--task", tmp_path / "apply.yaml")
        assert ("repeat an earlier one" in printed) == suspicious


def test_the_fact_that_matters_is_proposed_and_written(jobs_with, tmp_path):  # noqa: F811
    """Members apply again and again to jobs of one company, another one for each member."""
    companies = ["Acme", "Globex", "Initech", "Umbrella"]
    events, rng = [], np.random.default_rng(0)
    for step in range(800):
        member, item = step % 8, int(rng.integers(40))
        liked = companies[item // 4 % 4] == companies[member % 4]
        events.append(Event(member, item, "applied" if liked else "viewed", step / 4))
    dataset = jobs_with(events)
    task = Task.parse(
        TASK.replace("actions: [viewed], outcomes: [applied], window_days: 7", "actions: [viewed, applied]").replace(
            "value: 0}", "value: 0, match: {action: viewed}}"
        )
    )
    gains = propose_facts(dataset, task, max_facts=3)
    assert gains[0].fact.by == "company"
    assert gains[0].gauc > 0.2
    folder = write_dataset(tmp_path / "jobs")
    write_facts(folder, gains)
    card = Card.load(folder / CARD)
    assert [fact.name for _, fact in card.facts.declared()].count(gains[0].fact.name) == 1
    assert yaml.safe_load((folder / CARD).read_text())["items"]["noun"] == "job", "the rest of the card stays"


def test_what_answers_are_read_from_is_tried_as_a_fact(jobs_with):  # noqa: F811
    """Some jobs are always looked at for long, whoever looks; the card says nothing of seconds."""
    rng = np.random.default_rng(0)
    items = rng.integers(40, size=800)
    dataset = jobs_with(
        [Event(step % 8, int(item), "viewed", step / 4, 60.0 * (item % 2)) for step, item in enumerate(items)]
    )
    events = dataset.card.events.model_copy(update={"attributes": ()})
    dataset = dataclasses.replace(dataset, card=dataset.card.model_copy(update={"events": events}))
    task = Task.parse(
        TASK.replace("outcomes: [applied], window_days: 7", "repeats: true")
        .replace("match: {action: applied}", "match: {seconds: {above: 30}}")
        .replace("value: 0}", "value: 0, match: {seconds: {max: 30}}}")
    )
    gains = propose_facts(dataset, task, max_facts=1)
    assert [(gain.group, gain.fact.mean) for gain in gains] == [("items", "seconds")]
    assert gains[0].gauc > 0.2
