"""The ladder down: prune a little, distil, and again, and what that is compared with; a few lines for many stages.

360Brew's report found many small steps better than a large one (arXiv 2501.16450; Faster LLMs for ranking and
retrieval, arXiv 2502.14305): `compare` asks that of your data.
"""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from brewjax.config import Config, misplaced

Values = dict[str, Any]  # as YAML has them


class Rung(Config):
    """One step down: to a smaller model, which then learns from the teacher again."""

    prune: Values
    """A stage `prune` without its `do` and `start`."""
    train: Values = {}
    """What differs from the recipe's `train` in the distillation."""

    @pydantic.field_validator("train")
    @classmethod
    def _whole_steps(cls, train: Values) -> Values:
        if not isinstance(train.get("steps", 1), int):  # they are added up before the stages are read
            raise misplaced(f"expected a whole number, found {train['steps']!r}", "steps")
        return train


class Ladder(Config):
    """From the model of the stage `start`, the teacher of all rungs, down."""

    do: Literal["ladder"] = "ladder"
    init_from: str
    rungs: dict[str, Rung] = pydantic.Field(min_length=1)
    """By name, from large to small: stages NAME-pruned and NAME."""
    distill: Values = {}
    """A stage `distill` without its `do`, `start`, `teacher` and `train`, the same for all rungs."""
    compare: tuple[Literal["direct", "sft", "fresh"], ...] = ()
    """With the other ways to the size of the last rung, by stages whose names begin with these: direct: pruned
    once, which is a result of its own, and distilled for as many steps as all rungs together; sft: down the same
    rungs, but by fine-tuning instead of distillation; fresh: trained from random weights on what `start` was, for
    the steps of `start` and of all rungs together."""


def expand(ladder: Ladder, start: Values, steps: int) -> dict[str, Values]:
    """The ladder as ordinary stages, its rungs before what they are compared with.

    Args:
      start: the stage `ladder.start`.
      steps: of a training stage that does not say how many.
    """
    data = {"data": start["data"]} if start.get("do") == "sft" and "data" in start else {}
    taught = {"do": "distill", "teacher": ladder.init_from} | data | ladder.distill
    tuned = {"do": "sft"} | data
    rungs, last = list(ladder.rungs.items()), list(ladder.rungs)[-1]
    in_all = sum(rung.train.get("steps", steps) for _, rung in rungs)

    stages = _down(rungs, ladder.init_from, "", taught)
    if "direct" in ladder.compare:
        # Of the last rung's method, to its size.
        method = rungs[-1][1].prune | {"do": "prune", "init_from": ladder.init_from, "match_sizes_of": last}
        train = rungs[-1][1].train | {"steps": in_all}
        stages["direct-pruned"] = method
        stages["direct"] = taught | {"init_from": "direct-pruned", "train": train}
    if "sft" in ladder.compare:
        stages |= _down(rungs, ladder.init_from, "sft-", tuned)
    if "fresh" in ladder.compare:
        before = start.get("train", {})
        train = before | {"steps": before.get("steps", steps) + in_all}
        stages["fresh"] = tuned | {"init_from": last, "from_scratch": True, "train": train}
    return stages


def _down(rungs: list[tuple[str, Rung]], start: str, prefix: str, learn: Values) -> dict[str, Values]:
    stages, before = {}, start
    for name, rung in rungs:
        stages[f"{prefix}{name}-pruned"] = {"do": "prune", "init_from": before, **rung.prune}
        before = f"{prefix}{name}"
        stages[before] = learn | {"init_from": f"{before}-pruned", "train": rung.train}
    return stages
