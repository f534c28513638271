"""Any value of a card or a task, replaced by something odd, is taken or refused in plain words; nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from brewjax.config import ConfigError
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.validate import DatasetError
from brewjax.data.tasks.examples import build_examples, example_at
from brewjax.data.tasks.task import load_tasks
from brewjax.data.text.tokenizer import Tokenizer
from tests.tables import CARD_YAML, write_dataset

TASK_YAML = """
name: apply
instruction: Predict whether they apply.
steering_note: focus on location
history: {actions: [applied, viewed], max_events: 50, max_age_days: 100.0}
questions:
  question: Will the member apply
  choice_question: To which of these will the member apply
  actions: [applied, viewed]
  candidates_per_prompt: 3
  sampled_negatives: {label: "No", per_event: 1}
  overlong: truncate
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - {word: "No", value: 0, match: {action: viewed}}
split: {validation: 60%, test: 80%}
metrics: [auc]
"""
ODD = st.sampled_from(
    (None, 5, -1, 1.5, True, "x", "", [], {}, [1], ["x", "x"], {"a": 1}, [[]], "[/x]", "{0}", "%", float("inf"), 10**30)
) | st.sampled_from(("2025-01-01", "a b", "member_id", "time", "\x07"))
BYTES = Tokenizer.byte_level()
Place = tuple[str | int, ...]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Of every value within, and of the whole."""
    yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*place, key))


def replaced(text: str, place: Place, value: Any) -> str:
    if not place:
        return yaml.safe_dump(value)
    values = inner = copy.deepcopy(yaml.safe_load(text))
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


def use(folder: Path, task: Path) -> None:
    """All that the command line does with a card and a task before there is a model."""
    dataset = Dataset.load(folder)
    (checked,) = load_tasks([task], dataset)
    assert all(len(example.candidates) for example in build_examples(dataset, checked, "train"))
    scales = Scales.fit(dataset, checked.boundaries(dataset)[0])
    verbalizer = Verbalizer(dataset, scales, BYTES, 20_000)
    verbalizer.prompt(checked, example_at(dataset, checked, 7).select(slice(2)), "sectioned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("odd") / "jobs")
    (folder / "task.yaml").write_text(TASK_YAML)
    use(folder, folder / "task.yaml")  # valid before a value of it is replaced
    return folder


@hypothesis.given(
    st.sampled_from([("card", place) for place in places(yaml.safe_load(CARD_YAML))])
    | st.sampled_from([("task", place) for place in places(yaml.safe_load(TASK_YAML))]),
    ODD,
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_an_odd_value_is_taken_or_refused_in_plain_words(folder, where, value):
    file, place = where
    (folder / CARD).write_text(replaced(CARD_YAML, place, value) if file == "card" else CARD_YAML)
    task = folder / "task.yaml"
    task.write_text(replaced(TASK_YAML, place, value) if file == "task" else TASK_YAML)
    try:
        use(folder, task)
        message = str(folder)
    except (ConfigError, DatasetError) as error:
        message = str(error)
    assert str(folder) in message
    assert not any(word in message for word in ("nput should", "instance of", "dictionary", "tuple", "pydantic"))
