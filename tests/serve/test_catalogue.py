"""A member that is named by its id reads as the same member sent in full."""

import dataclasses

import numpy as np
import pytest

from brewjax.config import ConfigError
from brewjax.data.tasks.examples import build_examples, example_at
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.members import render_member
from brewjax.serve.requests import request_from_example
from tests.data.conftest import moment

NOW = moment(330)


@pytest.fixture(scope="module")
def catalogue(bundle, dataset) -> Catalogue:
    return Catalogue.load(dataset.path, bundle.surface())


def by_id(dataset, full: pb.Member, row: int) -> pb.Member:
    """A request with the ids alone of one that is sent in full."""
    items = [pb.Item(id=item.id) for item in full.items]
    return pb.Member(task=full.task, id=dataset.member_id(row), now=full.now, items=items)


@pytest.mark.parametrize("style", ["compact", "sectioned", "numbers"])
def test_ids_read_as_the_member_sent_in_full(bundle, dataset, tasks, catalogue, style):
    bundle = dataclasses.replace(bundle, prompts=bundle.prompts.model_copy(update={"score_style": style}))
    for task in tasks:
        examples = [*build_examples(dataset, task, "test"), example_at(dataset, task, 7, NOW)]
        assert any(len(example.history) for example in examples)
        for example in examples:
            full = request_from_example(dataset, task, example)
            prompt = render_member(bundle, task, by_id(dataset, full, example.member), catalogue)
            assert prompt == render_member(bundle, task, full)


def test_the_clock_is_now(bundle, dataset, tasks, catalogue):
    example = catalogue.example(tasks[0], pb.Member(id=dataset.member_id(7)))
    assert example.cutoff_time > dataset.event_time.max()
    start, end = dataset.member_offsets[7:9]
    assert example.num_past_events == end - start
    assert catalogue.past_items(example) == sorted(
        {dataset.item_id(row) for row in dataset.event_item[start:end]}, key=lambda id_: int(id_)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "nobody"}, r"^member.id: no member 'nobody' in the catalogue; ids look like"),
        ({"items": [pb.Item(id="100"), pb.Item(id="none")]}, r"^member.items\[1\].id: no item 'none' in the catalogue"),
        ({"attributes": {"position": pb.Value(text="Nurse")}}, r"^member.attributes: the catalogue has those"),
        ({"history": [pb.Event(action="viewed")]}, r"^member.history: the catalogue has those"),
        (
            {"items": [pb.Item(id="100", attributes={"title": pb.Value(text="x")})]},
            r"^member.items\[0\].attributes: with",
        ),
    ],
)
def test_errors_name_the_field(bundle, dataset, tasks, catalogue, change, message):
    fields = {"task": "apply", "id": dataset.member_id(0), "items": [pb.Item(id=dataset.item_id(0))]} | change
    with pytest.raises(ValueError, match=message):
        render_member(bundle, tasks[0], pb.Member(**fields), catalogue)


def test_a_server_without_a_catalogue_says_so(bundle, tasks):
    with pytest.raises(ValueError, match=r"^member.id: no catalogue of this surface"):
        render_member(bundle, tasks[0], pb.Member(task="apply", id="1"))


def test_another_card_is_refused(bundle, dataset):
    surface = bundle.surface()
    items = surface.card.items.model_copy(update={"attributes": surface.card.items.attributes[1:]})
    changed = dataclasses.replace(surface, card=surface.card.model_copy(update={"items": items}))
    with pytest.raises(ConfigError, match="its card's 'items' is not that of the model's training on surface 'jobs'"):
        Catalogue.load(dataset.path, changed)


def test_a_task_with_context_needs_the_exposures(dataset, tasks, catalogue):
    questions = tasks[0].questions.model_copy(update={"context": ("query",)})
    task = tasks[0].model_copy(update={"questions": questions})
    member = pb.Member(id=dataset.member_id(0), items=[pb.Item(id=dataset.item_id(0))])
    with pytest.raises(ValueError, match=r"^member.id: task 'apply' states query; send the member in full"):
        catalogue.example(task, member)
    assert np.array_equal(catalogue.example(tasks[0], member).candidates, [0])
