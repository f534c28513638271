"""The oracle: the probabilities that a simulated network drew its answers with. No predictor can expect to beat it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.special import expit

from brewjax.data.simulate.world import World
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.union import included_folders
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task

TRUTH = "truth.parquet"  # in a dataset folder: for each exposure (request, item_id), the utility of each action
NOTED = "{action}, note {note}"  # column with what the utility would be under a note
WORLD = b"brewjax.network"  # key of the file's metadata: what the network was made of


def with_world(truth: pa.Table, world: World) -> pa.Table:
    """The table, with what `load_world` reads."""
    numbers = {"seed": world.seed, "members": world.num_members, "months": world.months}
    return truth.replace_schema_metadata({WORLD: json.dumps(numbers)})


def load_world(folder: Path) -> World:
    """Reads which world a dataset folder was simulated in.

    Args:
      folder: as `brewjax data simulate network` writes each surface.

    Returns:
      The world, made again from its seed, members and months.

    Raises:
      ValueError: the folder is not of a simulated network.
    """
    metadata = (pq.read_schema(folder / TRUTH).metadata if (folder / TRUTH).exists() else None) or {}
    if WORLD not in metadata:
        raise ValueError(f"{folder} is not of a simulated network; `brewjax data simulate network` writes one")
    return World(**json.loads(metadata[WORLD]))


def action_column(dataset: Dataset, task: Task) -> str | None:
    """Finds the column of `TRUTH` that answers a task: of the action of one label, where the other is that nothing
    followed.

    Args:
      dataset: the tables.
      task: of two labels.

    Returns:
      The name of the column; None if the tables are of no simulation, or the task asks about something else.
    """
    folder, name = _origin(dataset, task)
    if not (folder / TRUTH).exists() or len(task.labels) != 2 or task.default_label < 0:
        return None
    schema = pq.read_schema(folder / TRUTH)
    action = str((task.labels[1 - task.default_label].match or {}).get("action")).removeprefix(name)
    simulated = WORLD in (schema.metadata or {}) and not task.questions.sampled_negatives
    return action if simulated and action in schema.names else None


def note_of(dataset: Dataset, task: Task) -> str | None:
    """The note that a task states, if the truth of its questions is known with it and without.

    Args:
      dataset: the tables.
      task: of requests that stood under one note.

    Returns:
      "location" or another of `utility.NOTES`, but "none"; None if there is no note, or no such truth.
    """
    action, note = action_column(dataset, task), task.questions.where.get("note")
    if action is None or not task.steering_note or note == "none":
        return None
    folder, _ = _origin(dataset, task)
    return note if NOTED.format(action=action, note=note) in pq.read_schema(folder / TRUTH).names else None


def oracle(
    dataset: Dataset, task: Task, examples: Sequence[RankingExample], note: str | None = None
) -> np.ndarray | None:
    """The true probabilities of the answers to some questions.

    Args:
      dataset: the tables of a surface of a simulated network, or of their union.
      task: asked of them.
      examples: all of whose candidates are events.
      note: in place of what the member's request stood under, "location" or another of `utility.NOTES`; the truth has
        it of applications alone.

    Returns:
      float64 [questions, labels]; None if the dataset's folder has no truth of the task.

    Raises:
      ValueError: a question is not of an exposure of this network.
    """
    action, (folder, name) = action_column(dataset, task), _origin(dataset, task)
    if action is None:
        return None
    column = action if note is None else NOTED.format(action=action, note=note)
    truth = pq.read_table(folder / TRUTH, columns=["request", "item_id", column])
    exposures = np.concatenate([np.zeros(0, np.int64), *(example.exposures for example in examples)])
    if (exposures < 0).any():
        raise ValueError(f"task {task.name}: the truth is of what was shown, and some candidates were not")
    events = dataset.events.take(pa.array(exposures))
    request, item = (_plain_ids(events[key], name) for key in ("request", "item_id"))
    utilities = _look_up(truth, column, request, item)
    if np.isnan(utilities).any():
        row = int(np.flatnonzero(np.isnan(utilities))[0])
        raise ValueError(
            f"{folder / TRUTH}: nothing on '{action}' in request {events['request'][row]}, item "
            f"{events['item_id'][row]}; the folder's events are of another network"
        )
    result = np.empty((len(utilities), 2))
    result[:, 1 - task.default_label], result[:, task.default_label] = expit(utilities), expit(-utilities)
    return result


def _origin(dataset: Dataset, task: Task) -> tuple[Path, str]:
    """The folder of the tables that a task asks about, and what stands in front of their names in a union."""
    name = dataset.card.origin_of(task.questions.actions[0])
    return (included_folders(dataset.path)[name], f"{name}.") if name else (dataset.path, "")


def _plain_ids(ids: pa.ChunkedArray, name: str) -> np.ndarray:
    """int64: ids of a simulated network, without the `name` that stands in front of them."""
    return (pc.utf8_slice_codeunits(ids, len(name)).cast(pa.int64()) if name else ids).to_numpy()


def _look_up(truth: pa.Table, column: str, request: np.ndarray, item: np.ndarray) -> np.ndarray:
    """float64: the value of each (request, item); NaN where there is none."""
    known_request, known_item = truth["request"].to_numpy(), truth["item_id"].to_numpy()
    size = max(int(known_item.max(initial=0)), int(item.max(initial=0))) + 1
    codes, queries = known_request * size + known_item, request * size + item
    order = np.argsort(codes, kind="stable")
    place = np.minimum(np.searchsorted(codes[order], queries), len(codes) - 1)
    values = truth[column].to_numpy().astype(np.float64)[order]
    return np.where(codes[order][place] == queries, values[place], np.nan)
