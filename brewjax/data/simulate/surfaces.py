"""What happens on each surface: members are shown items, and act on them with the probability of the truth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.special import expit

from brewjax.data.simulate.exposures import Exposures, JobPools, PeoplePools, PostPools, expose
from brewjax.data.simulate.truth import NOTED
from brewjax.data.simulate.utility import NOTES, job_features, people_features, post_features, utility
from brewjax.data.simulate.wording import times
from brewjax.data.simulate.world import COLLEAGUES, MemberTable, World, take

MAX_DELAY = 2.0  # days from an exposure to what follows it


class Block(NamedTuple):
    """Members with consecutive ids: whole companies of colleagues.

    Attributes:
      members: their profiles.
      ties: bool [companies, COLLEAGUES, COLLEAGUES]: who knows whom.
      first_company: of `ties`.
    """

    members: MemberTable
    ties: np.ndarray
    first_company: int

    @classmethod
    def of(cls, world: World, ids: np.ndarray) -> Block:
        """The members with these ids, the first of which begins a company."""
        first, companies = int(ids[0]) // COLLEAGUES, -(-len(ids) // COLLEAGUES)
        return cls(world.members(ids), world.ties(first, companies), first)

    def rows(self, ids: np.ndarray) -> MemberTable:
        """The members of each id."""
        return take(self.members, ids - self.members.id[0])

    def tied(self, member: np.ndarray, person: np.ndarray) -> np.ndarray:
        """bool: whether members of the block know persons, by ids."""
        return self._look_up(self.ties, member, person).astype(bool)

    def mutual(self, member: np.ndarray, person: np.ndarray) -> np.ndarray:
        """int64: how many know both, by ids."""
        counts = self.ties.astype(np.float32)
        return self._look_up((counts @ counts).astype(np.int64), member, person)

    def connections(self) -> np.ndarray:
        """int64 [members]: how many each knows."""
        return self.ties.sum(axis=2).ravel()[: len(self.members.id)]

    def _look_up(self, table: np.ndarray, member: np.ndarray, person: np.ndarray) -> np.ndarray:
        """Only colleagues know each other, or somebody in common."""
        company = member // COLLEAGUES
        values = table[company - self.first_company, member % COLLEAGUES, person % COLLEAGUES]
        return np.where(company == person // COLLEAGUES, values, 0)


class Log(NamedTuple):
    """What happened to the members of a block: the table of events, and the truth of each exposure."""

    events: pa.Table
    truth: pa.Table


class JobSurface:
    """Jobs that members view, and then save, apply to, both or neither."""

    def __init__(self, world: World):
        self._world, self._pools = world, JobPools(world)

    def simulate(self, block: Block) -> Log:
        """What the members of a block do."""
        world, shown = self._world, expose(self._world, self._pools, JobPools.KIND, block.members)
        members, jobs = block.rows(shown.member), world.jobs(shown.item)
        features = job_features(world, members, jobs, shown.time)

        def compute(action: str, note: np.ndarray) -> np.ndarray:
            return utility(world, action, members, features, shown.time, note)

        utilities = {action: compute(action, shown.note) for action in ("applied", "saved")}
        noted = {
            NOTED.format(action="applied", note=note): compute("applied", np.full(len(shown.item), index))
            for index, note in enumerate(NOTES)
        }
        context = {
            "note": pa.array(NOTES).take(pa.array(shown.note)),
            "job_days": shown.time - jobs.posted,
            "member_days": shown.time - members.joined,
        }
        return _act(world, shown, np.full(len(shown.item), "viewed"), utilities, context, noted)


class PostSurface:
    """Posts that members are shown, and then open, like, both or neither."""

    def __init__(self, world: World):
        self._world, self._pools = world, PostPools(world)

    def simulate(self, block: Block) -> Log:
        """What the members of a block do."""
        world, shown = self._world, expose(self._world, self._pools, PostPools.KIND, block.members)
        shown = take(shown, np.flatnonzero(world.post_author(shown.item) != shown.member))
        members, posts = block.rows(shown.member), world.posts(shown.item)
        tied = block.tied(shown.member, posts.author)
        features = post_features(world, members, posts, shown.time, tied)
        utilities = {
            action: utility(world, action, members, features, shown.time, shown.note) for action in ("clicked", "liked")
        }
        author_is = pa.array(["not connected", "a connection"]).take(pa.array(tied.astype(np.int64)))
        return _act(world, shown, np.full(len(shown.item), "shown"), utilities, {"author_is": author_is})


class PeopleSurface:
    """People who are suggested to members, who then connect, follow, both or neither; and whose invitations members
    receive, and accept or not."""

    def __init__(self, world: World):
        self._world, self._pools = world, PeoplePools(world)

    def simulate(self, block: Block) -> Log:
        """What the members of a block do."""
        world, kinds = self._world, (PeoplePools.SUGGESTIONS, PeoplePools.INVITATIONS)
        parts = [expose(world, self._pools, kind, block.members) for kind in kinds]
        shown = Exposures.concatenate(parts)
        shown = take(shown, np.flatnonzero(~block.tied(shown.member, shown.item)))  # not who knows each other already
        is_invitation = PeoplePools.INVITATIONS.made(shown.request)
        members, people = block.rows(shown.member), world.members(shown.item)
        mutual = block.mutual(shown.member, shown.item)
        features = people_features(world, members, people, shown.time, mutual)
        utilities = {}
        for action in ("connected", "followed", "accepted"):
            possible = is_invitation == (action == "accepted")
            every = utility(world, action, members, features, shown.time, shown.note)
            utilities[action] = np.where(possible, every, np.nan)
        exposure = np.where(is_invitation, "invited", "shown")
        return _act(world, shown, exposure, utilities, {"mutual_connections": mutual})


def _act(
    world: World,
    shown: Exposures,
    exposure: np.ndarray,
    utilities: dict[str, np.ndarray],
    context: dict[str, np.ndarray | pa.Array],
    more_truth: dict[str, np.ndarray] | None = None,
) -> Log:
    """Draws what follows each exposure.

    Args:
      exposure: [exposures], the action that showing an item is.
      utilities: by action, float64 [exposures], the logit of its probability; NaN where it cannot follow.
      context: further columns of events, [exposures].
      more_truth: further columns of the truth, [exposures].
    """
    rows, actions, moments = [np.arange(len(shown.item))], [exposure], [shown.time]
    for action, logit in utilities.items():
        acting = np.flatnonzero(world.draws.uniform(f"{action}?", shown.request, shown.item) < expit(logit))
        delay = world.draws.uniform(f"{action} after", shown.request[acting], shown.item[acting]) ** 4
        rows.append(acting)
        actions.append(np.full(len(acting), action))
        moments.append(shown.time[acting] + MAX_DELAY * delay)
    row, action_names, moment = (np.concatenate(parts) for parts in (rows, actions, moments))
    order = np.lexsort((moment, shown.member[row]))
    row = row[order]
    events = {
        "member_id": shown.member[row],
        "item_id": shown.item[row],
        "action": pa.array(action_names[order]).dictionary_encode(),
        "time": times(moment[order]),
        "request": shown.request[row],
    }
    for name, values in context.items():
        events[name] = values.take(pa.array(row)) if isinstance(values, pa.Array) else values[row]
    truth = {name: logit.astype(np.float32) for name, logit in {**utilities, **(more_truth or {})}.items()}
    return Log(pa.table(events), pa.table({"request": shown.request, "item_id": shown.item, **truth}))
