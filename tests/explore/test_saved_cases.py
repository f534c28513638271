"""Cases: what the page saves is ranked the same again, and an order that is not as expected is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from starlette.testclient import TestClient

from brewjax.config import ConfigError
from brewjax.explore.cases import Case, case_presets, check_order, load_cases, make_case, print_cases, suite_presets
from brewjax.explore.page import make_page
from brewjax.suite.suite import Suite


@pytest.fixture(scope="module")
def context(planted):
    return planted.context("m5", items=6, note="Near home.", at="2025-09-01T12:30:00.000001")


def test_a_case_is_ranked_the_same_again(context, planted):
    off = context.change(left_out=[int(context.in_budget[0])], history=context.example.history[::-1].tolist())
    off = off.change(profile={"position": "Zoologist"})
    case = Case.parse(make_case(off, comment="calm").model_dump_json(exclude_defaults=True))
    again = case.context(planted)
    assert again.text == off.text
    np.testing.assert_array_equal(again.probabilities, off.probabilities)
    assert (case.at, case.comment) == ("2025-09-01T12:30:00.000001+00:00", "calm")


def test_every_pair_of_the_expected_order_counts(context):
    ids = [context.item_ids[index] for index in context.order]
    assert check_order(context, ids[:3]) == ((1, 2, 3), ())
    result = check_order(context, [ids[4], ids[0], ids[1]])
    assert result.ranks == (5, 1, 2)
    assert result.wrong == ((ids[4], ids[0]), (ids[4], ids[1]))
    assert check_order(context, []) == ((), ())


def test_cases_are_checked_from_a_file(context, planted, tmp_path, capsys):
    ids = [context.item_ids[index] for index in context.order]
    good, bad = (make_case(context, order, "a nurse") for order in (ids[:2], ids[1::-1]))
    path = tmp_path / "cases.jsonl"
    path.write_text(f"{good.model_dump_json()}\n\n{bad.model_dump_json(exclude_defaults=True)}\n")
    cases = load_cases(path)
    assert cases == [good, bad]
    assert print_cases(planted, cases[:1])
    assert not print_cases(planted, cases)
    printed = capsys.readouterr().out
    assert "2. a nurse" in printed
    assert f"{ids[1]} before {ids[0]}" in printed
    assert "0 of 1" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no case in it"),
        ('{"member": "m5", "task": "apply"}', "case 1.*items"),
        ('{"member": "m5", "task": "apply", "items": ["101"], "expected": ["102"]}', "expected '102', which is not"),
        ('\n{"member": "m5", "task": "apply", "item": ["101"]}', "case 2.*unknown key 'item'; did you mean 'items'"),
    ],
)
def test_a_wrong_file_is_named(text, message, tmp_path):
    (tmp_path / "cases.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=f"cases.jsonl.*{message}"):
        load_cases(tmp_path / "cases.jsonl")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none.jsonl"):
        load_cases(tmp_path / "none.jsonl")


@pytest.fixture(scope="module")
def page(context, planted, explorer):
    ids = [context.item_ids[index] for index in context.order]
    off = make_case(context.change(left_out=[int(context.in_budget[0])]), [ids[1], ids[0]], "upside down")
    return TestClient(make_page([planted, explorer], case_presets([off])), base_url="http://localhost")


def test_a_case_is_chosen_and_edited_on_the_page(page, context):
    assert '<option value="0">1. upside down</option>' in page.get("/").text
    edit = {"task": "apply", "member": "m1", "case": 0}
    answer = page.post("/rank", json=edit).json()
    assert (answer["member"], answer["note"]) == ("m5", "Near home.")
    assert {entry["item"] for entry in answer["ranking"]} == {*context.item_ids}
    assert [event["on"] for event in answer["events"]].count(False) == 1
    whole = page.post("/rank", json=edit | {"left_out": []}).json()
    assert [event["on"] for event in whole["events"]].count(False) == 0
    assert whole["out_of_order"] == [answer["expected"]]
    assert page.post("/rank", json=edit | {"note": "Far."}).json()["note"] == "Far."
    assert "case 1: there are 1" in page.post("/rank", json=edit | {"case": 1}).json()["message"]


def test_the_page_saves_a_case(page, planted):
    edit = {"task": "apply", "member": "m5", "candidates": 4, "note": "Calm."}
    ranking = page.post("/rank", json=edit).json()["ranking"]
    order = [entry["item"] for entry in ranking[:2]]
    response = page.post("/case", json={"edit": edit, "expected": order, "comment": "calm ones"})
    assert response.text.count("\n") == 1
    case = Case.parse(response.text)
    assert (case.comment, list(case.expected), case.note, case.history) == ("calm ones", order, "Calm.", None)
    context = case.context(planted)
    assert context.log_odds[context.order] == pytest.approx([entry["log_odds"] for entry in ranking], abs=1e-5)
    wrong = page.post("/case", json={"edit": edit, "expected": ["7"]})
    assert (wrong.status_code, "'7' is not among the 4 candidates" in wrong.json()["message"]) == (400, True)


def test_questions_of_a_suite_are_chosen_with_their_answers(planted, jobs, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apply.yaml").write_text(json.dumps(task.model_dump(mode="json")))
    surfaces = {"jobs": {"dataset": str(jobs.path), "domain": "jobs", "tasks": [{"file": "apply.yaml", "tier": "A"}]}}
    draw = {"questions": 20, "lists": 2}
    settings = {"name": "mine", "tiers": {"A": {"title": "a"}}, "draws": {"quick": draw, "full": draw}}
    suite = Suite.of(settings | {"surfaces": surfaces}, "suite.yaml")
    presets = suite_presets(suite, jobs)
    assert presets[0].title.startswith("jobs/apply 1: m")
    context = presets[0].context(planted)
    assert {*context.item_ids} == {*presets[0].answers}
    client = TestClient(make_page([planted], presets), base_url="http://localhost")
    ranking = client.post("/rank", json={"task": "apply", "member": "m1", "case": 0}).json()["ranking"]
    assert {entry["item"]: entry["answer"] for entry in ranking} == presets[0].answers
    elsewhere = Suite.of(settings | {"surfaces": {"jobs": surfaces["jobs"] | {"dataset": "data/none"}}}, "suite.yaml")
    with pytest.raises(ConfigError, match=r"no surface has the dataset .*; there are data/none"):
        suite_presets(elsewhere, jobs)
