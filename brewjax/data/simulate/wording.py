"""The tables of the network: rows of the world in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.data.simulate.world import CITIES, KINDS, LEVELS, WORKPLACES, JobTable, MemberTable, PostTable, World

START = np.datetime64("2025-01-01", "s")  # of the period
DAY = 86_400  # seconds

FIRST_NAMES = """
Amber Arrow Ash Birch Blue Bright Cedar Clear Copper Crest Delta East Ember Fair Fern Forge Glen Granite Green Harbour
Holly Iron Juniper Lake Linden Maple Moss North Oak Pine Quarry Red River Silver South Stone Summit True West Willow
""".split()  # noqa: SIM905
SECOND_NAMES = """
bank bay bridge brook field ford gate grove haven house land light line mark mere path point port ridge side spring
stead view ward water way well wood
""".split()  # noqa: SIM905
BUSINESSES = """
Group Partners Works Services Labs Systems Solutions Holdings Collective Associates
""".split()  # noqa: SIM905
TEXTS = {  # of posts, by kind; several to choose from, each with the place of a skill
    "article": ("Five lessons on how to {}.", "How we {} at our company.", "What nobody tells you when you first {}."),
    "video": ("Video: how I {}, step by step.", "Video: a day in which we {}.", "Video: the tools I use to {}."),
    "poll": ("Poll: how often do you {}?", "Poll: who should {} in a team?", "Poll: is it harder than before to {}?"),
    "question": ("How do you {} on a small budget?", "What helped you to {} better?", "Where did you learn to {}?"),
    "announcement": ("We are growing: join us to {}.", "New course: learn to {}.", "Proud of my team, who {} daily."),
}  # fmt: skip


def members_table(world: World, members: MemberTable, connections: np.ndarray) -> pa.Table:
    """The profiles of members; `connections` is int64 [members], how many colleagues each knows."""
    return pa.table({"member_id": members.id, **_profile(world, members), "connections": connections})


def jobs_table(world: World, jobs: JobTable) -> pa.Table:
    """Jobs as items."""
    skills = [_pick(world.fields.skill_names, column) for column in jobs.skills.T]
    sentence = pc.binary_join_element_wise(
        "You will ", skills[0], ", ", skills[1], ", ", skills[2], ", ", skills[3], " and ", skills[4], ".", ""
    )
    newest = (jobs.posted[:, None] - world.skill_born[jobs.skills]).min(axis=1)
    return pa.table(
        {
            "item_id": jobs.id,
            "title": _titles(world, jobs.title),
            "company": _company_names(jobs.company),
            "city": _pick(list(CITIES), jobs.city),
            "country": _pick([country for country, _ in CITIES.values()], jobs.city),
            "field": _pick(world.fields.name, jobs.field),
            "level": _pick(list(LEVELS), jobs.level),
            "workplace": _pick(list(WORKPLACES), jobs.workplace),
            "salary": jobs.salary,
            "skills": _skill_lists(world, jobs.skills),
            "description": sentence,
            "posted": times(jobs.posted),
            "closes": times(jobs.closes),
            "newest_skill_days": np.minimum(newest, 10_000).astype(np.int64),
        }
    )


def posts_table(world: World, posts: PostTable) -> pa.Table:
    """Posts as items."""
    authors = world.members(posts.author)
    parts = [text.split("{}") for kind in KINDS for text in TEXTS[kind]]
    text = 3 * posts.kind + world.draws.integer("post text", 3, posts.id)
    skill = _pick(world.fields.skill_names, posts.skills[:, 0])
    return pa.table(
        {
            "item_id": posts.id,
            "text": pc.binary_join_element_wise(
                _pick([before for before, _ in parts], text), skill, _pick([after for _, after in parts], text), ""
            ),
            "kind": _pick(list(KINDS), posts.kind),
            "topics": _skill_lists(world, posts.skills),
            "field": _pick(world.fields.name, posts.field),
            "author": pc.binary_join_element_wise(
                _titles(world, authors.title), _company_names(authors.company), " at "
            ),
            "posted": times(posts.posted),
            "expires": times(posts.expires),
        }
    )


def times(days: np.ndarray) -> pa.Array:
    """Timestamps, in whole seconds, of days since the period began."""
    seconds = START.astype(np.int64) + np.floor(days * DAY).astype(np.int64)
    return pa.array(seconds * 1_000_000).cast(pa.timestamp("us", "UTC"))


def _profile(world: World, members: MemberTable) -> dict[str, pa.Array]:
    return {
        "position": _titles(world, members.title),
        "level": _pick(list(LEVELS), members.level),
        "experience": pa.array(members.years),
        "company": _company_names(members.company),
        "city": _pick(list(CITIES), members.city),
        "country": _pick([country for country, _ in CITIES.values()], members.city),
        "field": _pick(world.fields.name, members.field),
        "skills": _skill_lists(world, members.skills),
        "joined": times(members.joined),
    }


def _company_names(company: np.ndarray) -> pa.Array:
    """A different name for each of the first 11,000 companies."""
    first, second, business = len(FIRST_NAMES), len(SECOND_NAMES), len(BUSINESSES)
    shuffled = company * 7919 % (first * second * business)  # a prime, so that neighbours do not sound alike
    return pc.binary_join_element_wise(
        _pick(FIRST_NAMES, shuffled % first),
        _pick([f"{name} " for name in SECOND_NAMES], shuffled // first % second),
        _pick(BUSINESSES, shuffled // (first * second)),
        "",
    )


def _titles(world: World, title: np.ndarray) -> pa.Array:
    return _pick([name[:1].upper() + name[1:] for name in world.fields.titles], title)


def _skill_lists(world: World, skills: np.ndarray) -> pa.Array:
    offsets = np.arange(len(skills) + 1) * skills.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _pick(world.fields.skill_names, skills.ravel()))


def _pick(names: Sequence[str], rows: np.ndarray) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(rows))
