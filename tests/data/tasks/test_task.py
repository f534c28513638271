import dataclasses
import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from brewjax.config import ConfigError
from brewjax.data.tables.card import Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import plain
from brewjax.data.tasks.conditions import matches as matches_events
from brewjax.data.tasks.examples import build_examples
from brewjax.data.tasks.task import Label, Task, load_tasks
from tests.data.conftest import Event, moment
from tests.tables import put

CONFIGS = Path(__file__).parents[3] / "configs"
TASK = """\
name: applies
instruction: Predict whether the member applies to the job in the "Question".
history:
  actions: [viewed, applied]
  max_events: 20
questions:
  question: Will the member apply to the following job
  actions: [viewed, applied]
  sampled_negatives: {label: "No", per_event: 2}
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - word: "No"
    value: 0
    match: {action: viewed, seconds: 30}
split: {validation: 2025-01-05, test: 2025-01-09}
"""


def with_seconds(jobs: Dataset) -> Dataset:
    """The dataset with an event of 30 seconds, which TASK matches."""
    actions = jobs.events["action"].to_pylist()
    return dataclasses.replace(jobs, events=put("seconds", actions.index("viewed"), 30.0)(jobs.events))


@pytest.mark.parametrize("path", sorted((CONFIGS / "tasks" / "movielens").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_tasks_fit_their_dataset(path):
    task, card = Task.load(path), Card.load(CONFIGS / "datasets" / "movielens-100k.yaml")
    assert task.name == path.stem
    assert {*task.history.actions, *task.questions.actions} <= {*card.events.actions}


def test_a_task_reads_as_written(jobs):
    task = Task.parse(TASK, "applies.yaml")
    task.check(with_seconds(jobs))
    assert task.words == ("Yes", "No")
    assert task.values.tolist() == [1, 0]
    assert task.questions.sampled_negatives.per_event == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "name: applies",
            "name: Applies!",
            "1: name: 'Applies!': expected small letters, digits, - and _ alone, for instance applies",
        ),
        (
            "max_events: 20",
            "max_event: 20",
            "5: history.max_event: unknown key 'max_event'; did you mean 'max_events'?",
        ),
        ("max_events: 20", "max_events: -1", "5: history.max_events: expected at least 0, found -1"),
        ("max_events: 20", "max_age_days: 0", "5: history.max_age_days: expected more than 0, found 0"),
        ('word: "Yes"', "word: Yes", "11: labels.0.word: put the word in quotes"),
        ("per_event: 2", "per_event: 0", "9: questions.sampled_negatives.per_event: expected more than 0, found 0"),
        ('word: "No"', 'word: "Yes"', "12: labels.1: the word 'Yes' is given twice"),
        (
            'word: "No"',
            "word: Not now",
            "12: labels.1.word: 'Not now' is 2 words; a label's word is one, and",
        ),
        ("value: 0", "value: 1", "13: labels.1.value: 1 is the value of 'Yes' too; a ranking needs one that is higher"),
        ("value: 0", "value: -1", "13: labels.1.value: -1: NDCG's gain is 2^value - 1, so values are 0 to"),
        (
            "value: 0",
            "value: 2000",
            "13: labels.1.value: 2000: NDCG's gain is 2^value - 1, so values are 0 to",
        ),
        ("value: 0", "value: .inf", "13: labels.1.value: expected a finite number, found inf"),
        (
            "value: 1, match: {action: applied}",
            "value: 1",
            "11: labels.0: no event is ever 'Yes': give it 'match', or",
        ),
        ("match: {action: applied}", "match: {}", "11: labels.0.match: expected at least 1 of them, found no keys"),
        (
            "[viewed, applied]\n  sampled",
            "[viewed, viewed]\n  sampled",
            "8: questions.actions.1: the action 'viewed' is",
        ),
        (
            'label: "No"',
            'label: "Nope"',
            "9: questions.sampled_negatives.label: 'Nope' is not a label; did you mean 'No'?",
        ),
        ("    value: 0\n", "", "12: labels.1.value: missing; this key is needed"),
    ],
)
def test_a_file_that_is_no_task_is_refused(old, new, message):
    with pytest.raises(ConfigError) as error:
        Task.parse(TASK.replace(old, new), "applies.yaml")
    assert str(error.value).startswith(f"applies.yaml:{message}")


def test_one_label_is_not_a_question():
    with pytest.raises(ConfigError, match=r"applies\.yaml:10: labels: expected at least 2 of them"):
        Task.parse(TASK[: TASK.index('  - word: "No"')], "applies.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "applied]\n  max_events",
            "hired]\n  max_events",
            "4: history.actions.1: the dataset has no action 'hired'; it has: viewed, applied",
        ),
        (
            "[viewed, applied]\n  sampled",
            "[aplied]\n  sampled",
            "8: questions.actions.0: the dataset has no action 'aplied'; did you mean 'applied'?",
        ),
        (
            "seconds: 30",
            "second: 30",
            "14: labels.1.match.second: events have no column 'second'; did you mean 'seconds'?",
        ),
    ],
)
def test_what_the_dataset_has_not_is_refused(jobs, old, new, message):
    task = Task.parse(TASK.replace(old, new), "applies.yaml")
    with pytest.raises(ConfigError) as error:
        task.check(with_seconds(jobs))
    assert str(error.value) == f"applies.yaml:{message}"


def test_tasks_are_loaded_together_under_different_names(jobs_with, tmp_path):
    jobs = jobs_with([Event(0, 1, "viewed", 1, 30), *(Event(0, item, "applied", 1 + item) for item in range(20))])
    paths = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    paths[0].write_text(TASK)
    paths[1].write_text(TASK.replace("name: applies", "name: applies_soon"))
    assert [task.name for task in load_tasks(paths, jobs)] == ["applies", "applies_soon"]
    paths[1].write_text(TASK)
    with pytest.raises(ConfigError, match=r"yaml:1: name: two tasks are named 'applies'"):
        load_tasks(paths, jobs)
    paths[1].write_text(TASK.replace("seconds: 30", "second: 30"))
    with pytest.raises(ConfigError, match=r"two\.yaml:14: .* did you mean 'seconds'\?"):
        load_tasks(paths, jobs)
    paths[1].write_text(TASK.replace("name: applies", "name: idle").replace("seconds: 30", 'seconds: "30"'))
    with pytest.raises(
        ConfigError,
        match=r"two\.yaml:14: labels.1.match.seconds: this column holds numbers, found '30'",
    ):
        load_tasks(paths, jobs)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("{validation: 80%, test: 100%}", ".test: '100%': a share of the events is a number between 0% and 100%"),
        ("{validation: 0%, test: 90%}", ".validation: '0%': a share of the events is a number between 0% and 100%"),
        (
            "{validation: 2025-01-05, test: 2025-13-01}",
            ".test: '2025-13-01': expected a date, 1998-03-07, or a share",
        ),
        (
            "{validation: 0.8, test: 0.9}",
            ".validation: '0.8': expected a date, 1998-03-07, or a share, 80%",
        ),
        ("{validation: 2025-01-09, test: 2025-01-05}", ": validation (2025-01-09) must begin before test (2025-01-05)"),
        ("{validation: 90%, test: 80%}", ": validation (90%) must begin before test (80%)"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(jobs, split, message):
    task = Task.parse(TASK.replace("{validation: 2025-01-05, test: 2025-01-09}", split), "applies.yaml")
    with pytest.raises(ConfigError) as error:
        next(build_examples(jobs, task, "train"))
    assert str(error.value).startswith(f"applies.yaml:15: split{message}")


def test_shares_of_the_events_and_dates_with_hours_and_zones(jobs_with):
    dataset = jobs_with([Event(day % 3, day, "viewed", day) for day in range(11)])

    def boundaries(validation: str, test: str) -> tuple[int, int]:
        split = f"{{validation: {validation}, test: {test}}}"
        return Task.parse(TASK.replace("{validation: 2025-01-05, test: 2025-01-09}", split)).boundaries(dataset)

    assert boundaries("80%", "95.0%") == (moment(8), moment(9.5))
    assert boundaries("2025-01-05", "2025-01-09T12:00") == (moment(4), moment(8.5))
    assert boundaries("2025-01-05", "2025-01-09 12:00:00+06:00") == (moment(4), moment(8.25))
    assert boundaries("50%", "2025-01-09") == (moment(5), moment(8))


def test_a_label_is_the_answer_to_the_events_it_names(jobs_with):
    dataset = jobs_with(
        [
            Event(0, 0, "viewed", 0, 30.0),
            Event(0, 1, "applied", 1, 30.0),
            Event(0, 2, "viewed", 2, None),
            Event(0, 3, "viewed", 3, 60.0),
        ]
    )

    def matches(when: str) -> list[bool]:
        label = Label.parse(f"{{word: a, value: 1, match: {when}}}")
        return matches_events(dataset, label.match, np.arange(4)).tolist()

    assert matches("{action: viewed}") == [True, False, True, True]
    assert matches("{action: [viewed, applied]}") == [True, True, True, True]
    assert matches("{seconds: [30, 60]}") == [True, True, False, True], "an unknown value matches nothing"
    assert matches("{action: viewed, seconds: 30}") == [True, False, False, False], "all that is named must hold"
    assert matches("{seconds: {min: 30, below: 60}}") == [True, True, False, False]
    assert matches("{seconds: {above: 30}, item.salary: {max: 1000000}}") == [False, False, False, True]
    assert matches("{member.position: Software Engineer}") == [True] * 4
    assert matches_events(dataset, {"action": "viewed"}, np.array([3, 1])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("column", "matching", "differing"),
    [
        (pa.array([0.1, 0.2], pa.float32()), ["0.1", "[0.1, 7]"], ["0.10000001"]),
        (pa.array([0.1, 0.2], pa.float16()), ["0.1"], ["0.1001"]),
        (pa.array([Decimal("129.99"), Decimal("1.00")], pa.decimal128(9, 2)), ["129.99"], ["130"]),
        (pa.array([4, 5], pa.int8()), ["4", "4.0"], ["3"]),
        (pa.array([True, False]), ["true"], []),
        (pa.array(["4", "5"]).dictionary_encode(), ['"4"'], ['"6"']),
        (pa.array([datetime.date(2025, 1, 2), datetime.date(2025, 1, 3)]), ["2025-01-02"], ["2025-01-04"]),
        (
            pa.array([datetime.datetime(2025, 1, 2, 12), datetime.datetime(2025, 1, 3)], pa.timestamp("ms")),
            ["2025-01-02T12:00", '"2025-01-02 14:00+02:00"'],
            ["2025-01-02"],
        ),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_value_is_compared_in_the_type_of_its_column(jobs, column, matching, differing):
    events = jobs.events.slice(0, 2).append_column("extra", plain(pa.chunked_array([column])))
    dataset = dataclasses.replace(jobs, events=events)
    for value in matching:
        label = Label.parse(f"{{word: a, value: 1, match: {{extra: {value}}}}}")
        assert matches_events(dataset, label.match, np.arange(2)).tolist() == [True, False]
    for value in differing:
        label = Label.parse(f"{{word: a, value: 1, match: {{extra: {value}}}}}")
        assert not matches_events(dataset, label.match, np.arange(2)).any()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (pa.array([4, 5]), '"4"', "this column holds numbers, found '4'; write it without quotes: 4"),
        (pa.array([4, 5]), "true", "this column holds numbers, found True"),
        (pa.array([4, 5]), "4.5", "this column holds whole numbers, found 4.5"),
        (pa.array(["4", "5"]), "4", 'this column holds texts, found 4; put it in quotes: "4"'),
        (pa.array(["yes", "no"]), "no", 'this column holds texts, found false; put it in quotes: "false"'),
        (pa.array([True, False]), "1", "this column holds true and false, found 1"),
        (pa.array([["x"], []]), "x", "this column holds lists of texts; a label matches columns of single values"),
        (pa.array([datetime.date(2025, 1, 2)] * 2), "soon", "this column holds dates, found 'soon'; expected one such"),
        (pa.array([4, 5]), "null", "an unknown value matches nothing; leave null out"),
        (pa.array([1, 2], pa.duration("ns")), "1", "this column holds duration[ns]; a label matches texts, numbers"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_value_that_the_column_cannot_have_is_refused(jobs, column, value, message):
    events = jobs.events.slice(0, 2).append_column("extra", plain(pa.chunked_array([column])))
    task = Task.parse(TASK.replace("action: applied}}", f"extra: {value}}}}}"), "applies.yaml")
    with pytest.raises(ConfigError) as error:
        task.check(dataclasses.replace(jobs, events=events))
    assert str(error.value).startswith(f"applies.yaml:11: labels.0.match.extra: {message}")


def test_a_label_that_no_event_has_shows_what_there_is(jobs):
    task = Task.parse(TASK.replace("seconds: 30}", "seconds: 30.5}"), "a.yaml")
    with pytest.raises(
        ConfigError, match=r"a\.yaml:14: labels\.1\.match: no event .* and seconds: 30\.5 \(there is: \d"
    ):
        task.check(jobs)
