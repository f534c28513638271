"""What a task asks for, in the terms of facts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from brewjax.data.tables.facts import Fact
from brewjax.data.tasks.conditions import as_list
from brewjax.data.tasks.task import Task


def target_sign(task: Task, fact: Fact) -> int:
    """Tells whether a fact is of what the task asks for: the events that the label with the highest value matches.

    Args:
      task: whose labels say which events match them.
      fact: of the same dataset.

    Returns:
      1 if the fact counts an action of that label, or is of a column of which it has higher numbers than the label with
      the lowest value; -1 if it has lower ones, as a task "disliked" has of stars; 0 if the fact is of something else.
    """
    best, worst = (task.labels[int(index)].match or {} for index in (task.values.argmax(), task.values.argmin()))
    if fact.column is None:
        return int(any(action in fact.actions for action in as_list(best.get("action", []))))
    if fact.column not in best:
        return 0
    center = _center(best[fact.column])
    if fact.column in worst:
        center -= _center(worst[fact.column])
    elif math.isfinite(center):
        return 0  # nothing says on which side all other numbers are
    return 0 if math.isnan(center) else int(np.sign(center))


def _center(condition: Any) -> float:
    """The middle of a condition's numbers; of a range with one end, infinity on its open side."""
    if not isinstance(condition, dict):
        return float(np.mean(as_list(condition)))
    low, high = condition.get("min", condition.get("above")), condition.get("max", condition.get("below"))
    return math.inf if high is None else -math.inf if low is None else (low + high) / 2
