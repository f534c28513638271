"""What members want, and how likely they act on it: the truth of the network.

The logit of an action of member m on item i at time t, under a note, is its utility

    u = bias + rate[m] + sum over features k of  weight[k] * note[k] * taste[m, k, t] * x[k](m, i, t)

where `rate` is how much the member acts at all, `weight` is what the action depends on on average, `note` emphasises
a feature, `taste` is how much the member cares, which drifts, and x are the FEATURES of member and item.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from brewjax.data.simulate.world import (
    CITY_SHARES,
    COUNTRY,
    LEVELS,
    SALARY,
    SALARY_SPREAD,
    JobTable,
    MemberTable,
    PostTable,
    World,
)

# What utilities depend on: the leading ISCO digits in common with the field that the member wants to work in; the share
# of the item's skills that the member has; whether it is in the city, or at least the country, where the member wants
# to live; how far its level is from the wanted one; a liking for a workplace or a kind of post, which no profile
# states; pay above what is usual; ties; and what makes everybody like the item.
FEATURES = ("field", "skills", "place", "level", "liking", "pay", "ties", "quality")
MEANS = np.array([0.3, 0.05, 0.25, -1.2, 0.0, 0.0, 0.0, 0.0])  # of the features, about: notes hardly change the rates


class ActionUtility(NamedTuple):
    """What an action depends on.

    Attributes:
      share: of the exposures that it follows, about; what `bias` is chosen for.
      bias: of its utility.
      weights: of FEATURES.
    """

    share: float
    bias: float
    weights: tuple[float, ...]


ACTIONS = {
    "applied": ActionUtility(0.10, -3.7, (3.2, 3.0, 1.6, 0.7, 0.7, 0.5, 0.0, 0.8)),
    "saved": ActionUtility(0.16, -2.8, (2.4, 2.0, 1.0, 0.3, 0.7, 0.9, 0.0, 0.9)),
    "clicked": ActionUtility(0.17, -2.6, (2.6, 3.0, 0.0, 0.0, 0.9, 0.0, 1.0, 0.9)),
    "liked": ActionUtility(0.10, -3.4, (1.4, 2.0, 0.0, 0.0, 0.9, 0.0, 1.8, 0.8)),
    "connected": ActionUtility(0.12, -3.2, (2.2, 2.0, 0.9, 0.3, 0.0, 0.0, 1.2, 0.7)),
    "followed": ActionUtility(0.12, -3.5, (2.4, 2.4, 0.2, 0.9, 0.0, 0.0, 0.3, 1.0)),
    "accepted": ActionUtility(0.42, -0.55, (1.8, 1.6, 0.8, 0.4, 0.0, 0.0, 1.5, 0.6)),
}
RATE_SPREAD = 0.9  # deviation of a member's rate of acting, in logits
TASTE_SPREAD = 0.55  # deviation of the logarithm of a taste; its mean is 1
DRIFT_DAYS = 240.0  # after which a taste has nothing to do with what it was
NOTES = ("none", "location", "skills", "level", "field")  # what a note asks to focus on
NOTE_SHARE = 0.05  # of requests that each note stands over
EMPHASIS, THE_REST = 3.0, 0.4  # what a note multiplies the weight of its feature with, and the others
NOTED_FEATURES = {"location": "place", "skills": "skills", "level": "level", "field": "field"}
STAYS = {"city": 0.6, "field": 0.5, "level": 0.6}  # members who want what they have
CHANGES_MIND = 0.25  # members whose wishes change during the period


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What members want at some moment, each int64 [rows]: rows of fields, cities and levels."""

    field: np.ndarray
    city: np.ndarray
    level: np.ndarray


def wishes(world: World, members: MemberTable, time: np.ndarray) -> Wishes:
    """What members (rows) want at a time (days, [rows]). No profile states it; what they did tells it."""
    draws, ids = world.draws, members.id
    changes = (draws.uniform("changes mind", ids) < CHANGES_MIND) & (
        time > draws.uniform("changes mind when", ids) * world.days
    )
    chapter = changes.astype(np.int64)  # before or after the change
    stays = {key: draws.uniform(f"stays in {key}", ids, chapter) < share for key, share in STAYS.items()}
    near = draws.uniform("wants field near", ids, chapter) < 0.5
    akin = world.akin("wanted field akin", members.field, ids, chapter)
    far = draws.choice("wanted field", world.fields.share, ids, chapter)
    field = np.where(stays["field"], members.field, np.where(near, akin, far))
    city = np.where(stays["city"], members.city, draws.choice("wanted city", CITY_SHARES, ids, chapter))
    level = np.where(stays["level"], members.level, np.minimum(members.level + 1, len(LEVELS) - 1))
    return Wishes(field, city, level)


def tastes(world: World, members: MemberTable, time: np.ndarray) -> np.ndarray:
    """float64 [rows, FEATURES]: how much each member cares about each feature; mean 1, lognormal, and stationary: two
    normal variables turn into each other at the pace of DRIFT_DAYS."""
    angle = (np.pi / 2 * time / DRIFT_DAYS)[:, None]
    ids, feature = members.id[:, None], np.arange(len(FEATURES))
    before, after = (world.draws.normal(f"taste {part}", ids, feature) for part in ("before", "after"))
    return np.exp(TASTE_SPREAD * (np.cos(angle) * before + np.sin(angle) * after) - TASTE_SPREAD**2 / 2)


def job_features(world: World, members: MemberTable, jobs: JobTable, time: np.ndarray) -> np.ndarray:
    """float64 [rows, FEATURES] of members and jobs, row by row."""
    goals = wishes(world, members, time)
    pay = np.log(jobs.salary / SALARY[jobs.level]) / SALARY_SPREAD
    liking = world.draws.normal("likes workplace", members.id, jobs.workplace)
    place, level = _place(goals, jobs.city), -np.abs(jobs.level - goals.level)
    field = world.fields.shared_digits(jobs.field, goals.field) / 4
    return _centered(field, _overlap(members.skills, jobs.skills), place, level, liking, pay, 0, jobs.quality)


def post_features(
    world: World, members: MemberTable, posts: PostTable, time: np.ndarray, author_is_tie: np.ndarray
) -> np.ndarray:
    """float64 [rows, FEATURES] of members and posts, row by row."""
    goals = wishes(world, members, time)
    liking = world.draws.normal("likes kind", members.id, posts.kind)
    field = world.fields.shared_digits(posts.field, goals.field) / 4
    return _centered(field, _overlap(members.skills, posts.skills), MEANS[2], MEANS[3], liking, 0, author_is_tie,
                     posts.quality)  # fmt: skip


def people_features(
    world: World, members: MemberTable, people: MemberTable, time: np.ndarray, mutual: np.ndarray
) -> np.ndarray:
    """float64 [rows, FEATURES] of members and other members, row by row; `mutual` is how many ties they share."""
    goals = wishes(world, members, time)
    level = np.minimum(people.level - members.level, 2) + MEANS[3]  # the higher the better
    field = world.fields.shared_digits(people.field, goals.field) / 4
    quality = world.draws.normal("person quality", people.id)
    ties = np.log1p(mutual)
    return _centered(field, _overlap(members.skills, people.skills), _place(goals, people.city), level, 0, 0, ties,
                     quality)  # fmt: skip


def utility(
    world: World, action: str, members: MemberTable, features: np.ndarray, time: np.ndarray, note: np.ndarray
) -> np.ndarray:
    """float64 [rows]: the logit of the probability of an action.

    Args:
      members, features, time: of each row.
      note: int64 [rows], index in NOTES.
    """
    of_action = ACTIONS[action]
    emphasis = np.ones((len(NOTES), len(FEATURES)))
    for row, name in enumerate(NOTES[1:], 1):
        emphasis[row] = THE_REST
        emphasis[row, FEATURES.index(NOTED_FEATURES[name])] = EMPHASIS
    rate = RATE_SPREAD * world.draws.normal("rate of acting", members.id)
    terms = np.array(of_action.weights) * emphasis[note] * tastes(world, members, time) * features
    return of_action.bias + rate + terms.sum(axis=1)


def _place(goals: Wishes, city: np.ndarray) -> np.ndarray:
    return np.where(city == goals.city, 1.0, np.where(COUNTRY[city] == COUNTRY[goals.city], 0.4, 0.0))


def _overlap(skills: np.ndarray, required: np.ndarray) -> np.ndarray:
    """float64 [rows]: the share of the required skills ([rows, required]) that are among some ([rows, skills])."""
    return (skills[:, :, None] == required[:, None, :]).any(axis=1).mean(axis=1)


def _centered(*features: np.ndarray | float) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*features), axis=1) - MEANS
