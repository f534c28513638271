"""`Catalogue`: a dataset that the server knows, so that requests name members and items by their ids alone."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import FactValues
from brewjax.data.tasks.examples import RankingExample, example_at, unanswered
from brewjax.data.tasks.task import Task
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.members import request_time


class Catalogue:
    """The members, items and events of a dataset.

    A prompt of it is, to the bit, that of the same member sent in full: both are rendered from tables by one code.

    Attributes:
      dataset: the tables.
      facts: its facts, as of any time.
    """

    def __init__(self, dataset: Dataset):
        self.dataset, self.facts = dataset, FactValues.of(dataset)

    @classmethod
    def load(cls, folder: str | Path, bundle: Bundle, surface: Surface) -> Catalogue:
        """Reads the folder of a dataset, and computes what facts are looked up in.

        Raises:
          ConfigError: the card is not that of the model's training on the surface.
        """
        catalogue = cls(dataset := Dataset.load(folder))
        if part := dataset.card.differing_part(surface.card):
            message = f"its card's '{part}' is not that of the model's training on surface '{surface.name}'"
            raise ConfigError(f"{folder}: {message}")
        for task in surface.tasks:  # the first request would wait for the facts' indices
            example = example_at(dataset, task, 0).select(slice(1))
            verbalizer = bundle.request_verbalizer(surface, dataset, catalogue.facts)
            verbalizer.prompt(task, example, bundle.prompts.score_style)
        return catalogue

    @cached_property
    def _item_rows(self) -> dict[str, int]:
        return _rows_by_id(self.dataset.items[self.dataset.card.items.id])

    @cached_property
    def _member_rows(self) -> dict[str, int]:
        return _rows_by_id(self.dataset.members[self.dataset.card.members.id])

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
        row = self._member_rows.get(member.id)
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
        row = self._item_rows.get(item.id)
        if row is None:
            raise ValueError(f"{field}.id: no item '{item.id}' in the catalogue; {self._describe_ids('items')}")
        origin = self.dataset.card.origin_of(task.questions.actions[0])
        if [*self.dataset.card.origins][self.dataset.item_origin[row]] != origin:
            raise ValueError(f"{field}.id: '{item.id}' is none of {origin}, which task '{task.name}' asks about")
        return row

    def _describe_ids(self, table: str) -> str:
        ids = getattr(self.dataset, table)[getattr(self.dataset.card, table).id]
        return "ids look like " + ", ".join(f"'{known}'" for known in ids[:3].to_pylist())


def _rows_by_id(ids: pa.ChunkedArray) -> dict[str, int]:
    return {id_: row for row, id_ in enumerate(ids.cast(pa.string()).to_pylist())}
