"""Broken inputs, each through the real command line: the message names file, line or row, key or column, what is there
and what would be right, in one line and without a traceback."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import build_examples
from brewjax.data.tasks.task import load_tasks
from tests.command_line import check_parts, shown
from tests.tables import write_dataset

TASK = """\
name: apply
instruction: Predict whether they apply.
history: {actions: [applied, viewed], max_events: 50}
questions: {question: Will the member apply to the following job, actions: [applied, viewed]}
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - {word: "No", value: 0, match: {action: viewed}}
split: {validation: 60%, test: 80%}
"""


def edited(text: str, old: str, new: str) -> str:
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


def broken(name: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load((Path(__file__).parent / "broken" / f"{name}.yaml").read_text())


CARDS, TASKS = broken("cards"), broken("tasks")


@pytest.mark.parametrize("case", CARDS)
def test_a_broken_card(case, refuse, tmp_path):
    broken = CARDS[case]
    folder = write_dataset(tmp_path / "jobs", card=lambda text: edited(text, broken["replace"], broken["by"]))
    message = refuse("data", "check", folder)
    check_parts(message, broken["message"])
    assert str(folder) in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A valid dataset whose events have a list of tags too."""
    tags = pa.array([["x"]] * 80)
    return write_dataset(
        tmp_path_factory.mktemp("cli") / "jobs", events=lambda table: table.append_column("tags", tags)
    )


@pytest.mark.parametrize("case", TASKS)
def test_a_broken_task(case, refuse, folder, tmp_path):
    broken = TASKS[case]
    (tmp_path / "apply.yaml").write_text(edited(TASK, broken["replace"], broken["by"]))
    message = refuse("prompt", folder, tmp_path / "apply.yaml", "--split", "test")
    check_parts(message, broken["message"])
    assert f"{tmp_path / 'apply.yaml'}:" in message


# A prompt as JSON, and what the message must hold.
PROMPT = {"preamble": "x\n", "events": ["e"], "questions": ["q"], "labels": ["Yes", "No"]}
PROMPTS = {
    "not_json": ("{preamble: 1}", (":1: not valid JSON: ", "at column 2")),
    "empty": ("", (":1: not valid JSON: ",)),
    "list": ("[]", ('expected {"preamble": "..", "events": [".."]', "found []")),
    "key_missing": (
        {name: value for name, value in PROMPT.items() if name != "labels"},
        ("'labels' is missing; expected {",),
    ),
    "key_unknown": (PROMPT | {"label": []}, ("unknown key 'label'; did you mean 'labels'?",)),
    "key_twice": ('{"preamble": "a", "preamble": "b"}', ("'preamble' is given twice",)),
    "preamble_number": (PROMPT | {"preamble": 5}, ("preamble: expected a text, found 5",)),
    "events_text": (PROMPT | {"events": "x"}, ('events: expected a list of texts, found "x"',)),
    "question_number": (PROMPT | {"questions": ["a", 5]}, ("questions[1]: expected a text, found 5",)),
    "no_questions": (PROMPT | {"questions": []}, ("questions: expected at least one",)),
    "one_label": (
        PROMPT | {"labels": ["Yes"]},
        ('labels: expected at least two, no two of them the same, found ["Yes"]',),
    ),
    "label_twice": (PROMPT | {"labels": ["Yes", "Yes"]}, ("labels: expected at least two, no two of them the same",)),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_broken_prompt(case, refuse, tmp_path):
    content, parts = PROMPTS[case]
    path = tmp_path / "prompt.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    message = refuse("score", tmp_path / "model", "--prompt", path)
    check_parts(message, (f"error: {path}:", *parts))


def test_a_command_line_that_names_what_is_not_there(refuse, folder, tmp_path):
    task, files = tmp_path / "apply.yaml", tmp_path / "files"
    task.write_text(TASK)
    files.mkdir()
    (files / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_text("x")
    (tmp_path / "latin.yaml").write_bytes("name: jöbs\n".encode("latin-1"))
    (tmp_path / "run" / "turbo" / "model").mkdir(parents=True)
    (tmp_path / "run" / "turbo" / "model" / "model.yaml").write_text("name: x")
    prompt = ("prompt", folder, task)
    cases = {
        ("data", "check", tmp_path / "none"): (
            f"{tmp_path / 'none'}: no such folder; a dataset is a folder with {CARD}",
        ),
        ("data", "check", folder.parent / "Jobs"): (f"did you mean '{folder}'?",),
        ("data", "check", files): (f"{files}: no {CARD} there", "there is: config.json"),
        ("data", "check", folder / CARD): (f"{folder / CARD}: a file; give the folder that holds {CARD}",),
        ("data", "fetch", "movielens"): ("unknown dataset 'movielens'; did you mean 'movielens-100k'?",),
        ("prompt", folder, tmp_path / "aply.yaml", "--member", "m7"): (f"no such file; did you mean '{task}'?",),
        ("prompt", folder, tmp_path / "x*.yaml", "--member", "m7"): ("x*.yaml: no file fits this pattern",),
        ("prompt", folder, files, "--member", "m7"): (f"{files}: a folder; expected a file",),
        ("prompt", folder, tmp_path / "latin.yaml", "--member", "m7"): ("latin.yaml:1: not UTF-8: byte 0xf6",),
        (*prompt, "--member", "[/m9]"): (f"{folder}: no member '[/m9]'; ids look like 'm0', 'm1', 'm2'",),
        (*prompt,): ("give --member, or --split",),
        (*prompt, "--member", "m7", "--style", "[/chats]"): ("'[/chats]': ",),
        (*prompt, "--member", "m7", "--style", "chats"): ("'chats': did you mean 'chat'?",),
        (*prompt, "--member", "m7", "--at", "soon"): (
            "Invalid value for '--at': 'soon': expected a moment such as 2025-03-07",
        ),
        (*prompt, "--split", "tests"): ("Invalid value for '--split': 'tests' is not one of",),
        (*prompt, "--split", "test", "--at", "2025-01-01"): ("give --at or --split, not both",),
        (*prompt, "--split", "train", "--member", "m0"): (
            f"{task}:8: split: no question of member 'm0' falls into the train",
        ),
        ("evaluate", tmp_path / "none", folder, task): (f"{tmp_path / 'none'}: no such model folder; `brewjax run`",),
        ("evaluate", files, folder, task): (f"{files}: a Hugging Face folder; `brewjax import {files} OUT`",),
        ("evaluate", tmp_path / "m.gguf", folder, task): (
            "m.gguf: a file; expected a model's folder",
            "brewjax import",
        ),
        ("evaluate", tmp_path / "run", folder, task): (f"did you mean '{tmp_path / 'run/turbo/model'}'?",),
        ("score", "m", "--prompt", "-", "--member", "m1", "--note", "near"): (
            "--member, --note: for members of a dataset, not with --prompt",
        ),
        ("score", tmp_path / "none", "--prompt", tmp_path / "no.json"): (f"{tmp_path / 'no.json'}: no such file",),
        ("score",): ("give a model folder, or --server",),
        ("score", files, "--server", "x:1"): ("give a model folder or --server, not both",),
        ("describe", "configs/models/tiny.yaml", "--set", "layers"): ("--set layers: expected KEY=VALUE",),
        ("describe", "configs/models/tiny.yaml", "--set", "layer=2"): (
            "--set layer=2: layer: unknown key 'layer'; did",
        ),
        ("describe", "configs/models/tiny.yaml", "--set", "layers=two"): (
            "layers: expected a whole number, found 'two'",
        ),
        ("quantize", files, tmp_path / "out"): (f"{files}: a Hugging Face folder; `brewjax import",),
        ("export", tmp_path / "none", tmp_path / "out"): ("none: no such model folder",),
        ("quantize", tmp_path / "run/turbo/model", tmp_path / "out", "--set", "dtype=int7"): (
            "--set dtype=int7: dtype: ",
        ),
    }
    for arguments, parts in cases.items():
        check_parts(refuse(*arguments), parts)


def test_the_prompts_that_evaluation_asks_can_be_seen(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "apply.yaml").write_text(TASK)
    output = shown(monkeypatch, capsys, "prompt", folder, tmp_path / "apply.yaml", "--split", "test", "--member", "m7")
    assert re.search(r"^\(member m7 as of 2025-\d\d-\d\d \d\d:\d\d:\d\d UTC\)$", output, re.MULTILINE)
    tables = Dataset.load(folder)
    (task,) = load_tasks([tmp_path / "apply.yaml"], tables)
    answers = [
        task.words[label]
        for example in itertools.islice((e for e in build_examples(tables, task, "test") if e.member == 7), 3)
        for label in example.labels
    ]
    assert re.findall(r"## Answer\n(Yes|No)\n", output) == answers


def test_a_prompt_as_of_a_moment_knows_nothing_later(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "apply.yaml").write_text(TASK)
    count = {}
    for at in ("2025-01-01", "2025-06-01T12:00", "2025-06-01T14:00+02:00", "2026-06-01"):
        arguments = ("prompt", folder, tmp_path / "apply.yaml", "--member", "m7", "--at", at)
        count[at] = shown(monkeypatch, capsys, *arguments).count("[Age: ")
    tables = Dataset.load(folder)
    moments = tables.event_time[tables.event_member == 7]
    half = int(np.datetime64("2025-06-01T12:00", "us").astype(int))
    before = int((moments < half).sum())
    assert [*count.values()] == [0, before, before, 35]
    assert 0 < before < 35
