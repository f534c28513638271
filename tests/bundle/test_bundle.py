from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.config import ConfigError
from brewjax.data.prompts.styles import SECTIONED, STYLES, PromptConfig
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import build_examples
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt
from brewjax.evaluate.predict import TaskExamples, predict
from tests.data.conftest import jobs, jobs_with, tokenizer  # noqa: F401 (fixtures)
from tests.tables import put, with_column, write_dataset
from tests.tiny import MODEL, params

TASK = Task.parse("""
name: apply
instruction: Predict whether they apply.
history: {actions: [viewed, applied], max_events: 30}
questions: {question: Will the member apply, actions: [viewed, applied], candidates_per_prompt: 8}
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - {word: "No", value: 0, match: {action: viewed}}
split: {validation: 60%, test: 80%}
""")


@pytest.fixture(scope="session")
def bundle(jobs, tokenizer) -> Bundle:  # noqa: F811
    model = MODEL.model_copy(update={"vocab_size": tokenizer.vocab_size})
    surfaces = {"jobs": Surface.fit("jobs", jobs, [TASK])}
    return Bundle(model, params(model), tokenizer, PromptConfig(max_tokens=300), surfaces)


def salaries(bundle: Bundle, dataset: Dataset, scales_of: Dataset | None = None) -> list[str]:
    """What is said of the salary of each job."""
    facts = bundle.verbalizer(dataset, TASK, scales_of=scales_of).facts(
        "items", np.arange(len(dataset.items)), 0, SECTIONED
    )
    return [fact for of_item in facts for fact in of_item if fact.startswith("Salary")]


def test_the_data_of_training_are_known_whatever_they_are_called(bundle, jobs, tmp_path, capsys):  # noqa: F811
    expected = salaries(bundle, jobs)
    renamed = write_dataset(tmp_path / "renamed", card=lambda text: text.replace("name: jobs", "name: posts"))
    assert salaries(bundle, Dataset.load(renamed)) == expected

    def with_one_more(events: pa.Table) -> pa.Table:
        again = events.slice(0, 1)
        time = pa.array([again["time"][0].as_py().replace(year=2027)], again["time"].type)
        return pa.concat_tables([events, with_column("time", time)(again)])

    later = write_dataset(tmp_path / "later", events=with_one_more)
    assert salaries(bundle, Dataset.load(later)) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("card", "items"),
    [
        (str, lambda table: with_column("salary", pa.array(np.arange(40) * 1e6))(table)),
        (lambda text: text.replace("percentile: true, unit", "unit"), lambda table: table),
        (
            lambda text: text.replace("experience, kind: number", "experience, kind: number, percentile: true"),
            lambda table: table,
        ),
    ],
    ids=["other values", "an attribute less", "an attribute more"],
)
def test_other_data_of_the_same_name_have_percentiles_of_their_own(bundle, tmp_path, capsys, card, items):
    dataset = Dataset.load(write_dataset(tmp_path / "jobs", card=card, items=items))
    surface = Surface.fit("jobs", dataset, [TASK])
    bundle_of_dataset = dataclasses.replace(bundle, surfaces={"jobs": surface})
    assert not bundle.surface().scales.fits(dataset)
    assert surface.scales.fits(dataset)
    assert salaries(bundle, dataset) == salaries(bundle_of_dataset, dataset)
    line = f"{dataset.path}: not the dataset that the model was trained on; scales are fitted to this one\n"
    assert capsys.readouterr().err == line
    salaries(bundle, dataset, scales_of=dataset)
    assert capsys.readouterr().err == "", "nobody asked for the scale of training"


def test_ids_of_tables_that_were_not_trained_on_are_unknown(bundle, tmp_path):
    attributes = "plural: jobs\n  attributes:\n"
    with_ids = attributes + "    - {column: item_id, kind: id, display_name: Job}\n"
    seconds = with_column("seconds", pa.array(np.arange(800.0)))  # no event is twice the same
    events = lambda table: seconds(pa.concat_tables([table] * 10))  # noqa: E731
    dataset = Dataset.load(
        write_dataset(tmp_path / "jobs", card=lambda text: text.replace(attributes, with_ids), events=events)
    )
    surface = Surface.fit("jobs", dataset, [TASK])
    trained = dataclasses.replace(bundle, surfaces={"jobs": surface})
    numbers = [
        {facts[0] for facts in each.verbalizer(dataset, TASK).facts("items", np.arange(40), 0, STYLES["ids"])}
        for each in (trained, bundle)
    ]
    assert numbers[0] > {"job#0", "job#1", "job#2"}
    assert numbers[1] == {"job#0"}


def test_tables_without_some_of_their_events_are_read_on_the_scales_of_all(bundle, jobs, capsys):  # noqa: F811
    cut = dataclasses.replace(jobs, events=jobs.events.slice(0, 20))
    assert salaries(bundle, cut, scales_of=jobs) == salaries(bundle, jobs)
    assert capsys.readouterr().err == ""
    assert salaries(bundle, cut) != salaries(bundle, jobs)


class Undecided:
    """In place of a scorer, which takes seconds to compile: every answer is as likely as the other."""

    def warm_up(self) -> None:
        pass

    def score_encoded(self, prompts: list[EncodedPrompt]) -> list[np.ndarray]:
        return [np.full((len(prompt.questions), 2), 0.5) for prompt in prompts]


def test_an_overlong_item_stops_no_evaluation(bundle, jobs, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Bundle, "scorer", lambda *_: Undecided())
    examples = list(build_examples(jobs, TASK, "test"))[:2]
    candidates = np.concatenate([example.candidates for example in examples])
    row = int(candidates[0])
    dataset = dataclasses.replace(jobs, items=put("title", row, "many words " * 900)(jobs.items))
    tasks = [
        TASK.model_copy(
            update={"name": overlong, "questions": TASK.questions.model_copy(update={"overlong": overlong})}
        )
        for overlong in ("truncate", "skip")
    ]
    cut, skipped = predict(bundle, [TaskExamples(dataset, task, examples) for task in tasks])
    assert cut.table["item"].to_pylist() == candidates.tolist()
    assert skipped.table["item"].to_pylist() == [item for item in candidates.tolist() if item != row]
    lines = capsys.readouterr().err.splitlines()
    for line, done in zip(
        lines, ("truncate: 1 text too long was truncated", "skip: 1 text too long was skipped"), strict=True
    ):
        assert line.startswith(f"{done}, job {100 + row} takes ")
        assert "most of them its 'title', where " in line


@pytest.fixture
def two(bundle, tmp_path) -> Bundle:
    """The model with a second surface, whose tables are of the same form, and whose task has the same name."""
    salaries_in_millions = with_column("salary", pa.array(np.arange(40) * 1e6))
    posts = Dataset.load(write_dataset(tmp_path / "posts", card=renamed("posts"), items=salaries_in_millions))
    return dataclasses.replace(bundle, surfaces=bundle.surfaces | {"posts": Surface.fit("posts", posts, [TASK])})


def test_a_folder_of_before_there_were_surfaces_is_refused(bundle, tmp_path):
    bundle.save(tmp_path)
    (tmp_path / "surfaces" / "jobs" / "dataset.yaml").rename(tmp_path / "dataset.yaml")
    with pytest.raises(ConfigError, match=r"written by an earlier brewjax, with dataset\.yaml outside of surfaces"):
        Bundle.load(tmp_path)


def test_a_folder_keeps_every_surface(two, tmp_path):
    two.save(tmp_path / "model")
    again = Bundle.load(tmp_path / "model")
    assert again.surfaces == two.surfaces
    assert again.task_names == ["jobs/apply", "posts/apply"]
    assert "tasks: jobs/apply, posts/apply" in repr(again)


def test_a_dataset_is_of_the_surface_with_its_card_or_of_the_one_named(two, jobs, tmp_path):  # noqa: F811
    posts = Dataset.load(tmp_path / "posts")
    assert [two.surface_of(dataset).name for dataset in (jobs, posts)] == ["jobs", "posts"]
    assert salaries(two, posts) != salaries(two, jobs)
    never_seen = Dataset.load(write_dataset(tmp_path / "films", card=renamed("films")))
    assert two.surface_of(never_seen) is None
    assert two.surface_of(never_seen, "posts") is two.surfaces["posts"]
    as_posts = two.verbalizer(jobs, TASK, "posts").facts("items", np.arange(40), 0, SECTIONED)
    assert as_posts != two.verbalizer(jobs, TASK, "jobs").facts("items", np.arange(40), 0, SECTIONED)


def test_what_surface_is_meant_must_be_clear(two, jobs, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"^name a surface, one of jobs, posts$"):
        two.surface()
    with pytest.raises(ConfigError, match=r"^no surface 'films'; there are: jobs, posts$"):
        two.surface_of(jobs, "films")
    twice = dataclasses.replace(two, surfaces=two.surfaces | {"again": two.surfaces["jobs"]})
    with pytest.raises(ConfigError, match="several surfaces of the model have a card 'jobs': name one of jobs, jobs"):
        twice.surface_of(jobs)
    numbers = Dataset.load(
        write_dataset(
            tmp_path / "numbers",
            card=lambda text: text.replace("experience, kind: number", "experience, kind: number, percentile: true"),
        )
    )
    with pytest.raises(ConfigError, match=r"surface 'posts' of the model has no scales of members.experience"):
        two.verbalizer(numbers, TASK, "posts")
    with pytest.raises(ConfigError, match="this model was imported"):
        dataclasses.replace(two, surfaces={}).surface()


def renamed(name: str) -> Callable[[str], str]:
    """A change of the card's name."""
    return lambda text: text.replace("name: jobs", f"name: {name}")


def test_what_is_no_model_folder_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such model folder"):
        Bundle.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "d_ff",
            64,
            r"params: layers.\w+ is \(.*\), and .*model.yaml makes it \(.*\): these are the weights of another",
        ),
        ("qkv_bias", True, r"params: layers.\w+_bias is none, and .*model.yaml makes it \(.*\)"),
        ("rope_base", 10_000, r"model.yaml:\d+: rope_base: unknown key 'rope_base'; did you mean 'rope_theta'\?"),
    ],
)
def test_a_folder_of_another_version_is_refused_in_one_line(bundle, tmp_path, key, value, message):
    bundle.save(tmp_path)
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message) as error:
        Bundle.load(tmp_path)
    assert "\n" not in str(error.value)
