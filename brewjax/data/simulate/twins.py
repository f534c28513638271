"""Twins: jobs that are alike but for one attribute, and the order in which a member would truly have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from brewjax.data.simulate.truth import load_world
from brewjax.data.simulate.utility import Wishes, job_features, utility, wishes
from brewjax.data.simulate.wording import jobs_table, times
from brewjax.data.simulate.world import COUNTRY, LEVELS, SALARY, SALARY_SPREAD, JobTable, MemberTable, World, take
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample, example_at
from brewjax.data.tasks.task import Task

SAME = "nothing"  # what identical twins differ in
DEVIATIONS = 2.0  # between the salaries of twins and what is usual, in deviations of its logarithm


class Twins(NamedTuple):
    """Two candidates of an example.

    Attributes:
      example: its index.
      better, worse: indices of its candidates; the member would sooner apply to the first.
      attribute: what the two differ in; SAME for identical twins.
      utility: how much better the first is.
    """

    example: int
    better: int
    worse: int
    attribute: str
    utility: float


def twin_examples(
    dataset: Dataset, task: Task, members: Sequence[int]
) -> tuple[Dataset, list[RankingExample], list[Twins]]:
    """Asks some members, just after the last event, about made-up jobs that nobody had an event with.

    Each is asked about a job, its identical twin, and for each attribute a job that suits the profile and one that does
    not. Pairs are left out where the member no longer wants what the profile says: nothing but the past tells that.

    Args:
      dataset: the jobs of a simulated network.
      task: on applications.
      members: rows of the members table.

    Returns:
      The dataset with the twins among its items, the examples, one for each member, and the pairs.
    """
    world = load_world(dataset.path)
    ids = dataset.members["member_id"].to_numpy()[np.asarray(members)]
    profiles, end = world.members(ids), np.full(len(ids), world.days)
    base = world.jobs(world.draws.integer("twin", world.num_jobs, ids))
    usual = SALARY[base.level]
    base = dataclasses.replace(base, posted=end - 1, closes=end + 30, salary=usual, city=profiles.city)
    variants: list[JobTable] = [base, base]
    for change in CHANGES.values():
        variants += [dataclasses.replace(base, **change(world, profiles, base, suits)) for suits in (True, False)]
    none = np.zeros(len(ids), np.int64)
    utilities = [
        utility(world, "applied", profiles, job_features(world, profiles, job, end), end, none) for job in variants
    ]
    goals, known = wishes(world, profiles, end), _as_profile(profiles)
    first_id = int(dataset.items["item_id"].to_numpy().max()) + 1
    extended = dataclasses.replace(dataset, items=_append(dataset.items, world, variants, first_id))
    cutoff_time = int(times(np.array([world.days])).cast(pa.int64())[0].as_py())
    cutoff_time = max(cutoff_time, int(dataset.event_time.max()) + 1)
    examples, twins = [], []
    for index, member in enumerate(members):
        rows = len(dataset.items) + index + len(ids) * np.arange(len(variants))
        candidates = rows.astype(np.int32)
        unknown = np.full(len(candidates), -1)
        now = example_at(dataset, task, int(member), cutoff_time)
        examples.append(
            dataclasses.replace(now, candidates=candidates, labels=unknown.astype(np.int32), exposures=unknown)
        )
        twins.append(Twins(index, 0, 1, SAME, 0.0))
        for place, attribute in enumerate(CHANGES):
            better, worse = 2 + 2 * place, 3 + 2 * place
            difference = float(utilities[better][index] - utilities[worse][index])
            wish = {"location": "city", "field": "field", "level": "level"}.get(attribute)
            if wish is None or getattr(goals, wish)[index] == getattr(known, wish)[index]:
                twins.append(Twins(index, better, worse, attribute, difference))
    return extended, examples, twins


def _location(world: World, members: MemberTable, jobs: JobTable, suits: bool) -> dict[str, np.ndarray]:
    """In the member's city, or in the first of the cities abroad."""
    abroad = np.array([np.flatnonzero(country != COUNTRY)[0] for country in COUNTRY])
    return {"city": members.city if suits else abroad[members.city]}


def _level(world: World, members: MemberTable, jobs: JobTable, suits: bool) -> dict[str, np.ndarray]:
    """The member's level, or the farthest from it, each with its usual pay."""
    far = np.where(members.level < len(LEVELS) // 2, len(LEVELS) - 1, 0)
    level = members.level if suits else far
    return {"level": level, "salary": SALARY[level]}


def _field(world: World, members: MemberTable, jobs: JobTable, suits: bool) -> dict[str, np.ndarray]:
    """The member's occupation, or one of a field that has not even the first digit in common."""
    far = np.array([np.flatnonzero(code // 1000 != world.fields.code // 1000)[0] for code in world.fields.code])
    field = members.field if suits else far[members.field]
    return {"field": field, "title": members.title if suits else world.fields.first_title[field]}


def _skills(world: World, members: MemberTable, jobs: JobTable, suits: bool) -> dict[str, np.ndarray]:
    """All skills are the member's, or none is."""
    if suits:
        return {"skills": members.skills[:, : jobs.skills.shape[1]]}
    rank = world.draws.uniform("twin skills", members.id[:, None], np.arange(len(world.fields.skill_names)))
    np.put_along_axis(rank, members.skills, 2, axis=1)
    return {"skills": np.argsort(rank, axis=1)[:, : jobs.skills.shape[1]]}


def _pay(world: World, members: MemberTable, jobs: JobTable, suits: bool) -> dict[str, np.ndarray]:
    """Well paid for its level, or badly."""
    factor = np.exp((1 if suits else -1) * DEVIATIONS * SALARY_SPREAD)
    return {"salary": np.round(SALARY[jobs.level] * factor, -3)}


CHANGES: dict[str, Callable[[World, MemberTable, JobTable, bool], dict[str, np.ndarray]]] = {
    "location": _location,
    "level": _level,
    "field": _field,
    "skills": _skills,
    "pay": _pay,
}


def _as_profile(members: MemberTable) -> Wishes:
    return Wishes(members.field, members.city, members.level)


def _append(items: pa.Table, world: World, variants: list[JobTable], first_id: int) -> pa.Table:
    """The items, and behind them those of each variant."""
    tables = [jobs_table(world, take(jobs, np.arange(len(jobs.id)))) for jobs in variants]
    added = pa.concat_tables(tables)
    added = added.set_column(0, "item_id", pa.array(np.arange(first_id, first_id + len(added))))
    return pa.concat_tables([items, added.cast(items.schema)])
