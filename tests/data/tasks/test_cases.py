"""Tables on which an earlier brewjax asked what it should not have, by the names of these cases."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset, write_tables
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import RankingExample, build_examples, example_at
from brewjax.data.tasks.task import Split, Task
from brewjax.data.text.tokenizer import Tokenizer

CARD_TEXT = """\
name: toy
items:
  noun: job
  plural: jobs
  attributes: [{column: title, kind: text}, {column: posted, kind: date}]
members: {attributes: []}
events: {actions: {viewed: {past: has viewed}, applied: {past: has applied to}}}
"""
APPLY = """\
name: apply
instruction: Predict whether they apply.
history: {{actions: [applied, viewed], max_events: 50}}
questions: {{question: Will the member apply to the following job, {asks}}}
labels:
  - {{word: "Yes", value: 1, match: {{action: applied}}}}
  - {{word: "No", value: 0, match: {{action: viewed}}}}
split: {{validation: {validation}, test: {test}}}
"""
VIEW = """\
name: view
instruction: Predict whether they view the job.
history: {actions: [viewed]}
questions:
  question: Will the member view the following job
  actions: [viewed]
  sampled_negatives: {label: "No", per_event: 4}
labels:
  - {word: "Yes", value: 1, match: {action: viewed}}
  - {word: "No", value: 0}
"""
BEGIN = datetime.datetime(2013, 1, 2)
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def load(folder: Path, posted: list[datetime.datetime], events: list[tuple[int, int, str, datetime.datetime]]):
    member, item, action, time = zip(*events, strict=True)
    write_tables(
        folder,
        members=pa.table({"member_id": sorted(set(member))}),
        items=pa.table(
            {
                "item_id": range(len(posted)),
                "title": [f"Job {n}" for n in range(len(posted))],
                "posted": pa.array(posted, pa.timestamp("us")),
            }
        ),
        events=pa.table(
            {
                "member_id": member,
                "item_id": item,
                "action": action,
                "time": pa.array(time, pa.timestamp("us")),
            }
        ),
    )
    (folder / CARD).write_text(CARD_TEXT)
    return Dataset.load(folder)


def rendered(dataset: Dataset, task: Task, examples: list[RankingExample]) -> str:
    scales = Scales.fit(dataset, task.boundaries(dataset)[0])
    verbalizer = Verbalizer(dataset, scales, Tokenizer.byte_level(), 50_000)
    return "".join(verbalizer.prompt(task, example, "sectioned").render() for example in examples)


@pytest.mark.parametrize("asks", ["actions: [viewed, applied]", "actions: [viewed], outcomes: [applied]"])
def test_readme_view_then_apply(tmp_path, asks):
    """Members view a job and apply two minutes later: one question, answered by the application."""
    events = []
    for member in range(4):
        for item in range(8):
            time = BEGIN + datetime.timedelta(days=3 * item)
            events.append((member, item, "viewed", time))
            if item % 2 == 0:
                events.append((member, item, "applied", time + datetime.timedelta(minutes=2)))
    dataset = load(tmp_path, [BEGIN - datetime.timedelta(days=30)] * 8, events)
    task = Task.parse(APPLY.format(asks=f"{asks}, window_days: 1", validation="2013-01-16", test="2013-01-22"))
    examples = [example for split in SPLITS for example in build_examples(dataset, task, split)]
    questions = [(e.member, int(item)) for e in examples for item in e.candidates]
    assert len(questions) == len(set(questions)), "each job once"
    assert {item for _, item in questions} >= set(range(7))
    for example in examples:
        assert (example.labels == example.candidates % 2).all(), "0 is Yes"


def test_future_items(tmp_path):
    """A job is posted every day, and viewed days later: none is asked about before it is there."""
    rng = np.random.default_rng(0)
    posted = [BEGIN + datetime.timedelta(days=n // 3) for n in range(300)]
    events = [
        (n % 60, item, "viewed", posted[item] + datetime.timedelta(days=int(rng.integers(1, 10)), hours=12))
        for n, item in enumerate(rng.integers(0, 300, 876).tolist())
    ]
    dataset, task = load(tmp_path, posted, sorted(set(events))), Task.parse(VIEW)
    examples = [example for split in SPLITS for example in build_examples(dataset, task, split)]
    examples.append(example_at(dataset, task, 0))
    posted_times = dataset.items["posted"].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
    assert sum(map(len, (example.candidates for example in examples))) > 1_000
    for example in examples:
        assert (posted_times[example.candidates] <= example.cutoff_time).all()
    assert "Posted: in " not in rendered(dataset, task, examples)


def test_stale_cut(tmp_path):
    """Members with an event a year: each is asked about as of its own year."""
    years = [datetime.datetime(2013 + n, 1, 2) for n in range(6)]
    actions = ("applied", "viewed")
    events = [(member, n, actions[n % 2], year) for member in range(4) for n, year in enumerate(years)]
    dataset = load(tmp_path, [year - datetime.timedelta(days=32) for year in years], events)
    task = Task.parse(APPLY.format(asks="actions: [viewed, applied]", validation="2016-06-01", test="2017-06-01"))
    examples = [example for split in SPLITS for example in build_examples(dataset, task, split)]
    assert all(len(example.candidates) == 1 for example in examples)
    assert len(examples) == 4 * 6
    for example in examples:
        assert example.cutoff_time == dataset.event_time[example.exposures[0]]
        assert len(example.history) == example.candidates[0], "all earlier years are known"
    assert "Posted: in " not in rendered(dataset, task, examples)
