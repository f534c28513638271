"""Hard negatives, mined from an index: items near a member that the member has had nothing to do with.

An item is mined for an example if an encoder finds it among the nearest of the member as of the example's cutoff time,
it could have been shown then, no event of the training period joins the two, and it is clearly less similar than the
positives are: not above a margin below their mean (TopK-PercPos of NV-Retriever, Moreira et al. 2024, arXiv 2407.15831,
there for the one positive of a query).

Axis letters: I items of the catalogue, D dimensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brewjax.data.records.contrastive import ContrastiveConfig, MinedNegatives
from brewjax.data.records.example_table import write_example_table
from brewjax.data.records.provenance import training_examples
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.partition import WHOLE
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.questions import eligible_items
from brewjax.data.tasks.task import Task
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.index import Index, IndexConfig


def mine_negatives(
    encoder: Encoder, dataset: Dataset, task: Task, config: ContrastiveConfig, mined: MinedNegatives, folder: Path
) -> None:
    """Mines the negatives of all training examples, for an `ExampleTable` to read: int32 rows of items, the nearest
    first.

    Items are described as of the end of the training period, members as of each example's cutoff time.

    Args:
      encoder: finds them.
      dataset: the tables.
      task: whose examples are trained on.
      config: chooses the examples.
      mined: how many are looked at, and the margin.
      folder: where the table goes; what is there is not made again.

    Raises:
      ConfigError: the encoder is of another task, or of other tables.
    """
    if encoder.task.name != task.name:
        raise mined.error(f"the encoder is of task '{encoder.task.name}', not '{task.name}'", "encoder")
    if key := encoder.surface.card.differing_part(dataset.card):
        raise mined.error(f"the encoder was trained on tables with other '{key}' in their card", "encoder")
    until = task.boundaries(dataset)[0]
    of_task = np.flatnonzero(dataset.items_of(task.questions.actions[0]))
    embedded = encoder.embed_items(dataset, of_task, until)
    vectors = np.zeros((len(dataset.items), embedded.shape[1]), np.float32)
    vectors[of_task] = embedded
    with tempfile.TemporaryDirectory() as temporary:
        index = Index.create(Path(temporary) / "items", IndexConfig(dimensions=vectors.shape[1]))
        rows = np.flatnonzero(eligible_items(dataset, task))
        index.upsert(rows.tolist(), vectors[rows])
        examples = training_examples(dataset, task, config, WHOLE, config.repeats)
        search = lambda part: _mine_negatives_of(encoder, dataset, task, mined, index, vectors, part, until)  # noqa: E731
        write_example_table(folder, examples, search, "mined negatives")
        index.close()


def _mine_negatives_of(
    encoder: Encoder,
    dataset: Dataset,
    task: Task,
    mined: MinedNegatives,
    index: Index,
    vectors: np.ndarray,
    examples: Sequence[RankingExample],
    until: int,
) -> list[np.ndarray]:
    """The rows of the mined items of each example, the nearest first; `vectors` [I, D] are of the task's items."""
    moments = {(example.member, example.cutoff_time): example for example in examples}  # repeats share them
    members = dict(zip(moments, encoder.embed_members(dataset, [*moments.values()]), strict=True))
    known = {member: _known_items(dataset, member, until) for member, _ in moments}
    excluded = [known[member].tolist() for member, _ in moments]
    hits = dict(zip(moments, index.search(np.stack([*members.values()]), mined.depth, exclude=excluded), strict=True))
    begins, ends = dataset.item_life
    best, items = int(np.argmax(task.values)), []
    for example in examples:
        moment = example.member, example.cutoff_time
        nearest, scores = np.array(hits[moment].ids, np.int64), hits[moment].scores
        positives = example.candidates[example.labels == best]
        if not len(positives):
            items.append(np.zeros(0, np.int32))
            continue
        similarity = float(np.mean(vectors[positives] @ members[moment]))
        is_clear = scores <= similarity - (1 - mined.margin) * abs(similarity)
        is_there = (begins[nearest] <= example.cutoff_time) & (example.cutoff_time < ends[nearest])
        items.append(nearest[is_clear & is_there].astype(np.int32))
    return items


def _known_items(dataset: Dataset, member: int, until: int) -> np.ndarray:
    """The rows of the items that a member has an event with before a time."""
    start, end = dataset.member_offsets[member : member + 2]
    end = start + np.searchsorted(dataset.event_time[start:end], until)
    return np.unique(dataset.event_item[start:end])
