"""A union is explored as a dataset: each task ranks, and each typed event names, items of its own dataset alone."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from brewjax.data.tables.dataset import Dataset
from brewjax.explore.explorer import Explorer
from brewjax.explore.page import make_page
from tests.data.test_union import make_task, write_network
from tests.serve.conftest import make_bundle

HISTORY = "jobs.viewed, jobs.applied, posts.viewed, posts.liked"


@pytest.fixture(scope="module")
def union(tmp_path_factory) -> Explorer:
    """Knows a task of the jobs, and is given one of the posts."""
    dataset = Dataset.load(write_network(tmp_path_factory.mktemp("network")) / "union")
    explorer = Explorer(make_bundle(dataset, (make_task("jobs.", history=HISTORY),), max_tokens=1000), dataset)
    explorer.add_task(make_task("posts.", history=HISTORY, yes="liked").model_copy(update={"name": "likes"}))
    return explorer


def test_the_page_ranks_items_of_the_tasks_dataset_on_a_history_of_all(union):
    page = TestClient(make_page([union]), base_url="http://localhost")
    for task, origin in (("applies", "jobs"), ("likes", "posts")):
        edit = {"task": task, "member": "m1", "candidates": 4}
        answer = page.post("/rank", json=edit).json()
        assert {entry["item"].partition(".")[0] for entry in answer["ranking"]} == {origin}
        events = [event["text"] for event in answer["events"]]
        assert any(text.startswith("has viewed: ") for text in events)
        assert any(text.startswith("has seen: Post 1") for text in events)
        reasons = page.post("/why", json={"edit": edit, "item": answer["ranking"][0]["item"]}).json()
        assert {"event", "profile", "item"} <= {part["kind"] for part in reasons["effects"]}


def test_an_item_of_another_dataset_is_no_candidate(union):
    with pytest.raises(ValueError, match=r"no job 'posts\.101'; ids look like 'jobs\.100'"):
        union.context("m0", task="applies", items=["jobs.103", "posts.101"])
    assert union.context("m0", task="likes", items=["posts.101"]).item_ids == ["posts.101"]


def test_a_typed_event_is_on_an_item_of_its_actions_dataset(union):
    lines = ["jobs.viewed: jobs.101 | jobs.seconds=30", "posts.liked: post 3 | posts.slot=2"]
    context = union.context(typed_events=lines, task="applies", items=3)
    rows = context.dataset.event_item[context.in_budget]
    assert [context.dataset.item_id(row) for row in rows] == ["jobs.101", "posts.103"]
    for line, message in {
        "jobs.viewed: posts.101": r"line 1: no job has the id or name 'posts\.101'",
        "posts.liked: jobs.101": r"line 1: no post has the id or name 'jobs\.101'",
        "jobs.viewed: Post 3": "line 1: no job has the id or name 'Post 3'",
    }.items():
        with pytest.raises(ValueError, match=message):
            union.context(typed_events=[line], task="applies", items=3)
