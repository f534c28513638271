"""An edited profile is read as if the table had it."""

from __future__ import annotations

import pyarrow as pa
import pytest

from brewjax.explore.profile import edit_profile, read_profile
from tests.tables import put


def test_a_profile_is_text_and_back(jobs):
    profile = read_profile(jobs, 2)
    assert profile == {"position": "Accountant", "company": "", "location": "Oslo", "experience": "4"}
    assert edit_profile(jobs, 2, profile).equals(jobs.members)
    edited = edit_profile(jobs, 2, {"company": "Acme", "experience": ""})
    expected = put("experience", 2, None)(put("company", 2, "Acme")(jobs.members))
    assert edited.to_pylist() == expected.to_pylist()


def test_every_kind_of_value(jobs):
    skills = pa.array([["SQL"]] * len(jobs.members), pa.list_(pa.string()))
    lists = jobs.members.set_column(1, "position", skills)
    card = jobs.card.members.attributes[0].model_copy(update={"kind": "list"})
    members = jobs.card.members.model_copy(update={"attributes": (card, *jobs.card.members.attributes[1:])})
    dataset = type(jobs)(jobs.path, jobs.card.model_copy(update={"members": members}), lists, jobs.items, jobs.events)
    edited = edit_profile(dataset, 0, {"position": "SQL, Care", "experience": "7"})
    assert edited["position"][0].as_py() == ["SQL", "Care"]
    assert edited["experience"][0].as_py() == 7


def test_a_context_reads_the_edited_profile(explorer):
    context = explorer.context("m5", items=3)
    changed = context.change(profile={"position": "Astronaut"}).change(note="Calm.")
    assert "Astronaut" in changed.text.preamble
    assert "Astronaut" not in context.text.preamble
    assert changed.edited_profile == {"position": "Astronaut"}
    assert changed.text.questions == context.text.questions  # facts stay


@pytest.mark.parametrize(
    ("profile", "message"),
    [({"positon": "x"}, "no attribute 'positon'; did you mean 'position'"), ({"experience": "a lot"}, "'a lot' is no")],
)
def test_what_is_wrong_is_named(explorer, profile, message):
    with pytest.raises(ValueError, match=message):
        explorer.context("m5", items=3).change(profile=profile)
