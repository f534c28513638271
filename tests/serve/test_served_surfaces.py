"""A server whose model has two surfaces is served for either, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import httpx
import numpy as np
import pyarrow as pa
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import example_at
from brewjax.data.tasks.task import Task
from brewjax.retrieve.encoder import Encoder, EncoderConfig
from brewjax.serve import Client
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.encoding import RequestEncoder
from brewjax.serve.requests import request_from_example
from brewjax.serve.server import Server
from tests.data.conftest import moment
from tests.serve.conftest import APPLY
from tests.serve.serving import CONFIG, probabilities, refusal, running
from tests.tables import with_column, write_dataset

NOW = moment(330)


@pytest.fixture(scope="module")
def posts(tmp_path_factory) -> Dataset:
    """The tables of the jobs as posts, one of whose attributes has other values."""
    card = lambda text: text.replace("name: jobs", "name: posts").replace("noun: job", "noun: post")  # noqa: E731
    salary = with_column("salary", pa.array(np.arange(40) * 1e6))
    return Dataset.load(write_dataset(tmp_path_factory.mktemp("posts"), items=salary, card=card))


@pytest.fixture(scope="module")
def surfaces(dataset, tasks, posts) -> dict[str, tuple[Dataset, Task]]:
    """Dataset and task of each surface; the tasks have one name."""
    return {"jobs": (dataset, tasks[0]), "posts": (posts, Task.parse(APPLY.replace("the job", "the post")))}


@pytest.fixture(scope="module")
def two(bundle, surfaces) -> Bundle:
    of_posts, task = surfaces["posts"]
    return dataclasses.replace(bundle, surfaces={**bundle.surfaces, "posts": Surface.fit("posts", of_posts, [task])})


@pytest.fixture(scope="module")
def served(bundle, two, surfaces, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("two")
    two.save(folder / "model")
    Encoder(bundle, EncoderConfig()).save(folder / "encoder")  # of jobs alone
    update = {
        "catalogue": {name: str(dataset.path) for name, (dataset, _) in surfaces.items()},
        "encoder": str(folder / "encoder"),
        "token_buckets": (1024,),
    }
    with running(folder / "model", CONFIG.model_copy(update=update)) as server:
        yield server


@pytest.fixture(scope="module")
def caller(served) -> Iterator[Client]:
    with Client(f"127.0.0.1:{served.port}") as client:
        yield client


@pytest.mark.parametrize("name", ["jobs", "posts"])
def test_either_surface_is_scored_as_in_evaluation(caller, two, surfaces, name):
    dataset, task = surfaces[name]
    example = example_at(dataset, task, 7, NOW)
    prompt = two.verbalizer(dataset, task).prompt(task, example, two.prompts.score_style)
    assert ("the post" in prompt.preamble) == (name == "posts")
    full = request_from_example(dataset, task, example, surface=name)
    items = [pb.Item(id=item.id) for item in full.items]
    by_id = pb.Member(task=task.name, surface=name, id="m7", now=full.now, items=items)
    expected = two.scorer([two.encode(prompt)]).score(prompt)
    for member in (full, by_id):
        np.testing.assert_allclose(probabilities(caller.score(member)), expected, atol=1e-5)


def test_the_server_says_which_surfaces_it_has(caller):
    assert [(task.surface, task.name) for task in caller.describe().tasks] == [
        ("jobs", "apply"),
        ("jobs", "view"),
        ("posts", "apply"),
    ]


def test_a_surface_must_be_named_and_known(caller):
    member = pb.Member(task="apply", id="m7", items=[pb.Item(id="100")])
    assert "member.surface: name a surface, one of jobs, posts" in refusal(lambda: caller.score(member))
    member.surface = "films"
    assert "member.surface: no surface 'films'; there are: jobs, posts" in refusal(lambda: caller.score(member))
    member.surface, member.task = "posts", "view"
    assert "member.task: no task 'view'; tasks: apply" in refusal(lambda: caller.score(member))


def test_an_encoder_embeds_members_of_its_own_surface(served):
    with httpx.Client(base_url=f"http://127.0.0.1:{served.http_port}", timeout=60) as http:
        embed = lambda surface: http.post(  # noqa: E731
            "/v1/embed", json={"inputs": [{"member": {"id": "m7", "surface": surface}}]}
        )
        assert len(embed("jobs").raise_for_status().json()["vectors"]) == 1
        assert "member.surface: the catalogue's 'items' are not those of the encoder" in embed("posts").text


def test_settings_of_a_surface_name_it(two, surfaces):
    config = CONFIG.model_copy(update={"tasks": ("saves.yaml",), "catalogue": {"films": "films"}})
    with pytest.raises(ConfigError, match="tasks: name a surface, one of jobs, posts"):
        config.by_surface("tasks", two)
    with pytest.raises(ConfigError, match="catalogue: no surface 'films'; there are: jobs, posts"):
        config.by_surface("catalogue", two)
    with pytest.raises(ConfigError, match="no surface 'films'"):
        RequestEncoder(two, "tiny@1", {"films": [surfaces["posts"][1]]}, CONFIG, 600)
