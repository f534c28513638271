"""A union asks of each dataset what the dataset alone asks, states what is true alone, and reads one history of all."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from brewjax.bundle.surface import Surface
from brewjax.config import ConfigError
from brewjax.data.prompts.styles import STYLES
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset, dataset_names, hash_dataset, write_tables
from brewjax.data.tables.excerpt import load_excerpt
from brewjax.data.tables.facts import Fact, FactGroup
from brewjax.data.tables.reading import TEXT
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.statistics import FactValues
from brewjax.data.tables.union import UnionCard, UnitedCard
from brewjax.data.tables.union_tables import unite_tables
from brewjax.data.tasks.examples import RankingExample, build_examples, example_at, unanswered
from brewjax.data.tasks.questions import find_questions
from brewjax.data.tasks.task import Split, Task
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.members import read_member
from brewjax.serve.requests import request_from_catalogue, request_from_example
from tests.data.conftest import Event, moment
from tests.data.tables.test_excerpt import FACTS, with_facts
from tests.tables import CARD_YAML, put, write_dataset

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MEMBERS, JOBS, POSTS, LAST_DAY = 8, 6, 5, 9
MORE_FACTS = """\
    - {name: along, together: [viewed], buckets: null}
    - {name: applied alike, rate: [applied], by: company, shrink: 2, buckets: 5}
    - {name: near, neighbors: seconds, buckets: null}
"""
JOBS_CARD = with_facts(CARD_YAML, FACTS.replace("  pairs:\n", "  pairs:\n" + MORE_FACTS))
POSTS_CARD = """\
name: posts
members:
  attributes:
    - {column: location, kind: category}
    - {column: premium, kind: category}
items:
  noun: post
  plural: posts
  available: {from: written}
  attributes:
    - {column: title, kind: text}
    - {column: company, kind: category}
    - {column: length, kind: number, buckets: 4}
events:
  actions: {viewed: {past: has seen}, liked: {past: has liked}}
  attributes: [{column: slot, kind: number}]
facts:
  members: [{name: likes, rate: [liked], shrink: 2, buckets: null}]
  items: [{name: popularity, count: [liked], buckets: 5}]
  pairs: [{name: seen, count: [viewed], buckets: null}]
"""
UNION = """\
name: network
include: {jobs: ../jobs, posts: ../posts}
facts:
  members: [{name: everything, count: [jobs.applied, posts.liked], buckets: null}]
  pairs: [{name: company liked, share: [jobs.viewed, posts.liked], by: company, buckets: null}]
"""
TASK = """\
name: applies
instruction: Predict.
history: {{actions: [{history}], max_events: 12}}
questions:
  question: Will the member apply
  actions: [{0}viewed, {0}{yes}]
  window_days: 0.5
  span_days: 99
  candidates_per_prompt: 3
  {asks}
labels:
  - {{word: "Yes", value: 1, match: {{action: {0}{yes}}}}}
  - {{word: "No", value: 0, {no}}}
split: {{validation: 2025-01-05, test: 2025-01-07}}
"""
NEGATIVES = (
    "",
    "repeats: true",
    'sampled_negatives: {{label: "No", per_event: 2}}',
    'sampled_negatives: {{label: "No", per_event: 2, popularity: 0.5}}',
    'sampled_negatives: {{label: "No", per_event: 1, same: {0}company}}',
    "where: {{item.{0}company: Acme, member.location: [Berlin, Oslo]}}",
)


def make_task(of: str = "", asks: str = "", history: str = "", yes: str = "applied") -> Task:
    """A task of the jobs, or of the posts, which are liked; alone, or `of` "jobs." or "posts." of the union."""
    no = "match: null" if "negatives" in asks else f"match: {{action: {of}viewed}}"
    text = TASK.format(of, asks=asks.format(of), history=history or f"{of}viewed, {of}{yes}", no=no, yes=yes)
    return Task.parse(text, "applies.yaml")


def events(actions: list[str], items: int) -> st.SearchStrategy[list[Event]]:
    """Few days and items: most events share their time with others of the same member, and their item too."""
    event = st.builds(
        Event,
        st.integers(0, MEMBERS - 1),
        st.integers(0, items - 1),
        st.sampled_from(actions),
        st.integers(0, LAST_DAY - 1),
        st.one_of(st.none(), st.integers(0, 5).map(float)),
    )
    return st.lists(event, min_size=1, max_size=40)


JOB_EVENTS, POST_EVENTS = events(["viewed", "applied"], JOBS), events(["viewed", "liked"], POSTS)


class Network(NamedTuple):
    """Jobs and posts, alone and together; and the jobs as the only dataset of a union."""

    jobs: Dataset
    posts: Dataset
    union: Dataset
    of_one: Dataset


Make = Callable[[list[Event], list[Event]], Network]


def write_posts(path: Path) -> Path:
    """Posts of some of the jobs' members, and of two whom the jobs do not know."""
    path.mkdir(parents=True, exist_ok=True)
    members = [f"m{i}" for i in (0, 1, 3, 7, 8, 9)]
    locations = {"m0": "Berlin", "m1": "Lisbon", "m3": "Berlin", "m7": None, "m8": "Oslo", "m9": None}
    write_tables(
        path,
        members=pa.table(
            {"member_id": members, "location": [locations[m] for m in members], "premium": ["yes", "no"] * 3}
        ),
        items=pa.table(
            {
                "item_id": range(100, 100 + POSTS),  # as the jobs
                "title": [f"Post {i}" for i in range(POSTS)],
                "company": ["Acme", "Globex", None, "Acme", "Umbrella"],
                "length": pa.array([1.5, None, 3.0, 2.0, 8.0]),
                "written": pa.array([moment(i - 3) for i in range(POSTS)], pa.timestamp("us", "UTC")),
            }
        ),
        events=events_table([Event(0, 0, "liked", 4, 1.0), Event(1, 1, "viewed", 5, 2.0)], members, "slot"),
    )
    (path / CARD).write_text(POSTS_CARD)
    return path


def events_table(listed: list[Event], members: list[str], column: str) -> pa.Table:
    return pa.table(
        {
            "member_id": pa.array([members[event.member % len(members)] for event in listed], TEXT),
            "item_id": pa.array([100 + event.item for event in listed], pa.int64()),
            "action": pa.array([event.action for event in listed], TEXT),
            "time": pa.array([moment(event.day) for event in listed], pa.int64()).cast(pa.timestamp("us", "UTC")),
            column: pa.array([event.seconds for event in listed], pa.float64()),
        }
    )


def write_network(path: Path) -> Path:
    """Jobs and posts, and as "union" and "one" their union and that of the jobs alone."""
    write_dataset(path / "jobs", card=lambda _: JOBS_CARD)
    write_posts(path / "posts")
    for name, text in (("union", UNION), ("one", "name: one\ninclude: {jobs: ../jobs}\n")):
        (path / name).mkdir()
        (path / name / CARD).write_text(text)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def make(folder) -> Make:
    """Makes the network of some events."""
    loaded = {name: Dataset.load(folder / name) for name in ("jobs", "posts", "union", "one")}

    def with_events(dataset: Dataset, listed: list[Event], items: int, column: str) -> Dataset:
        members = dataset.members["member_id"].to_pylist()
        tables = dataset.members, dataset.items.slice(0, items), events_table(listed, members, column)
        return Dataset.of_tables(dataset.path, dataset.card, *tables)

    def make(jobs: list[Event], posts: list[Event]) -> Network:
        alone = with_events(loaded["jobs"], jobs, JOBS, "seconds"), with_events(loaded["posts"], posts, POSTS, "slot")
        united = {"union": dict(zip(("jobs", "posts"), alone, strict=True)), "one": {"jobs": alone[0]}}
        of = {
            name: Dataset.of_tables(folder / name, loaded[name].card, *unite_tables(loaded[name].card, each))
            for name, each in united.items()
        }
        return Network(*alone, of["union"], of["one"])

    return make


def by_ids(dataset: Dataset, example: RankingExample, of: str = "") -> tuple:
    """An example by ids: what is asked of whom, when, with which answers and past."""
    return (
        dataset.member_id(example.member),
        example.cutoff_time,
        [f"{of}{dataset.item_id(row)}" for row in example.candidates],
        example.labels.tolist(),
        [(f"{of}{dataset.item_id(dataset.event_item[row])}", int(dataset.event_time[row])) for row in example.history],
        example.seed,
    )


@hypothesis.given(JOB_EVENTS, st.sampled_from(NEGATIVES))
@hypothesis.settings(max_examples=25, deadline=None)
def test_a_union_of_one_dataset_is_the_dataset(make, jobs, asks):
    network = make(jobs, [])
    alone, united = make_task("", asks), make_task("jobs.", asks)
    for split in SPLITS:
        pairs = itertools.zip_longest(
            build_examples(network.jobs, alone, split), build_examples(network.of_one, united, split)
        )
        for first, second in pairs:
            assert first is not None
            assert second is not None
            assert all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))
            assert by_ids(network.jobs, first, "jobs.") == by_ids(network.of_one, second)
    until = moment(5)
    quantiles = Scales.fit(network.jobs, until).quantiles
    renamed = {plain_name(key): scale for key, scale in Scales.fit(network.of_one, until).quantiles.items()}
    assert renamed == quantiles


@hypothesis.given(JOB_EVENTS, POST_EVENTS, st.sampled_from(NEGATIVES), st.sampled_from(["jobs", "posts"]))
@hypothesis.settings(max_examples=25, deadline=None)
def test_another_dataset_changes_no_question_and_is_never_asked_about(make, jobs, posts, asks, name):
    network = make(jobs, posts)
    dataset, yes = (network.jobs, "applied") if name == "jobs" else (network.posts, "liked")
    alone, united = make_task("", asks, yes=yes), make_task(f"{name}.", asks, "jobs.applied, posts.liked", yes)
    for split in SPLITS:
        examples = list(build_examples(network.union, united, split))
        expected = [by_ids(dataset, each, f"{name}.") for each in build_examples(dataset, alone, split)]
        without_history = [(*each[:4], each[5]) for each in expected]
        assert [(*(ids := by_ids(network.union, each))[:4], ids[5]) for each in examples] == without_history
        for example in examples:
            past = network.union.event_time[example.history]
            assert (past < example.cutoff_time).all()
            assert (np.diff(past) >= 0).all()
            assert {network.union.action_name(row) for row in example.history} <= {"jobs.applied", "posts.liked"}
    for member in range(len(network.union.members)):
        try:
            candidates = example_at(network.union, united, member, moment(6)).candidates
        except ValueError:
            continue
        assert all(network.union.item_id(row).startswith(f"{name}.") for row in candidates)


def test_an_answer_is_known_until_its_own_dataset_ends(make):
    """Posts go on after the jobs' last day; whether a member applies within 5 days of the view is not known by that."""
    network = make(
        [Event(0, 0, "viewed", 1), Event(0, 1, "viewed", 8)], [Event(0, 0, "liked", 2), Event(0, 0, "liked", 20)]
    )
    text = TASK.format("jobs.", history="posts.liked", asks="outcomes: [jobs.applied]", no="match: null", yes="applied")
    text = text.replace("actions: [jobs.viewed, jobs.applied]", "actions: [jobs.viewed]").replace(
        "window_days: 0.5", "window_days: 5"
    )
    questions = find_questions(network.union, Task.parse(text))
    assert (network.union.event_time[questions.events] == moment(1)).all()
    assert len(questions.events) == 1


@hypothesis.given(JOB_EVENTS, POST_EVENTS, st.integers(0, LAST_DAY))
@hypothesis.settings(max_examples=25, deadline=None)
def test_facts_of_each_dataset_are_what_they_are_alone(make, jobs, posts, day):
    network = make(jobs, posts)
    for name, alone in (("jobs", network.jobs), ("posts", network.posts)):
        ids = network.union.members["member_id"].to_pylist()
        members, items = (each.ravel() for each in np.indices((len(alone.members), len(alone.items))))
        united_members = np.array([ids.index(member) for member in alone.members["member_id"].to_pylist()])[members]
        united_items = network.union.item_rows([f"{name}.{alone.item_id(row)}" for row in range(len(alone.items))])
        times = np.full(len(members), moment(day))
        for (group, fact), (_, united) in zip(own_facts(alone, ""), own_facts(network.union, name), strict=True):
            assert united.name == f"{name}.{fact.name}"
            if group == "events":
                of_dataset = np.flatnonzero(network.union.event_origin == [*network.union.card.origins].index(name))
                values = FactValues.of(network.union).event_values(united, of_dataset)
                every = FactValues.of(alone).event_values(fact, np.arange(len(alone.events)))
                np.testing.assert_array_equal(np.sort(values), np.sort(every))
                continue
            values = FactValues.of(network.union).values(group, united, united_members, united_items[items], times)
            expected = FactValues.of(alone).values(group, fact, members, items, times)
            if fact.neighbors:  # sums over members, who are in another order
                np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)
            else:
                np.testing.assert_array_equal(values, expected, err_msg=united.name)
    fitted = Scales.fit(network.union, moment(day)).quantiles
    for name, alone in (("jobs", network.jobs), ("posts", network.posts)):
        for key, scale in Scales.fit(alone, moment(day)).quantiles.items():
            table, _, column = key.partition(".")
            if table != "members" or column not in ("experience",):
                assert fitted[f"{table}.{name}.{column}"] == scale


def own_facts(dataset: Dataset, origin: str) -> list[tuple[FactGroup, Fact]]:
    return list(dataset.card.facts_by_origin[origin].declared())


def plain_name(key: str) -> str:
    """A key of scales, without the dataset's name."""
    table, _, column = key.partition(".")
    return f"{table}.{column.removeprefix('jobs.')}"


class Without(FactValues):
    """Facts of a dataset, some of them unknown."""

    def __init__(self, dataset: Dataset, *names: str):
        super().__init__(dataset)
        self._unknown = names

    def values(self, group, fact, members, items, times) -> np.ndarray:
        values = super().values(group, fact, members, items, times)
        return np.full(len(values), np.nan) if fact.name in self._unknown else values


@hypothesis.given(JOB_EVENTS, POST_EVENTS, st.integers(0, LAST_DAY), st.integers(0, MEMBERS - 1))
@hypothesis.settings(max_examples=25, deadline=None)
def test_no_prompt_tells_of_what_happens_later(make, jobs, posts, day, member):
    full = make(jobs, posts)
    before = make(*([event for event in listed if event.day < day] for listed in (jobs, posts)))
    task = make_task("jobs.", history="jobs.viewed, jobs.applied, posts.viewed, posts.liked")
    scales, tokenizer = Scales.fit(full.union, moment(5)), Tokenizer.byte_level()
    texts = []
    for network in (full, before):
        # Similarities are of periods whose bounds are shares of all events; what they are fitted on is before them.
        facts = Without(network.union, "jobs.along", "jobs.near")
        verbalizer = Verbalizer(network.union, scales, tokenizer, 10_000, facts=facts)
        candidates = np.flatnonzero(network.union.items_of("jobs.viewed")).astype(np.int32)
        example = unanswered(network.union, task, member, moment(day), candidates)
        texts.append([verbalizer.prompt(task, example, style) for style in STYLES])
    assert texts[0] == texts[1]


LOGS = (
    [Event(0, 0, "viewed", 1, 5.0), Event(0, 1, "applied", 2, 3.0), Event(0, 2, "viewed", 6, 1.0)],
    [Event(0, 0, "liked", 1, 2.0), Event(0, 3, "viewed", 3, 4.0), Event(0, 1, "liked", 7, 1.0)],
)


def test_an_item_is_described_as_in_its_own_dataset(make):
    """In styles without names, too, where the position of a value stands for its name."""
    network, tokenizer = make(*LOGS), Tokenizer.byte_level()
    alone, united = make_task(), make_task("jobs.", history="jobs.viewed, jobs.applied")
    for style in STYLES:
        prompts = []
        for dataset, task in ((network.jobs, alone), (network.union, united)):
            facts = Without(dataset, "company liked")
            verbalizer = Verbalizer(dataset, Scales.fit(dataset, moment(5)), tokenizer, 10_000, facts=facts)
            example = next(build_examples(dataset, task, "train")).select(slice(0, 3))
            example = unanswered(dataset, task, example.member, moment(8), example.candidates)
            prompts.append(verbalizer.prompt(task, example, style))
        assert prompts[0].events == prompts[1].events
        # The union's own fact, here unknown, has a place at the end where facts have no names.
        alone_text, united_text = ([question.text for question in prompt.questions] for prompt in prompts)
        assert alone_text == [text.replace("|\n", "\n") for text in united_text]


def test_a_prompt_reads_as_one_history(make):
    network, tokenizer = make(*LOGS), Tokenizer.byte_level()
    task = make_task("jobs.", history="jobs.viewed, jobs.applied, posts.liked")
    verbalizer = Verbalizer(network.union, Scales.fit(network.union, moment(5)), tokenizer, 10_000)
    example = unanswered(network.union, task, 0, moment(9), np.array([3], np.int32))
    chat = verbalizer.prompt(task, example, "key-value").events
    assert [text.partition("Title")[0] for text in chat] == [
        "event: Age=1w; Action=has viewed the job; Seconds=5; ",
        "event: Age=1w; Action=has liked the post; Slot=2; ",
        "event: Age=1w; Action=has applied to the job; Seconds=3; ",
        "event: Age=3d; Action=has viewed the job; Seconds=1; ",
        "event: Age=2d; Action=has liked the post; Slot=1; ",
    ]
    assert chat[1].endswith("Title=Post 0; Company=Acme; Length=1/4\n")
    prompt = verbalizer.prompt(task, example, "sectioned")
    assert "## Past item interaction data" in prompt.preamble
    assert "Everything: 3" in prompt.preamble
    assert "Likes: " in prompt.preamble
    text = "".join(prompt.events)
    for group in (
        "has viewed the following jobs",
        "has applied to the following jobs",
        "has liked the following posts",
    ):
        assert f"The member {group}:\n" in text
    assert "Company liked: " in prompt.questions[0].text
    examples = [example, unanswered(network.union, task, 1, moment(9), np.array([2, 3], np.int32))]
    for alone, prefetched in zip(examples, verbalizer.with_facts(examples), strict=True):
        assert verbalizer.prompt(task, prefetched, "sectioned") == verbalizer.prompt(task, alone, "sectioned")


def test_a_fact_of_the_union_counts_in_all_datasets(make):
    network = make(*LOGS)
    facts = {fact.name: (group, fact) for group, fact in network.union.card.facts_by_origin[""].declared()}
    items = network.union.item_rows(["jobs.100", "jobs.103", "posts.100"])  # of Acme, Acme and Acme
    assert network.union.items["company"].take(pa.array(items)).to_pylist() == ["Acme"] * 3
    rows = np.zeros(3, np.int64), items, np.full(3, moment(9))
    assert FactValues.of(network.union).values(*facts["everything"], *rows).tolist() == [3, 3, 3]
    # Of two views of jobs of Acme, and likes of posts of Acme and of Globex.
    assert FactValues.of(network.union).values(*facts["company liked"], *rows).tolist() == [3 / 4] * 3


def test_a_request_is_read_as_the_tables_are(make):
    network = make(*LOGS)
    task = make_task("jobs.", history="jobs.viewed, jobs.applied, posts.liked")
    scales, tokenizer = Scales.fit(network.union, moment(5)), Tokenizer.byte_level()
    example = unanswered(network.union, task, 0, moment(9), np.array([3, 4], np.int32))
    request = request_from_example(network.union, task, example)
    tables = read_member(network.union.card, task, request)
    for style in STYLES:
        expected = Verbalizer(network.union, scales, tokenizer, 10_000).prompt(task, example, style)
        read = Verbalizer(tables.dataset, scales, tokenizer, 10_000, facts=tables.facts)
        assert read.prompt(task, tables.example, style) == expected
    request.items[0].attributes["posts.length"].number = 3
    with pytest.raises(
        ValueError, match=r"member\.items\[0\]\.attributes: no attribute 'posts\.length'; attributes: jobs"
    ):
        read_member(network.union.card, task, request)

    catalogue = Catalogue(network.union)
    by_id = request_from_catalogue(network.union, task, example)
    by_id.items.add(id="jobs.103")
    assert catalogue.example(task, by_id).candidates.tolist() == [3]
    by_id.items.add(id="posts.101")
    with pytest.raises(ValueError, match=r"items\[1\]\.id: 'posts\.101' is none of jobs, which task 'applies' asks"):
        catalogue.example(task, by_id)


def test_a_union_on_disk(folder, tmp_path):
    union = Dataset.load(folder / "union")
    assert len(union.items) == 40 + POSTS
    assert union.members["member_id"].to_pylist() == [f"m{i}" for i in range(10)]
    assert union.members["location"].to_pylist()[-2:] == ["Oslo", None]
    assert union.members["premium"].to_pylist()[:4] == ["yes", "no", None, "yes"]
    assert union.item_name(int(union.item_rows(["posts.101"])[0])) == "Post 1"
    assert (np.diff(union.event_member) >= 0).all()
    excerpt = load_excerpt(folder / "union", ["m0"])
    assert excerpt.events.equals(union.events)  # a union is read whole

    scales = Scales.fit(union, moment(100))
    Surface("network", union.card, scales, (make_task("jobs."),)).save(tmp_path / "network")
    loaded = Surface.load(tmp_path / "network")
    assert loaded.card == union.card
    assert loaded.card.origins == union.card.origins
    assert scales.fits(dataclasses.replace(union, card=loaded.card))

    names = dataset_names(folder / "union")
    assert [name for name, _ in names] == ["network", "jobs", "posts"]
    assert names[1][1] == hash_dataset(folder / "jobs")
    card = (folder / "posts" / CARD).read_text()
    (folder / "posts" / CARD).write_text(card + "# changed\n")
    assert hash_dataset(folder / "union") != names[0][1]
    (folder / "posts" / CARD).write_text(card)
    assert hash_dataset(folder / "union") == names[0][1]


TASK_ERRORS = {
    "actions: [jobs.viewed, posts.viewed]": "questions.actions.1: 'posts.viewed' is of another dataset than 'jobs.",
    "actions: [viewed]": "the dataset has no action 'viewed'; did you mean",
    "actions: [jobs.viewed]\n  context: [posts.slot]": "events have no attribute 'posts.slot'",
    "actions: [jobs.viewed]\n  per_request: true": "names no 'events.request'",
}


@pytest.mark.parametrize("asks", TASK_ERRORS)
def test_a_task_is_refused(folder, asks):
    text = TASK.format("jobs.", asks="", history="posts.liked", no="match: {action: jobs.viewed}", yes="applied")
    text = text.replace("actions: [jobs.viewed, jobs.applied]", asks)
    with pytest.raises(ConfigError) as error:
        Task.parse(text, "applies.yaml").check(Dataset.load(folder / "union"))
    assert TASK_ERRORS[asks] in str(error.value)


CARD_ERRORS: dict[str, tuple[str, str, str]] = {  # what is changed in the union's card or the posts', and the error
    "a union in it": (
        "include: {jobs: ../jobs, posts: ../posts}",
        "include: {jobs: ../jobs, posts: ../one}",
        "dataset.yaml:2: include.posts: {folder}/union/../one is a union; include the datasets of it",
    ),
    "no folder": ("posts: ../posts", "posts: ../pots", "/pots: no such folder; did you mean"),
    "a bad name": ("{jobs: ../jobs, posts", "{item: ../jobs, posts", "include.item: 'item': expected small letters"),
    "an attribute": (
        "- {column: location, kind: category}\n    - {column: premium",
        "- {column: location, kind: text}\n    - {column: premium",
        "include.posts: its card describes the members' 'location' in another way than that of 'jobs'",
    ),
    "a noun": ("members:\n", "members:\n  noun: user\n", "its card calls a member 'user', where that of 'jobs' says"),
    "no times": ("events:\n  actions", "events:\n  time: null\n  actions", "include.posts: its events have no times"),
    "a kind": (
        "{column: company, kind: category}\n    - {column: length",
        "{column: company, kind: text}\n    - {column: length",
        "facts: the items' 'company' is a category in 'jobs', a text in 'posts'; a fact of all needs one kind",
    ),
    "an action": ("[jobs.viewed, posts.liked]", "[viewed]", "facts.pairs.0.share.0: unknown action 'viewed'; did you"),
    "a fact's name": ("everything, count", "likes, count", "facts.members.0.name: 'posts' has a fact 'likes' already"),
    "a column": (
        "pairs: [{name: company liked, share: [jobs.viewed, posts.liked], by: company,",
        "items: [{name: odd, mean: slot,",
        "facts.items.0.mean: events have no column 'slot'; did you mean 'posts.slot'?",
    ),
    "a similarity": (
        "pairs: [{name: company liked, share: [jobs.viewed, posts.liked], by: company,",
        "pairs: [{name: alike, similarity: vectors.parquet,",
        "facts.pairs.0.similarity: a union has no vectors of its own; state the fact in the card of a dataset that has",
    ),
    "an age": ("everything, count: [jobs.applied, posts.liked]", "old, age: born", "facts.members.0.age: no attribute"),
}


@pytest.fixture
def copy(tmp_path) -> Path:
    """The network in files that a test may change."""
    return write_network(tmp_path)


@pytest.mark.parametrize("name", CARD_ERRORS)
def test_a_card_is_refused(copy, name):
    old, new, message = CARD_ERRORS[name]
    files = [copy / part / CARD for part in ("union", "posts")]
    assert sum(file.read_text().count(old) for file in files) == 1
    for file in files:
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError) as error:
        Dataset.load(copy / "union")
    assert message.replace("{folder}", str(copy)) in str(error.value)
    assert str(error.value).startswith(str(copy))


def test_members_of_two_minds_are_refused(copy):
    write_dataset(copy / "jobs", members=put("location", 1, "Oslo"), card=lambda _: JOBS_CARD)
    with pytest.raises(ConfigError) as error:
        Dataset.load(copy / "union")
    assert str(error.value) == (
        f"{copy}/union/dataset.yaml:2: include.posts: 'jobs' and 'posts' disagree on the members' column 'location': "
        "'Oslo' and 'Lisbon' of member 'm1'; make both the same, or rename one"
    )
    numbers = lambda table: table.set_column(0, "member_id", pa.array(range(len(table))))  # noqa: E731
    log = lambda table: table.set_column(0, "member_id", pa.array([0] * len(table)))  # noqa: E731
    write_dataset(copy / "jobs", members=numbers, events=log, card=lambda _: JOBS_CARD)
    with pytest.raises(ConfigError, match="ids of its members are texts, where those of 'jobs' are int64"):
        Dataset.load(copy / "union")


def test_facts_of_members_that_read_alike_are_told_apart(folder):
    cards = {name: Card.load(folder / name / CARD) for name in ("jobs", "posts")}
    likes = Card.parse(POSTS_CARD.replace("name: likes", "name: applies"))
    union = UnitedCard.of_cards(UnionCard.parse(UNION), {**cards, "posts": likes})
    assert [fact.stated_name for fact in union.facts.members] == [
        "Generosity",
        "Applies (jobs)",
        "Applies (posts)",
        "Everything",
    ]
