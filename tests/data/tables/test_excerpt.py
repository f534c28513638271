"""An excerpt says what the whole dataset would: every prompt of a member is the same text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.excerpt import load_excerpt, with_items
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks import excerpts
from brewjax.data.tasks.examples import example_at
from brewjax.data.tasks.excerpts import read_candidates, training_scales
from brewjax.data.tasks.task import Task
from brewjax.data.text.tokenizer import Tokenizer
from tests.data.conftest import moment
from tests.data.records.test_sft import APPLIES
from tests.tables import write_dataset

TASK = Task.parse(APPLIES.replace("2025-01-05", "60%").replace("2025-01-07", "80%"))
FACTS = """\
facts:
  members:
    - {name: generosity, mean: seconds, less: items, shrink: 5, buckets: null}
    - {name: applies, rate: [applied], shrink: 3, buckets: null}
  items:
    - {name: popularity, count: [applied], buckets: 100}
    - {name: attention, mean: seconds, days: 40, buckets: null}
    - {name: applied share, rate: [applied], shrink: 20, buckets: null}
    - {name: last, days_since: [viewed], buckets: null}
    - {name: age, age: posted, buckets: null}
  pairs:
    - {name: seen, count: [viewed], buckets: null}
    - {name: skill share, share: [viewed], by: skills, buckets: null}
    - {name: of alike, mean: seconds, among: company, buckets: null}
    - {name: seen longer, mean: seconds, less: items, buckets: null}
    - {name: pay apart, distance: salary, buckets: null}
  events:
    - {name: surprise, mean: seconds, less: items, buckets: null}
"""
EVERYTHING = (
    "  pairs: [{name: along, together: [viewed]}]",
    "  pairs: [{name: near, neighbors: seconds}]",
    "  items: [{name: eager, mean: seconds, less: members}]",
    "  items: [{name: slow, mean: seconds, shrink: 2}]",
)


def with_facts(text: str, facts: str) -> str:
    return text[: text.index("facts:")] + facts


def in_dictionaries(table: pa.Table) -> pa.Table:
    """As pandas writes a column of categories, and texts."""
    table = table.set_column(2, "action", table["action"].cast(pa.large_string()))
    return table.set_column(0, "member_id", table["member_id"].dictionary_encode())


@pytest.fixture(params=["a file", "a folder", "dictionaries"])
def folder(request, tmp_path) -> Path:
    change = in_dictionaries if request.param == "dictionaries" else lambda table: table
    folder = write_dataset(tmp_path / "jobs", events=change, card=lambda text: with_facts(text, FACTS))
    if request.param == "a folder":
        events = pq.read_table(folder / "events.parquet")
        (folder / "events").mkdir()
        pq.write_table(events.slice(0, 33), folder / "events" / "1.parquet")
        pq.write_table(events.slice(33), folder / "events" / "2.parquet", row_group_size=7)
        (folder / CARD).write_text((folder / CARD).read_text().replace("events:", "events:\n  file: events", 1))
    return folder


def prompts(dataset: Dataset, whole: Dataset, task: Task, member: str, time: int | None) -> list[str]:
    example = example_at(dataset, task, dataset.member_row(member), time)
    dataset, [example] = read_candidates(dataset, task, [example])
    scales = Scales.fit(whole, task.boundaries(whole)[0])
    verbalizer = Verbalizer(dataset, scales, Tokenizer.byte_level(), 30_000)
    return [verbalizer.prompt(task, example, style).render() for style in ("sectioned", "compact", "turns")]


@pytest.mark.parametrize("time", [None, moment(150), moment(-3)], ids=["now", "then", "before all"])
def test_a_prompt_of_an_excerpt_is_that_of_the_whole(folder, time):
    whole = Dataset.load(folder)
    for member in ("m0", "m3", "m7"):
        excerpt = load_excerpt(folder, [member], time)
        assert len(excerpt.events) < len(whole.events)
        assert prompts(excerpt, whole, TASK, member, time) == prompts(whole, whole, TASK, member, time)


def test_only_the_events_of_members_and_items_are_read(folder):
    excerpt = load_excerpt(folder, ["m1", "m2"])
    assert set(excerpt.events["member_id"].to_pylist()) == {"m1", "m2"}
    counts = [len(with_items(excerpt, np.arange(count)).events) for count in (1, 5, 40)]
    assert counts == sorted(set(counts))
    assert counts[-1] == len(Dataset.load(folder).events)


@pytest.mark.parametrize("facts", EVERYTHING)
def test_everything_is_read_where_facts_depend_on_it(tmp_path, facts):
    folder = write_dataset(tmp_path / "jobs", card=lambda text: with_facts(text, f"facts:\n{facts}\n"))
    assert load_excerpt(folder, ["m1"]).summary is None


def test_percentiles_are_stored_for_the_tables_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_dataset(tmp_path / "jobs")
    whole = Dataset.load(folder)
    expected = Scales.fit(whole, TASK.boundaries(whole)[0])
    assert training_scales(load_excerpt(folder, ["m1"]), TASK) == expected
    with monkeypatch.context() as patched:
        patched.setattr(excerpts.Dataset, "load", None)  # is not called again
        assert training_scales(load_excerpt(folder, ["m2"]), TASK) == expected
    doubled = dataclasses.replace(whole, items=whole.items.set_column(5, "salary", pa.array(np.arange(40.0))))
    pq.write_table(doubled.items, folder / "items.parquet")
    assert training_scales(load_excerpt(folder, ["m1"]), TASK) != expected
