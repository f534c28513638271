"""What members are shown, and when: requests of a few items each, from pools of what exists at that time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from brewjax.data.simulate.utility import NOTE_SHARE, NOTES, wishes
from brewjax.data.simulate.world import (
    COLLEAGUES,
    DAYS_PER_MONTH,
    FIRST_DAY,
    JOB_LIFE,
    POST_LIFE,
    MemberTable,
    World,
    take,
)

CHUNK = 100_000  # items whose attributes are computed at a time
ACTIVITY_SPREAD = 1.0  # deviation of the logarithm of how active a member is; its mean is 1
MAX_REQUESTS = 450  # of a member, of each kind
REQUEST_IDS = 1_000  # of a member, of all kinds of a surface


@dataclasses.dataclass(frozen=True)
class Exposures:
    """Items that were shown, [exposures], by member and time.

    Attributes:
      member: int64, ids.
      item: int64, ids.
      time: float64, days since the period began.
      request: int64, ids of the lists that they were shown in.
      note: int64, index in NOTES of what the member asked to focus on in the request.
    """

    member: np.ndarray
    item: np.ndarray
    time: np.ndarray
    request: np.ndarray
    note: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence[Exposures]) -> Exposures:
        """All exposures of several kinds of requests, by member and time."""
        names = [column.name for column in dataclasses.fields(cls)]
        whole = cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        return take(whole, np.lexsort((whole.request, whole.time, whole.member)))


@dataclasses.dataclass(frozen=True)
class RequestKind:
    """One kind of requests.

    Attributes:
      purpose: of its random numbers.
      per_month: mean of a member.
      size: items of each.
      shares: of the pools that the items come from.
      first_id: of the requests of a member, apart from those of other kinds of the surface.
      noted: whether some requests stand under a note.
    """

    purpose: str
    per_month: float
    size: int
    shares: tuple[float, ...]
    first_id: int = 0
    noted: bool = False

    def made(self, request: np.ndarray) -> np.ndarray:
        """bool: which requests, by id, are of this kind."""
        place = request % REQUEST_IDS - self.first_id
        return (place >= 0) & (place < MAX_REQUESTS)


class Pool:
    """Items by a key, each in the order in which they begin.

    Args:
      key: int64 [items], at least 0.
      begins: float64 [items], days from FIRST_DAY on; earlier ones begin then.
      days: how long an item can be drawn.
    """

    def __init__(self, key: np.ndarray, begins: np.ndarray, days: float):
        self._days, self._span = days, max(float(begins.max(initial=0)), 0.0) - FIRST_DAY + days + 2
        code = key * self._span + np.maximum(begins, FIRST_DAY) - FIRST_DAY + 1
        self._order = np.argsort(code, kind="stable")
        self._code = code[self._order]

    def draw(self, uniform: np.ndarray, key: np.ndarray | int, time: np.ndarray) -> np.ndarray:
        """int64: an item of each key that began within the pool's days before each time; -1 where there is none."""
        code = key * self._span + time - FIRST_DAY + 1
        first = np.searchsorted(self._code, np.maximum(code - self._days, key * self._span), side="left")
        count = np.searchsorted(self._code, code, side="right") - first
        item = self._order[np.minimum(first + (uniform * count).astype(np.int64), len(self._order) - 1)]
        return np.where(count > 0, item, -1)


class JobPools:
    """Jobs by what members look at: their field, the field or the city that they want, or whatever is new."""

    KIND = RequestKind("jobs", per_month=1.1, size=8, shares=(0.3, 0.25, 0.2, 0.25), noted=True)

    def __init__(self, world: World):
        self._world = world
        city, field, posted = _columns(world.jobs, world.num_jobs, "city", "field", "posted")
        self._sub_major = world.fields.code // 100
        days = JOB_LIFE[0] - 2  # so that an application, up to two days later, finds the job open
        self._by_field = Pool(self._sub_major[field], posted, days)
        self._by_city, self._any = Pool(city, posted, days), Pool(np.zeros_like(city), posted, days)

    def draw(self, members: MemberTable, source: np.ndarray, uniform: np.ndarray, time: np.ndarray) -> np.ndarray:
        """int64: a job for each row of members, from the source with this index in the shares of the kind."""
        goals = wishes(self._world, members, time)
        return np.select(
            [source == 0, source == 1, source == 2],
            [
                self._by_field.draw(uniform, self._sub_major[members.field], time),
                self._by_field.draw(uniform, self._sub_major[goals.field], time),
                self._by_city.draw(uniform, goals.city, time),
            ],
            self._any.draw(uniform, 0, time),
        )


class PostPools:
    """Posts by colleagues, in the member's field, or any."""

    KIND = RequestKind("posts", per_month=1.2, size=8, shares=(0.4, 0.35, 0.25))

    def __init__(self, world: World):
        author, field, posted = _columns(world.posts, world.num_posts, "author", "field", "posted")
        self._sub_major, days = world.fields.code // 100, POST_LIFE[0] - 2
        self._by_company = Pool(author // COLLEAGUES, posted, days)
        self._by_field = Pool(self._sub_major[field], posted, days)
        self._any = Pool(np.zeros_like(field), posted, days)

    def draw(self, members: MemberTable, source: np.ndarray, uniform: np.ndarray, time: np.ndarray) -> np.ndarray:
        """As of `JobPools`."""
        return np.select(
            [source == 0, source == 1],
            [
                self._by_company.draw(uniform, members.id // COLLEAGUES, time),
                self._by_field.draw(uniform, self._sub_major[members.field], time),
            ],
            self._any.draw(uniform, 0, time),
        )


class PeoplePools:
    """Members that are colleagues, work in the member's field, or any; never the member."""

    SUGGESTIONS = RequestKind("people", per_month=0.9, size=8, shares=(0.45, 0.3, 0.25))
    INVITATIONS = RequestKind("invitations", per_month=0.7, size=4, shares=(0.4, 0.2, 0.4), first_id=500)

    def __init__(self, world: World):
        field, joined = _columns(world.members, world.num_members, "field", "joined")
        self._sub_major = world.fields.code // 100
        company, always = np.arange(world.num_members) // COLLEAGUES, world.days - FIRST_DAY
        self._by_company = Pool(company, joined, always)
        self._by_field = Pool(self._sub_major[field], joined, always)
        self._any = Pool(np.zeros_like(company), joined, always)

    def draw(self, members: MemberTable, source: np.ndarray, uniform: np.ndarray, time: np.ndarray) -> np.ndarray:
        """As of `JobPools`."""
        person = np.select(
            [source == 0, source == 1],
            [
                self._by_company.draw(uniform, members.id // COLLEAGUES, time),
                self._by_field.draw(uniform, self._sub_major[members.field], time),
            ],
            self._any.draw(uniform, 0, time),
        )
        return np.where(person == members.id, -1, person)


Pools = JobPools | PostPools | PeoplePools


def expose(world: World, pools: Pools, kind: RequestKind, members: MemberTable) -> Exposures:
    """What members are shown by requests of a kind; an item at most once."""
    draws, ids = world.draws, members.id
    begins = np.maximum(members.joined, 0)
    active = world.days - begins
    activity = np.exp(ACTIVITY_SPREAD * draws.normal("activity", ids) - ACTIVITY_SPREAD**2 / 2)
    mean = kind.per_month * activity * active / DAYS_PER_MONTH
    counts = np.minimum(mean + draws.uniform(f"{kind.purpose} requests", ids), MAX_REQUESTS).astype(np.int64)
    row = np.repeat(np.arange(len(ids)), counts)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    time = begins[row] + active[row] * draws.uniform(f"{kind.purpose} time", ids[row], place)
    note = np.zeros(len(row), np.int64)
    if kind.noted:
        shares = np.full(len(NOTES), NOTE_SHARE)
        shares[0] = 1 - shares[1:].sum()
        note = draws.choice(f"{kind.purpose} note", shares, ids[row], place)
    request = ids[row] * REQUEST_IDS + kind.first_id + place
    slot, size = np.tile(np.arange(kind.size), len(row)), kind.size
    row, time, request, note = (np.repeat(values, size) for values in (row, time, request, note))
    source = draws.choice(f"{kind.purpose} source", np.array(kind.shares), request, slot)
    item = pools.draw(take(members, row), source, draws.uniform(f"{kind.purpose} item", request, slot), time)
    order = np.lexsort((slot, time, item, row))
    first = np.diff(row[order] * (item.max(initial=0) + 2) + item[order], prepend=-2) != 0
    selected = np.sort(order[first & (item[order] >= 0)])
    selected = selected[np.lexsort((slot[selected], time[selected], row[selected]))]
    return Exposures(ids[row[selected]], item[selected], time[selected], request[selected], note[selected])


def _columns(read: Callable[[np.ndarray], Any], count: int, *names: str) -> list[np.ndarray]:
    """Some columns of all items, without the others in memory at once."""
    parts: list[list[np.ndarray]] = [[] for _ in names]
    for start in range(0, count, CHUNK):
        table = read(np.arange(start, min(start + CHUNK, count)))
        for part, name in zip(parts, names, strict=True):
            part.append(getattr(table, name))
    return [np.concatenate(part) for part in parts]
