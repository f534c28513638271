"""Writes the simulated network: jobs, posts and people, three datasets of the same members, their union, and the truth
of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from brewjax.console import track
from brewjax.data.simulate import wording
from brewjax.data.simulate.surfaces import Block, JobSurface, PeopleSurface, PostSurface
from brewjax.data.simulate.truth import TRUTH, with_world
from brewjax.data.simulate.world import COLLEAGUES, World
from brewjax.data.tables.card import CARD
from brewjax.paths import CONFIGS, atomic_folder

SURFACES = ("jobs", "posts", "people")
CARDS = CONFIGS / "datasets" / "network"
BLOCK = 5_000  # members that are simulated at a time; the result does not depend on it
ITEM_BLOCK = 50_000  # items that are written at a time
MIN_MEMBERS = 2 * COLLEAGUES


def simulate_network(out: Path, members: int, seed: int = 0, months: int = 8, block: int = BLOCK) -> Path:
    """Writes a network as the dataset folders `jobs`, `posts` and `people` below `out`, which appears complete; `out`
    itself is the union of the three.

    Beside the tables of each is TRUTH: for each exposure (`request`, `item_id`) the utility of each action that may
    follow it, the logit of its probability, and for applications also what it would be under each note.

    Args:
      out: the folder to write.
      members: how many, at least MIN_MEMBERS.
      seed: the same seed, members and months give the same bytes.
      months: from the first of January 2025 on.
      block: members that are simulated at a time, in whole companies.

    Returns:
      `out`.

    Raises:
      ValueError: a number is too small, or `out` is there.
    """
    if members < MIN_MEMBERS:
        raise ValueError(f"{members} members are no network; give at least {MIN_MEMBERS}")
    if months < 1:
        raise ValueError(f"{months} months; give at least 1")
    world = World(seed, members, months)
    with atomic_folder(out) as building, contextlib.ExitStack() as stack:
        writers: dict[tuple[str, str], _Writer] = {}
        (building / CARD).write_text(_card("union", "network", seed))
        for surface in SURFACES:
            (building / surface).mkdir()
            (building / surface / CARD).write_text(_card(surface, f"network-{surface}", seed))
            for file in ("members.parquet", "items.parquet", "events.parquet", TRUTH):
                writers[surface, file] = stack.enter_context(_Writer(building / surface / file))
        _write_members(world, writers, block)
        for ids in _ranges(world.num_jobs, ITEM_BLOCK):
            writers["jobs", "items.parquet"].write(wording.jobs_table(world, world.jobs(ids)))
        for ids in _ranges(world.num_posts, ITEM_BLOCK):
            writers["posts", "items.parquet"].write(wording.posts_table(world, world.posts(ids)))
        stack.close()
    return out


def _card(file: str, name: str, seed: int) -> str:
    """The card of a dataset, whose name says the seed: what is trained on one network may be judged on another."""
    text, line = (CARDS / f"{file}.yaml").read_text(), f"name: {name}\n"
    assert text.count(line) == 1
    return text.replace(line, f"name: {name}-seed-{seed}\n")


def _write_members(world: World, writers: dict[tuple[str, str], _Writer], block: int) -> None:
    """Members, what they did and why, and themselves as items, a block at a time."""
    surfaces: dict[str, JobSurface | PostSurface | PeopleSurface]
    surfaces = {"jobs": JobSurface(world), "posts": PostSurface(world), "people": PeopleSurface(world)}
    companies = -(-block // COLLEAGUES)
    for ids in track(list(_ranges(world.num_members, companies * COLLEAGUES)), "network"):
        members = Block.of(world, ids)
        profiles = wording.members_table(world, members.members, members.connections())
        for name, surface in surfaces.items():
            events, truth = surface.simulate(members)
            writers[name, "members.parquet"].write(profiles)
            writers[name, "events.parquet"].write(events)
            writers[name, TRUTH].write(with_world(truth, world))
        writers["people", "items.parquet"].write(profiles.rename_columns({"member_id": "item_id"}))


def _ranges(count: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


class _Writer:
    """A Parquet file that is written row group by row group of ROW_GROUP rows, however many come at a time."""

    ROW_GROUP = 200_000

    def __init__(self, path: Path):
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> _Writer:
        return self

    def write(self, table: pa.Table) -> None:
        """Adds rows."""
        self._waiting.append(table)
        self._flush(self.ROW_GROUP)

    def _flush(self, min_rows: int) -> None:
        waiting = pa.concat_tables(self._waiting).unify_dictionaries()
        while len(waiting) >= max(min_rows, 1):
            group, waiting = waiting.slice(0, self.ROW_GROUP), waiting.slice(self.ROW_GROUP)
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._path, group.schema)
            self._writer.write_table(group.combine_chunks(), row_group_size=self.ROW_GROUP)
        self._waiting = [waiting]

    def __exit__(self, *error: object) -> None:
        if self._waiting:
            self._flush(1)
        if self._writer is not None:
            self._writer.close()
