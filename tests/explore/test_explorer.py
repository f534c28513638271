"""A model in the hand: it ranks as evaluation does, shows its prompts, and compiles once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import brewjax
from brewjax.data.tables.dataset import Dataset
from brewjax.explore.comparison import compare
from brewjax.explore.explorer import Explorer
from tests.tables import write_dataset


def test_a_folder_opens_as_text(bundle, jobs, tmp_path):
    bundle.save(tmp_path / "model")
    explorer = brewjax.open(str(tmp_path / "model"), str(jobs.path))
    assert len(repr(explorer)) < 300
    assert "apply" in repr(explorer)
    assert len(repr(explorer.bundle)) < 200
    html = explorer._repr_html_()
    assert "treescope" in html
    assert "tokens, dense history" in html


def test_the_tasks_are_those_of_the_datasets_surface(bundle, jobs, task, tmp_path):
    of_posts = dataclasses.replace(bundle.surface(), name="posts", tasks=(task.model_copy(update={"name": "read"}),))
    of_posts = dataclasses.replace(of_posts, card=of_posts.card.model_copy(update={"name": "posts"}))
    two = dataclasses.replace(bundle, surfaces={**bundle.surfaces, "posts": of_posts})
    assert [*brewjax.open(two, jobs).tasks] == ["apply"]
    assert [*brewjax.open(two, jobs, "posts").tasks] == ["read"]
    assert "jobs/apply, posts/read" in brewjax.open(two).facts()["tasks"]
    films = Dataset.load(write_dataset(tmp_path, card=lambda text: text.replace("name: jobs", "name: films")))
    never_seen = brewjax.open(two, films)
    with pytest.raises(ValueError, match="trained on no task of this dataset"):
        never_seen.rank("m5")
    assert len(never_seen.rank("m5", task=task, items=3)) == 3


def test_the_ranking_is_that_of_the_scorer_the_best_first(explorer, bundle):
    context = explorer.context("m5")
    table = context.rank()
    expected = bundle.scorer([bundle.encode(context.text)]).score(context.text)
    by_item = dict(zip(context.item_ids, expected[:, 0], strict=True))
    assert table["P(Yes)"].tolist() == pytest.approx([by_item[item] for item in table["item"]], abs=1e-6)
    assert (np.diff(table["P(Yes)"]) <= 0).all()
    assert list(table.index[:2]) == [1, 2]
    assert table["title"].str.len().min() > 0
    assert table["log_odds"].iloc[0] == pytest.approx(np.log(table["P(Yes)"].iloc[0] / table["P(No)"].iloc[0]))


def test_nothing_compiles_twice(explorer, compilations):
    explorer.rank("m5", items=6)
    before = compilations()
    for member in ("m4", "m5", "m6"):
        explorer.rank(member, items=6, note="Another one.")
    assert compilations() == before


def test_the_prompt_shows_who_attends_to_whom(explorer):
    context = explorer.context("m4", items=3)
    view = context.prompt()
    events = len(context.text.events)
    mask = view.attention()
    assert mask.shape == (events + 4, events + 4)
    assert mask[events + 2, : events + 1].all()  # a question sees preamble and history,
    assert mask[events + 2].sum() == events + 2  # itself, and nothing else
    pieces = view.pieces()
    assert "".join(piece.text for piece in pieces[: events + 1]) == context.text.preamble + "".join(context.text.events)
    assert pieces[-1].attends == f"attends to itself, the preamble, all {events} events before it, no other question"
    assert pieces[1].attends == "attends to itself, the preamble"
    assert pieces[0].text.split(".")[0] in view._repr_html_()
    assert repr(view) == context.text.render()


def test_tokens_are_those_that_the_model_reads(explorer, bundle):
    context = explorer.context("m4", items=3)
    view = context.tokens()
    encoded = bundle.encode(context.text)
    assert len(view) == len(encoded)
    assert [token for _, _, token in view.rows()] == encoded.arrays["tokens"].tolist()
    assert view._repr_html_().count("<span") == len(encoded)


def test_a_change_leaves_the_rest(explorer):
    context = explorer.context("m5", items=6)
    changed = context.change(note="Near home.", style="sectioned")
    assert changed.item_ids == context.item_ids
    assert "Near home." in changed.text.preamble
    assert "Near home." not in context.text.preamble
    assert context.change(history=context.in_budget[::-1].tolist()).text.events == context.text.events[::-1]
    assert context.change(items=["101", "102"]).item_ids == ["101", "102"]


def test_comparisons(explorer):
    context = explorer.context("m6", items=20)
    same = compare(context, context)
    assert same.correlation == pytest.approx(1)
    assert same.overlap == 10
    assert "rank correlation 1.000" in same.summary()
    change = explorer.compare(
        context, context.change(note="Near home, and well paid.", left_out=[int(context.in_budget[0])])
    )
    moved = change.table()
    assert sorted(moved["after"]) == sorted(moved["before"]) == list(range(1, 21))
    assert moved["up"].abs().is_monotonic_decreasing
    ranks = context.rank()
    assert [ranks["item"][rank] for rank in moved["before"]] == moved["item"].tolist()
    few = compare(context, context.change(items=[*context.item_ids[:3], "100"]))
    assert len(few.items) in (3, 4)


def test_another_model_reads_the_same_member(explorer, planted):
    context = explorer.context("m5", items=8)
    change = compare(context, context.change(bundle=planted.bundle))
    assert change.items
    assert not np.allclose(change.log_odds_after, change.log_odds_before)


@pytest.mark.long
def test_text_is_generated(explorer):
    assert isinstance(explorer.generate("Predict", max_tokens=3), str)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"member": "x9"}, "no member 'x9'; ids look like 'm0'"),
        ({"member": "m5", "task": "aply"}, "no task 'aply'; did you mean 'apply'"),
        ({"member": "m5", "style": "plain"}, "no style 'plain'"),
        ({"member": "m5", "items": ["7"]}, "no job '7'; ids look like '100'"),
        ({"member": "m5", "items": []}, "no candidates"),
        ({"member": "m5", "at": "yesterday"}, "expected a moment such as"),
    ],
)
def test_what_is_wrong_is_named(explorer, settings, message):
    with pytest.raises(ValueError, match=message):
        explorer.context(**settings)


def test_wrong_items_and_events_are_named(explorer, bundle):
    context = explorer.context("m5", items=4)
    with pytest.raises(ValueError, match="job '1' is not among the 4 candidates"):
        context.why("1")
    with pytest.raises(ValueError, match="event 9999 is not in the history"):
        context.change(left_out=[9999])
    with pytest.raises(ValueError, match="twice"):
        context.change(history=[int(context.in_budget[0])] * 2)
    with pytest.raises(ValueError, match="no dataset"):
        Explorer(bundle).rank("m5")
    with pytest.raises(ValueError, match="no item is a candidate of both"):
        compare(context.change(items=["101"]), context.change(items=["102"]))
