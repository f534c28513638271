"""Why: every part left out in turn is scored as the prompt without it, and a cause that was planted comes first."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.explore.context import Context
from brewjax.explore.reasons import find_parts, log_odds
from tests.explore.conftest import ZOOKEEPER
from tests.tables import put

STYLES = ["compact", "sectioned"]
ATTRIBUTES = [("members", "position"), ("items", "company"), ("items", "skills"), ("items", "salary")]


@pytest.mark.parametrize("style", STYLES)
def test_a_planted_cause_comes_first_whatever_the_style(planted, style):
    context = planted.context("m5", style=style, items=5)
    reasons = context.why(context.item_ids[0])
    first, second = [i for i in reasons.order if reasons.parts[i].kind != "history"][:2]
    assert reasons.parts[first].text.startswith(("has viewed: Zookeeper", "has applied to: Zookeeper"))
    assert reasons.effects[first] > 5 * np.abs(reasons.effects[second])
    assert "Zookeeper" in reasons.summary()


def test_without_its_cause_the_model_says_so(planted, jobs):
    context = planted.context("m5", items=5)
    zoo = [row for row in context.in_budget.tolist() if jobs.item_id(jobs.event_item[row]) == str(ZOOKEEPER)]
    reasons = context.change(left_out=zoo).why(context.item_ids[0])
    assert reasons.log_odds == pytest.approx(0, abs=1e-6)
    assert all(reasons.is_noise(index) for index in range(len(reasons.parts)))
    assert "No single part has an effect" in reasons.summary()
    assert (reasons.table()["effect"] == 0).all()


def test_leaving_out_is_scoring_the_prompt_rendered_without_it(explorer):
    context = explorer.context("m5", items=3)
    item = context.item_ids[2]
    reasons = context.why(item)
    assert {part.kind for part in reasons.parts} == {"event", "history", "profile", "item", "instruction"}
    for part, effect in zip(reasons.parts, reasons.effects, strict=True):
        if part.kind == "event":  # as the switch of the page does
            shorter = context.change(left_out=[part.event])
            assert len(shorter.text.events) == len(context.text.events) - 1
            score = shorter.log_odds[2]
        else:
            score = log_odds(explorer.score(part.without)[0], context.top_label)
        assert reasons.log_odds - effect == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("style", [*STYLES, "chat", "key-value"])
@pytest.mark.parametrize(("table", "column"), ATTRIBUTES)
def test_an_attribute_left_out_is_one_that_the_table_does_not_know(explorer, jobs, style, table, column):
    context = explorer.context("m6", style=style, items=["103"])
    row = context.example.member if table == "members" else int(context.example.candidates[0])
    ignorant = dataclasses.replace(jobs, **{table: put(column, row, None)(getattr(jobs, table))})
    verbalizer = Verbalizer(
        ignorant,
        explorer.bundle.surface().scales,
        explorer.bundle.tokenizer,
        explorer.bundle.prompts.max_tokens,
    )
    expected = dataclasses.replace(context, verbalizer=verbalizer).render()
    parts = [part.without for part in find_parts(context, 0) if part.text.lower().startswith(column)]
    seen = [(prompt.preamble, prompt.questions[0].text) for prompt in parts]
    assert (expected.preamble, expected.questions[0].text) in seen


def test_facts_are_parts_under_their_names(explorer):
    parts = [part.text for part in find_parts(explorer.context("m6", items=["103"]), 0) if part.kind == "item"]
    assert any(text.startswith("Popularity: percentile ") for text in parts)
    assert any(text.startswith("Attention: ") for text in parts)


def test_a_style_without_history_has_no_events_to_leave_out(explorer):
    context = explorer.context("m6", style="numbers", items=3)
    assert (len(context.in_budget), len(context.dropped)) == (0, 0)
    assert {part.kind for part in find_parts(context, 0)} == {"item", "instruction"}


def test_no_older_event_takes_the_place_of_one_that_is_left_out(explorer):
    context = tight(explorer)
    assert len(context.dropped) > 0
    for part in find_parts(context, 0):
        if part.kind == "event":
            assert len(part.without.events) == len(context.in_budget) - 1
    assert len(context.why(context.item_ids[0]).dropped) == len(context.dropped)
    assert "older events" in context.why(context.item_ids[0]).summary()


def test_a_note_is_a_part_and_so_is_each_sentence(explorer):
    context = explorer.context("m5", items=3, note="Near home.")
    parts = [(part.kind, part.text) for part in find_parts(context, 0)]
    assert ("note", "Near home.") in parts
    assert ("instruction", "They know what they like.") in parts
    assert sum(kind == "instruction" for kind, _ in parts) == 3


def test_noise_is_what_rounding_does(explorer):
    reasons = explorer.context("m6", items=4).why(explorer.context("m6", items=4).item_ids[0])
    assert 0 < reasons.noise < 1e-4
    assert not all(reasons.is_noise(index) for index in range(len(reasons.parts)))


def test_what_is_shown_has_the_numbers(explorer):
    reasons = explorer.context("m6", items=4).why(explorer.context("m6", items=4).item_ids[0])
    first = reasons.parts[reasons.order[0]]
    assert first.text in repr(reasons)
    assert f"{reasons.effects[reasons.order[0]]:+.3f}" in reasons._repr_html_()
    assert reasons.plot(top=5).axes[0].get_xlabel() == "effect on the log-odds of “Yes”"
    assert list(reasons.table().columns) == ["kind", "part", "effect"]


def tight(explorer) -> Context:
    """A context whose oldest events do not fit."""
    context = explorer.context("m7", items=3)
    tokenizer, scales = explorer.bundle.tokenizer, explorer.bundle.surface().scales
    verbalizer = Verbalizer(explorer.dataset, scales, tokenizer, 200)
    return dataclasses.replace(context, verbalizer=verbalizer)
