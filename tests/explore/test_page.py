"""The page without a browser: its answers, its errors, and what it forbids."""

from __future__ import annotations

import json
import socket

import pytest
import yaml
from starlette.testclient import TestClient

from brewjax.data.tasks.task import Task
from brewjax.data.text.prompt import Prompt
from brewjax.explore.page import make_page
from tests.explore.conftest import ZOOKEEPER

EDIT = {"task": "apply", "member": "m5", "candidates": 4}


@pytest.fixture(scope="module")
def page(planted, explorer) -> TestClient:
    return TestClient(make_page([planted, explorer]), base_url="http://localhost")


def test_the_page_loads_nothing_from_elsewhere(page):
    response = page.get("/")
    assert response.status_code == 200
    assert "http://" not in response.text
    assert "https://" not in response.text
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    for name in ("explore.js", "explore.css", "sortable-1.15.7.min.js", "icon.svg"):
        assert page.get(f"/static/{name}").status_code == 200


def test_the_ranking_is_that_of_the_library(page, planted):
    answer = page.post("/rank", json=EDIT).json()
    context = planted.context("m5", items=4)
    assert [entry["item"] for entry in answer["ranking"]] == context.rank()["item"].tolist()
    assert answer["ranking"][0]["log_odds"] == pytest.approx(context.rank()["log_odds"].iloc[0], abs=1e-5)
    assert [event["row"] for event in answer["events"]] == context.in_budget.tolist()
    assert answer["pieces"][0]["text"] == context.text.preamble
    assert answer["label"] == "Yes"


def test_switching_off_does_what_why_says(page):
    before = page.post("/rank", json=EDIT).json()
    item = before["ranking"][0]["item"]
    reasons = page.post("/why", json={"edit": EDIT, "item": item}).json()
    zoo = next(event["row"] for event in before["events"] if "Zookeeper" in event["text"])
    effect = next(part["effect"] for part in reasons["effects"] if "Zookeeper" in part["text"])
    after = page.post("/rank", json={**EDIT, "left_out": [zoo]}).json()
    odds = {entry["item"]: entry["log_odds"] for entry in after["ranking"]}
    assert before["ranking"][0]["log_odds"] - odds[item] == pytest.approx(effect, abs=1e-5)
    assert [event["on"] for event in after["events"]].count(False) == 1


def test_edits_reach_the_prompt(page):
    edit = {**EDIT, "instruction": "Guess.", "note": "Near home.", "style": "sectioned", "like": "nurse"}
    answer = page.post("/rank", json=edit).json()
    assert "Guess.\nNote: Near home." in answer["pieces"][0]["text"]
    assert all("Nurse" in entry["title"] for entry in answer["ranking"])
    rows = [event["row"] for event in answer["events"]]
    turned = page.post("/rank", json={**EDIT, "history": rows[::-1]}).json()
    assert [event["row"] for event in turned["events"]] == rows[::-1]


def test_a_profile_is_edited(page):
    before = page.post("/rank", json=EDIT).json()
    after = page.post("/rank", json={**EDIT, "profile": [["position", "Zzz"]]}).json()
    assert {"column": "position", "text": "Zzz"} in after["profile"]
    assert "Zzz" in after["pieces"][0]["text"]
    assert before["ranking"][0]["log_odds"] != after["ranking"][0]["log_odds"]


def test_a_member_is_typed(page):
    lines = ["viewed: 101 | seconds=30", "viewed: zookeeper"]
    edit = {"task": "apply", "candidates": 4, "typed_events": lines}
    answer = page.post("/rank", json=edit).json()
    assert [event["text"].split(" (")[0] for event in answer["events"]] == [
        "has viewed: Nurse",
        "has viewed: Zookeeper",
    ]
    assert {entry["text"] for entry in answer["profile"]} == {""}
    reasons = page.post("/why", json={"edit": edit, "item": answer["ranking"][0]["item"]}).json()
    assert any("Zookeeper" in part["text"] and part["effect"] for part in reasons["effects"])
    assert '"typed_events":["viewed: 101' in page.post("/case", json={"edit": edit}).text


def test_what_is_saved_can_be_loaded(page, planted):
    edit = {**EDIT, "instruction": "Guess.", "note": "Near home."}
    task = Task.parse(page.post("/task", json=edit).text)
    assert (task.instruction, task.steering_note) == ("Guess.", "Near home.")
    assert yaml.safe_load(page.post("/task", json=edit).text)["name"] == "apply"
    prompt = Prompt.from_json(json.dumps(page.post("/prompt", json=edit).json()))
    context = planted.context("m5", items=4, instruction="Guess.", note="Near home.")
    assert planted.score(prompt) == pytest.approx(context.probabilities, abs=1e-6)


def test_two_models_rank_the_same_items(page):
    first, second = (page.post("/rank", json={**EDIT, "model": model}).json()["ranking"] for model in (0, 1))
    assert {entry["item"] for entry in first} == {entry["item"] for entry in second}
    assert [entry["log_odds"] for entry in first] != [entry["log_odds"] for entry in second]


def test_members_are_suggested(page):
    assert page.get("/members", params={"like": "m"}).json() == [f"m{row}" for row in range(8)]
    assert page.get("/members", params={"like": "x"}).json() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member": "x"}, "no member 'x'"),
        ({"task": "aply"}, "did you mean 'apply'"),
        ({"style": "plain"}, "no style 'plain'"),
        ({"candidates": 0}, "candidates: Input should be greater than or equal to 1"),
        ({"like": "astronaut"}, "no candidate's name has 'astronaut' in it"),
        ({"left_out": [12345]}, "event 12345 is not in the history"),
        ({"instruction": "word " * 900}, "raise max_tokens"),
        ({"model": 2}, "model 2: there are 2"),
        ({"typed_events": ["viewed: 101"]}, "either a member's id or typed events"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_one_line(page, change, message):
    response = page.post("/rank", json={**EDIT, **change})
    assert response.status_code == 400
    assert message in response.json()["message"]
    assert "\n" not in response.json()["message"]


def test_an_item_that_is_no_candidate(page):
    response = page.post("/why", json={"edit": EDIT, "item": str(ZOOKEEPER)})
    assert (response.status_code, "is not among the 4 candidates" in response.json()["message"]) == (400, True)


def test_a_port_that_is_taken(refuse, bundle, jobs, tmp_path):
    bundle.save(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        message = refuse("explore", tmp_path / "model", "--dataset", jobs.path, "--port", port)
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use; give another --port" in message


def test_another_site_cannot_read_through_a_name_of_its_own(page):
    assert page.post("/rank", json=EDIT, headers={"host": "evil.example"}).status_code == 421
