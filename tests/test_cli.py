"""Broken inputs, each through the real command line: the message names file, line or row, key or column, what is there
and what would be right, in one line and without a traceback."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from brewjax import cli
from brewjax.data.dataset import CARD
from tests.tables import put, with_column, write_dataset

TASK = """\
name: apply
instruction: Predict whether they apply.
history: {actions: [applied, viewed], max_events: 50}
questions: {ask: Will the member apply to the following job, actions: [applied, viewed]}
labels:
  - {word: "Yes", value: 1, when: {action: applied}}
  - {word: "No", value: 0, when: {action: viewed}}
split: {validation: 60%, test: 80%}
"""


@pytest.fixture
def refuse(monkeypatch, capsys) -> Callable[..., str]:
    """Runs a command line that must be refused; what it says, on one line."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(cli, "device_per_core", lambda: None)  # of the environment of later tests,
    monkeypatch.setattr(cli, "hide_useless_libtpu", lambda: None)  # and of their imports

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["brewjax", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert ended.value.code == 2, captured.out + captured.err
        for word in ("Traceback", "pydantic", "instance of", "nput should", "Errno"):
            assert word not in captured.err
        return " ".join(captured.err.replace("│", " ").split())

    return run


def edited(text: str, old: str, new: str) -> str:
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


def check_parts(said: str, parts: Iterable[str]) -> None:
    missing = [part for part in parts if part not in said]
    assert not missing, f"{missing} not in: {said}"


def broken(name: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load((Path(__file__).parent / "broken" / f"{name}.yaml").read_text())


CARDS, TASKS = broken("cards"), broken("tasks")


@pytest.mark.parametrize("case", CARDS)
def test_a_broken_card(case, refuse, tmp_path):
    broken = CARDS[case]
    folder = write_dataset(tmp_path / "jobs", card=lambda text: edited(text, broken["replace"], broken["by"]))
    said = refuse("data", "check", folder)
    check_parts(said, broken["said"])
    assert str(folder) in said


def from_columns(**columns: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        for name, values in columns.items():
            table = (
                with_column(name, values(table[name]))(table) if callable(values) else with_column(name, values)(table)
            )
        return table

    return change


def times(make: Callable[[np.ndarray], object]) -> Callable[[pa.Table], pa.Table]:
    """Event times from their seconds since 1970."""
    return from_columns(time=lambda column: make(column.cast(pa.int64()).to_numpy() // 1_000_000))


def twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table])


EPOCH_NS = lambda seconds: pa.array(seconds, pa.timestamp("ns"))  # noqa: E731  # as pandas.to_datetime(seconds) does

# The table that is changed, how, and what the message must hold.
TABLES = {
    "no_rows": ("events", lambda table: table.slice(0, 0), ("events.parquet: no rows; expected at least one",)),
    "id_null": (
        "members",
        put("member_id", 1, None),
        ("members.parquet: column 'member_id': no id in row 1; every row needs one",),
    ),
    "id_twice": (
        "items",
        put("item_id", 3, 100),
        ("items.parquet: column 'item_id': an id that an earlier row has in row 3 (100); give each id one row",),
    ),
    "id_empty": (
        "members",
        put("member_id", 1, ""),
        ("members.parquet: column 'member_id': an empty id in row 1 ('')",),
    ),
    "id_float": (
        "events",
        from_columns(item_id=lambda c: c.cast(pa.float64())),
        (
            "events.parquet: column 'item_id': found double, ",
            "ids are whole numbers or strings, never floats",
            'column.astype("Int64")',
        ),
    ),
    "id_text_for_number": (
        "events",
        from_columns(item_id=lambda c: c.cast(pa.string())),
        ("column 'item_id': found string where column 'item_id' of items.parquet is int64; make both the same",),
    ),
    "member_unknown": (
        "events",
        put("member_id", 5, "m99"),
        ("unknown member in row 5 ('m99'); it must be in column 'member_id' of members.parquet",),
    ),
    "item_unknown": (
        "events",
        put("item_id", 5, 9),
        ("unknown item in row 5 (9); it must be in column 'item_id' of items.parquet",),
    ),
    "action_unknown": (
        "events",
        put("action", 5, "veiwed"),
        ("column 'action': unknown action in row 5 ('veiwed'); the card has: viewed, applied",),
    ),
    "action_brackets": ("events", put("action", 0, "[applied]"), ("unknown action in row 0 ('[applied]')",)),
    "action_closing_brackets": ("events", put("action", 0, "[/applied]"), ("unknown action in row 0 ('[/applied]')",)),
    "action_emoji": ("events", put("action", 0, ":fire:"), ("unknown action in row 0 (':fire:')",)),
    "action_null": ("events", put("action", 5, None), ("column 'action': no action in row 5; every event needs one",)),
    "action_number": (
        "events",
        from_columns(action=pa.array([1] * 80)),
        ("column 'action': found int64, 1 in row 0; expected strings",),
    ),
    "time_null": ("events", put("time", 5, None), ("column 'time': no time in row 5; every event needs one",)),
    "time_text": (
        "events",
        from_columns(time=pa.array(["2025-01-01"] * 80)),
        ("found string, '2025-01-01' in row 0; expected timestamps (pandas.to_datetime(column) makes them)",),
    ),
    "time_day": (
        "events",
        from_columns(time=pa.array([datetime.date(2025, 1, 1)] * 80)),
        ("found date32[day]", "expected timestamps (pandas.to_datetime(column) makes them)"),
    ),
    "time_seconds": (
        "events",
        times(pa.array),
        ("column 'time': found int64, ", 'pandas.to_datetime(column, unit="s") makes them of such numbers'),
    ),
    "time_milliseconds": ("events", times(lambda s: pa.array(s * 1000)), ('pandas.to_datetime(column, unit="ms")',)),
    "time_microseconds": ("events", times(lambda s: pa.array(s * 10**6)), ('pandas.to_datetime(column, unit="us")',)),
    "time_nanoseconds": ("events", times(lambda s: pa.array(s * 10**9)), ('pandas.to_datetime(column, unit="ns")',)),
    "time_float": (
        "events",
        times(lambda s: pa.array(s + 0.5)),
        ("column 'time': found double, ", 'pandas.to_datetime(column, unit="s")'),
    ),
    "time_of_day": (
        "events",
        from_columns(time=pa.array([datetime.time(1)] * 80)),
        ("found time64[us], datetime.time(1, 0) in row 0; expected timestamps",),
    ),
    "time_duration": (
        "events",
        from_columns(time=pa.array([1] * 80, pa.duration("ns"))),
        ("found duration[ns], 1 in row 0; expected timestamps",),
    ),
    "seconds_as_nanoseconds": (
        "events",
        times(EPOCH_NS),
        (
            "column 'time': all 80 times are in January 1970, from 1970-01-01 00:00:01.7",
            'pandas.to_datetime(column, unit="s")',
        ),
    ),
    "milliseconds_as_nanoseconds": (
        "events",
        times(lambda s: EPOCH_NS(s * 1000)),
        ("all 80 times are in January 1970", 'unit="ms"'),
    ),
    "microseconds_as_nanoseconds": (
        "events",
        times(lambda s: EPOCH_NS(s * 10**6)),
        ("all 80 times are in January 1970", 'unit="us"'),
    ),
    "milliseconds_as_seconds": (
        "events",
        times(lambda s: pa.array(s * 1000 * 10**6, pa.timestamp("us"))),
        ("all 80 times are after the year 2199", "wrong unit"),
    ),
    "time_zero": (
        "events",
        put("time", 7, datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)),
        ("a time of 0, which is 1970, in row 7", "leave out such events"),
    ),
    "time_in_9999": (
        "events",
        put("time", 7, datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)),
        ("a time after the year 2199 in row 7",),
    ),
    "all_at_once": (
        "events",
        lambda table: pa.concat_tables(
            [
                from_columns(time=pa.array(np.arange(80) + offset, pa.timestamp("us", "UTC")))(table)
                for offset in (1_700_000_000_000_000, 1_700_000_001_000_000)
            ]
        ),
        ("all 160 events lie within 1.00008 seconds, from 2023-11-14 22:13:20 on",),
    ),
    "every_event_twice": (
        "events",
        twice,
        ("80 of 160 rows are the same in every column as an earlier one: row 80, row 81, row 82 ..; keep one of each",),
    ),
    "one_event_twice": (
        "events",
        lambda table: pa.concat_tables([table, table.slice(3, 1)]),
        ("events.parquet: 1 of 81 rows are the same in every column as an earlier one: row 80; keep one",),
    ),
    "number_nan": (
        "events",
        put("seconds", 4, float("nan")),
        ("column 'seconds': not a number in row 4 (nan); leave it null where it is unknown",),
    ),
    "number_timedelta": (
        "items",
        from_columns(salary=pa.array([1] * 40, pa.duration("ns"))),
        ("column 'salary': found duration[ns], 1 in row 0; expected whole numbers or floats (pandas: column.dt.total",),
    ),
    "number_bool": (
        "items",
        from_columns(salary=pa.array([True] * 40)),
        ("column 'salary': found bool, True in row 0; expected whole numbers or floats (say kind: category)",),
    ),
    "number_struct": (
        "items",
        from_columns(salary=pa.array([{"a": 1}] * 40)),
        ("column 'salary': found struct<a: int64>, {'a': 1} in row 0; expected whole numbers",),
    ),
    "number_too_large": (
        "items",
        from_columns(salary=pa.array([2**64 - 1] * 40, pa.uint64())),
        ("column 'salary': found uint64, 18446744073709551615 in row 0",),
    ),
    "category_float": (
        "items",
        from_columns(company=pa.array([1.5] * 40)),
        ("column 'company': found double, 1.5 in row 0; expected strings, whole numbers or booleans",),
    ),
    "list_null": (
        "items",
        put("skills", 6, ["SQL", None]),
        ("column 'skills': a null within the list in row 6 (['SQL', None]); leave it out of the list",),
    ),
    "list_empty_text": (
        "items",
        put("skills", 6, ["SQL", " "]),
        ("column 'skills': an empty text within the list in row 6 (['SQL', ' ']); leave it out of the list",),
    ),
    "list_of_numbers": (
        "items",
        from_columns(skills=pa.array([[1]] * 40)),
        ("column 'skills': found list<", "[1] in row 0; expected lists of strings"),
    ),
    "text_bytes": (
        "items",
        from_columns(title=pa.array([b"x"] * 40)),
        ("column 'title': found binary, b'x' in row 0; expected strings",),
    ),
    "date_seconds": (
        "items",
        from_columns(posted=pa.array([1_700_000_000] * 40)),
        ("column 'posted': found int64", 'pandas.to_datetime(column, unit="s")'),
    ),
    "date_as_nanoseconds": (
        "items",
        from_columns(posted=EPOCH_NS([1_700_000_000 + n for n in range(40)])),
        ("column 'posted': all 40 times are in January 1970", 'unit="s"'),
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_broken_table(case, refuse, tmp_path):
    name, change, parts = TABLES[case]
    folder = write_dataset(tmp_path / "jobs [old]", **{name: change})
    said = refuse("data", "check", folder)
    check_parts(said, parts)
    assert f"error: {folder}: " in said
    assert f"in the dataset {name}.parquet: " in said


def csv_for_parquet(path: Path) -> None:
    pa.csv.write_csv(pq.read_table(path).select(["member_id", "position"]), path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def to_folder(*files: tuple[str, bytes]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        path.mkdir()
        for name, content in files:
            (path / name).write_bytes(content)

    return spoil


def two_columns_of_a_name(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["member_id", "position", "position", "location", "experience"]), path)


# What is done to members.parquet, and what the message must hold.
FILES = {
    "missing": (
        Path.unlink,
        ("members.parquet: no such file or folder in ", "there are: dataset.yaml, events.parquet, items.parquet"),
    ),
    "empty": (lambda path: path.write_bytes(b""), ("members.parquet: an empty file; expected Parquet",)),
    "csv": (
        csv_for_parquet,
        (
            'members.parquet: not Parquet: it begins with \'"member_id","position"\'',
            "pandas.read_csv(file).to_parquet(file)",
        ),
    ),
    "json": (
        lambda path: path.write_text('{"member_id": 1}'),
        ("members.parquet: not Parquet: it begins with '{\"member_id\": 1}'",),
    ),
    "zip": (
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
        ("members.parquet: not Parquet: it begins with 'PK",),
    ),
    "cut_short": (
        cut_short,
        ("members.parquet: Parquet that is cut short: its end is missing; write or copy it again",),
    ),
    "damaged": (
        lambda path: path.write_bytes(b"PAR1" + bytes(100) + b"PAR1"),
        ("members.parquet: not readable as Parquet: ",),
    ),
    "empty_folder": (to_folder(), ("members.parquet: a folder without Parquet files",)),
    "csv_in_folder": (
        to_folder(("part.csv", b"a,b\n1,2\n")),
        ("members.parquet: part.csv: not Parquet: it begins with 'a,b'",),
    ),
    "column_twice": (
        two_columns_of_a_name,
        ("members.parquet: two columns have the same name; give each a name of its own",),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file(case, refuse, tmp_path):
    spoil, parts = FILES[case]
    folder = write_dataset(tmp_path / "jobs")
    spoil(folder / "members.parquet")
    said = refuse("data", "check", folder)
    check_parts(said, parts)
    assert f"{folder}: 1 problem in the dataset" in said


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
    said = refuse("prompt", folder, tmp_path / "apply.yaml", "--split", "test")
    check_parts(said, broken["said"])
    assert f"{tmp_path / 'apply.yaml'}:" in said


# A prompt as JSON, and what the message must hold.
PROMPT = {"center": "x\n", "events": ["e"], "questions": ["q"], "labels": ["Yes", "No"]}
PROMPTS = {
    "not_json": ("{center: 1}", (":1: not valid JSON: ", "at column 2")),
    "empty": ("", (":1: not valid JSON: ",)),
    "list": ("[]", ('expected {"center": "..", "events": [".."]', "found []")),
    "key_missing": (
        {name: value for name, value in PROMPT.items() if name != "labels"},
        ("'labels' is missing; expected {",),
    ),
    "key_unknown": (PROMPT | {"label": []}, ("unknown key 'label'; did you mean 'labels'?",)),
    "key_twice": ('{"center": "a", "center": "b"}', ("'center' is given twice",)),
    "center_number": (PROMPT | {"center": 5}, ("center: expected a text, found 5",)),
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
    said = refuse("score", tmp_path / "model", "--prompt", path)
    check_parts(said, (f"error: {path}:", *parts))


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
