"""TODO."""

from __future__ import annotations

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import ItemStatistic
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.members import _attributes


def request_from_example(dataset: Dataset, task: Task, example: RankingExample, steering_note: str = "") -> pb.Member:
    """An example of a dataset as a request: what `say` says of it is what a `Verbalizer` of the dataset says."""
    card, rows, cut = dataset.card, example.history, example.cutoff_time
    attributes = _attributes(card.members.attributes, dataset.members, np.array([example.member]))
    of_events = _attributes(card.events.attributes, dataset.events, rows)
    of_items = {
        where: _attributes(
            [attribute for attribute in card.items.attributes if where in attribute.where],
            dataset.items,
            items,
            {
                attribute.column: ItemStatistic(dataset, attribute.derive).at(items, np.full(len(items), cut)).tolist()
                for attribute in card.items.attributes
                if attribute.derive
            },
        )
        for where, items in (("history", dataset.event_item[rows]), ("question", example.candidates))
    }
    moment = Timestamp()
    moment.FromMicroseconds(cut)
    request = pb.Member(task=task.name, now=moment, attributes=attributes[0], steering_note=steering_note)
    for row, of_event, of_item in zip(rows, of_events, of_items["history"], strict=True):
        event = request.history.add(action=str(dataset.event_action[row]), attributes=of_event, item=of_item)
        event.time.FromMicroseconds(int(dataset.event_time[row]))
    ids = dataset.items[card.items.id]
    for item, of_item in zip(example.candidates, of_items["question"], strict=True):
        request.items.add(id=str(ids[int(item)].as_py()), attributes=of_item)
    return request
