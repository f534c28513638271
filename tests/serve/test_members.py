"""What a server says of a member is what training says."""

import dataclasses

import numpy as np
import pytest

from brewjax.data.prompts.styles import STYLES
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import build_examples, example_at
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.encoding import RequestEncoder
from brewjax.serve.members import render_member
from brewjax.serve.requests import request_from_example
from tests.serve.conftest import make_bundle
from tests.serve.serving import CONFIG
from tests.tables import write_dataset


@pytest.mark.parametrize("style", STYLES)
def test_a_request_is_said_as_in_training(bundle, dataset, tasks, style):
    prompts = bundle.prompts.model_copy(update={"score_style": style, "max_tokens": 900})
    bundle = dataclasses.replace(bundle, prompts=prompts)
    for task in tasks:
        verbalizer = bundle.verbalizer(dataset, task)
        examples = [*build_examples(dataset, task, "test"), example_at(dataset, task, 7)]
        assert any(len(example.history) for example in examples)
        for example in examples:
            unlabelled = dataclasses.replace(example, labels=np.full(len(example.candidates), -1, np.int32))
            for note in ("", "focus on location"):
                expected = verbalizer.prompt(task, unlabelled, style, note)
                assert render_member(bundle, task, request_from_example(dataset, task, example, note)) == expected


def test_an_item_has_the_number_of_its_id_in_a_request_too(tasks, tmp_path):
    attributes = "plural: jobs\n  attributes:\n"
    with_ids = attributes + "    - {column: item_id, kind: id, display_name: Job}\n"
    dataset = Dataset.load(write_dataset(tmp_path, card=lambda text: text.replace(attributes, with_ids)))
    bundle = make_bundle(dataset, tasks)
    bundle = dataclasses.replace(bundle, prompts=bundle.prompts.model_copy(update={"score_style": "ids"}))
    surface = bundle.surface()
    example = example_at(dataset, tasks[0], 7)
    known = [str(dataset.item_id(row)) for row in example.candidates[::2]]
    scales = Scales(until=0, quantiles=surface.scales.quantiles, vocabularies={"items.item_id": known})
    bundle = dataclasses.replace(bundle, surfaces={surface.name: dataclasses.replace(surface, scales=scales)})
    prompt = render_member(bundle, tasks[0], request_from_example(dataset, tasks[0], example))
    assert prompt == bundle.verbalizer(dataset, tasks[0], surface=surface.name).prompt(tasks[0], example, "ids")
    assert [question.text.split("|")[1] for question in prompt.questions[:4]] == ["job#1", "job#0", "job#2", "job#0"]


def test_events_come_in_any_order_and_later_ones_are_not_told(bundle, dataset, tasks):
    request = request_from_example(dataset, tasks[0], example_at(dataset, tasks[0], 7).select(slice(3)))
    expected = render_member(bundle, tasks[0], request)
    events = list(request.history)
    del request.history[:]
    request.history.extend(reversed(events))
    later = request.history.add(action="applied", item=events[0].item)
    later.time.FromMicroseconds(request.now.ToMicroseconds())
    assert render_member(bundle, tasks[0], request) == expected


def put(attributes, **values: pb.Value) -> None:
    for name, value in values.items():
        attributes[name].CopyFrom(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.history.add(action="bought"), r"member.history\[1\].action: no action 'bought'; actions: viewed"),
        (lambda m: m.history.add(action="viewed"), r"member.history\[1\].time: missing"),
        (
            lambda m: put(m.items[1].attributes, colour=pb.Value(text="red")),
            r"items\[1\].attributes: no attribute 'col",
        ),
        (lambda m: put(m.items[0].attributes, salary=pb.Value(text="a lot")), r"'salary'\]: a text; for a number give"),
        (lambda m: put(m.attributes, position=pb.Value(list=pb.Texts())), r"member.attributes\['position'\]: a list"),
        (lambda m: put(m.history[0].item, skills=pb.Value(text="SQL")), r"history\[0\].item\['skills'\]: a text"),
    ],
)
def test_errors_name_the_field(bundle, dataset, tasks, change, message):
    request = request_from_example(dataset, tasks[0], example_at(dataset, tasks[0], 1).select(slice(2)))
    assert len(request.history) == 1
    change(request)
    with pytest.raises(ValueError, match=message):
        render_member(bundle, tasks[0], request)


def test_an_overlong_item_is_cut_or_refused_as_the_request_says(bundle, dataset, tasks):
    request = request_from_example(dataset, tasks[0], example_at(dataset, tasks[0], 7).select(slice(2)))
    put(request.items[1].attributes, title=pb.Value(text="many words " * 900))
    encoder = RequestEncoder(bundle, "tiny@1", {}, CONFIG, 600)
    encoded = encoder.encode(pb.ScoreRequest(member=request), 10)
    assert encoded.prompt.context <= 600
    refused = pb.ScoreRequest(member=request, truncation=pb.ScoreRequest.REJECT)
    with pytest.raises(ValueError, match=r"^member.items\[1\].attributes: 9,900 characters"):
        encoder.encode(refused, 10)
