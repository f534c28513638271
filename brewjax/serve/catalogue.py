"""`Catalogue`: a dataset that the server knows, so that requests name members and items by their ids alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import TEXT
from brewjax.data.tables.statistics import FactValues
from brewjax.data.tasks.examples import RankingExample, unanswered
from brewjax.data.tasks.task import Task
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.changes import ChangedRows
from brewjax.serve.members import request_time


class Catalogue:
    """The members, items and events of a dataset. It never changes: `extended` makes another.

    A prompt of it is, to the bit, that of the same member sent in full: both are rendered from tables by one code.

    Args:
      dataset: the tables.
      member_rows: the row of each member by id, where that is known already.
      item_rows: likewise of each item.

    Attributes:
      facts: of the tables, as of any time.
    """

    def __init__(
        self, dataset: Dataset, member_rows: dict[str, int] | None = None, item_rows: dict[str, int] | None = None
    ):
        # Not `FactValues.of`: dataset and facts would hold each other, until a collection that a busy server puts off.
        self.dataset, self.facts = dataset, FactValues(dataset)
        self.member_rows = member_rows or _rows_by_id(dataset.members[dataset.card.members.id])
        self.item_rows = item_rows or _rows_by_id(dataset.items[dataset.card.items.id])

    @classmethod
    def load(cls, folder: str | Path, surface: Surface) -> Catalogue:
        """Reads the folder of a dataset.

        Raises:
          ConfigError: the card is not that of the model's training on the surface.
        """
        catalogue = cls(Dataset.load(folder))
        if part := catalogue.dataset.card.differing_part(surface.card):
            message = f"its card's '{part}' is not that of the model's training on surface '{surface.name}'"
            raise ConfigError(f"{folder}: {message}")
        return catalogue

    def warm_up(self, bundle: Bundle, surface: Surface) -> None:
        """Computes what facts are looked up in, for which the first request would wait."""
        dataset = self.dataset
        for task in surface.tasks:
            verbalizer = bundle.request_verbalizer(surface, dataset, self.facts)
            for event in np.flatnonzero(dataset.has_action(task.questions.actions))[-1:]:
                member, item = int(dataset.event_member[event]), dataset.event_item[event : event + 1]
                example = unanswered(dataset, task, member, dataset.last_event_time + 1, item)
                verbalizer.prompt(task, example, bundle.prompts.score_style)

    def extended(self, added: Sequence[ChangedRows]) -> Catalogue:
        """The catalogue with further rows, as if they stood at the end of the tables' files.

        Args:
          added: in their order. A member or item that is there already is replaced where it stands. An event that is
            there already, by its member, item, action and time, is left out. In a union items and events stand at the
            end of their dataset's, and new members behind those of all.
        """
        dataset = self.dataset
        card = dataset.card
        tables = [pa.concat_tables(parts) for parts in zip(*added, strict=True)]
        members, member_rows = _upsert(dataset.members, tables[0], card.members.id, self.member_rows)
        items, item_rows = _upsert(dataset.items, tables[1], card.items.id, self.item_rows)
        events = _add_events(dataset, tables[2], member_rows, item_rows) if len(tables[2]) else dataset.events
        longer = dataclasses.replace(dataset, members=members, items=items, events=events)
        if (np.diff(longer.item_origin) < 0).any():  # the items of each dataset of a union stand together
            items = items.take(pa.array(np.argsort(longer.item_origin, kind="stable")))
            longer, item_rows = dataclasses.replace(longer, items=items), _rows_by_id(items[card.items.id])
        return Catalogue(longer, member_rows, item_rows)

    def example(self, task: Task, member: pb.Member) -> RankingExample:
        """The member of a request as of `member.now`, with its items, in their order, as candidates.

        Raises:
          ValueError: naming the field of an unknown id, or of something that the catalogue knows already.
        """
        for name in ("attributes", "history"):
            if getattr(member, name):
                raise ValueError(f"member.{name}: the catalogue has those of member.id; leave out one or the other")
        if task.questions.context and member.items:
            context = ", ".join(task.questions.context)
            raise ValueError(f"member.id: task '{task.name}' states {context}; send the member in full")
        row = self.member_rows.get(member.id)
        if row is None:
            raise ValueError(f"member.id: no member '{member.id}' in the catalogue; {self._describe_ids('members')}")
        candidates = [self._item_row(task, item, f"member.items[{index}]") for index, item in enumerate(member.items)]
        return unanswered(self.dataset, task, row, request_time(member), np.array(candidates, np.int32))

    def past_items(self, example: RankingExample) -> list[str]:
        """The ids of the items that the member of an example had an event with."""
        start = self.dataset.member_offsets[example.member]
        items = self.dataset.event_item[start : start + example.num_past_events]
        return [self.dataset.item_id(row) for row in np.unique(items)]

    def _item_row(self, task: Task, item: pb.Item, field: str) -> int:
        for name in ("attributes", "context"):
            if getattr(item, name):
                raise ValueError(f"{field}.{name}: with member.id, an item is its id alone")
        row = self.item_rows.get(item.id)
        if row is None:
            raise ValueError(f"{field}.id: no item '{item.id}' in the catalogue; {self._describe_ids('items')}")
        origin = self.dataset.card.origin_of(task.questions.actions[0])
        if [*self.dataset.card.origins][self.dataset.item_origin[row]] != origin:
            raise ValueError(f"{field}.id: '{item.id}' is none of {origin}, which task '{task.name}' asks about")
        return row

    def _describe_ids(self, table: str) -> str:
        ids = getattr(self.dataset, table)[getattr(self.dataset.card, table).id]
        return "ids look like " + ", ".join(f"'{known}'" for known in ids[:3].to_pylist())


def _texts(ids: pa.ChunkedArray) -> list[str]:
    return ids.cast(TEXT).to_pylist()


def _rows_by_id(ids: pa.ChunkedArray) -> dict[str, int]:
    return {id_: row for row, id_ in enumerate(_texts(ids))}


def _upsert(table: pa.Table, added: pa.Table, id_column: str, rows: dict[str, int]) -> tuple[pa.Table, dict[str, int]]:
    """The table with rows replaced, or added at its end, by id; and the row of each id."""
    if not len(added):
        return table, rows
    rows, place = dict(rows), np.arange(len(table) + len(added))
    for number, id_ in enumerate(_texts(added[id_column]), len(table)):
        place[rows.setdefault(id_, len(rows))] = number
    return pa.concat_tables([table, added]).take(pa.array(place[: len(rows)])), rows


def _add_events(dataset: Dataset, added: pa.Table, member_rows: dict[str, int], item_rows: dict[str, int]) -> pa.Table:
    """The dataset's events with further ones, in the order of a dataset."""
    events, count, origins = dataset.card.events, len(dataset.events), [*dataset.card.origins]
    actions = pc.index_in(added[events.action], pa.array(events.actions, TEXT))
    member, item, action, time = (
        np.concatenate(parts)
        for parts in (
            (dataset.event_member, [member_rows[id_] for id_ in _texts(added[events.member])]),
            (dataset.event_item, [item_rows[id_] for id_ in _texts(added[events.item])]),
            (dataset.event_action, actions.to_numpy()),
            (dataset.event_time, added[events.time].cast(pa.int64()).to_numpy()),
        )
    )
    # An event that is there already is of a member who has new ones.
    rows = np.flatnonzero(np.isin(member, member[count:]))
    keys = np.stack([member, item, action, time])[:, rows]
    order = np.lexsort(keys)
    repeated = np.append(False, (np.diff(keys[:, order]) == 0).all(axis=0))
    keep = np.ones(len(member), bool)
    keep[rows[order[repeated]]] = False
    keep[:count] = True  # tables may hold several, which differ in an attribute
    action_origin = np.array([origins.index(dataset.card.origin_of(name)) for name in events.actions])
    order = np.lexsort((action_origin[action], time, member))
    return pa.concat_tables([dataset.events, added]).take(pa.array(order[keep[order]]))
