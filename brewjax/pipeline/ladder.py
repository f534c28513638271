"""`Ladder`: prune a little, distil, and again, and what that is compared with; a few lines that stand for many stages.

360Brew's report found many small steps better than a large one (arXiv 2501.16450; Faster LLMs for ranking and
retrieval, arXiv 2502.14305): `compare` adds the stages that test this on your data.
"""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from brewjax.config import Config, misplaced

Values = dict[str, Any]  # as YAML has them


class Rung(Config):
    """One step down: to a smaller model, which then learns from the teacher again."""

    prune: Values
    """The settings of a stage `prune`, without `do` and `init_from`."""
    train: Values = {}
    """Training settings of the distillation that differ from the recipe's `train`."""

    @pydantic.field_validator("train")
    @classmethod
    def _whole_steps(cls, train: Values) -> Values:
        if not isinstance(train.get("steps", 1), int):  # they are added up before the stages are read
            raise misplaced(f"expected a whole number, found {train['steps']!r}", "steps")
        return train


class Ladder(Config):
    """Steps down in size from the model of the stage `init_from`, which teaches all of them."""

    do: Literal["ladder"] = "ladder"
    """A ladder of pruning and distillation."""
    init_from: str
    """The stage whose model is the largest, and the teacher of all rungs; the stage before by default."""
    rungs: dict[str, Rung] = pydantic.Field(min_length=1)
    """The rungs by name, from large to small; each becomes the stages NAME-pruned and NAME."""
    distill: Values = {}
    """The settings of a stage `distill`, without `do`, `init_from`, `teacher` and `train`, the same for all rungs."""
    compare: tuple[Literal["direct", "sft", "fresh"], ...] = ()
    """Other methods that reach the size of the last rung, as stages whose names begin with these words. direct: prune
    once, then distil for as many steps as all rungs together; sft: the same rungs, fine-tuned instead of distilled;
    fresh: train from random weights, for the steps of `init_from` and of all rungs together."""


def expand(ladder: Ladder, start: Values, steps: int) -> dict[str, Values]:
    """The ladder as ordinary stages, its rungs before the stages that they are compared with.

    Args:
      start: the settings of the stage `ladder.init_from`.
      steps: the training steps of a stage that does not set its own.
    """
    data = {"data": start["data"]} if start.get("do") == "sft" and "data" in start else {}
    distill = {"do": "distill", "teacher": ladder.init_from} | data | ladder.distill
    sft = {"do": "sft"} | data
    rungs, last = list(ladder.rungs.items()), list(ladder.rungs)[-1]
    total_steps = sum(rung.train.get("steps", steps) for _, rung in rungs)

    stages = _down(rungs, ladder.init_from, "", distill)
    if "direct" in ladder.compare:
        # Of the last rung's method, to its size.
        method = rungs[-1][1].prune | {"do": "prune", "init_from": ladder.init_from, "match_sizes_of": last}
        train = rungs[-1][1].train | {"steps": total_steps}
        stages["direct-pruned"] = method
        stages["direct"] = distill | {"init_from": "direct-pruned", "train": train}
    if "sft" in ladder.compare:
        stages |= _down(rungs, ladder.init_from, "sft-", sft)
    if "fresh" in ladder.compare:
        before = start.get("train", {})
        train = before | {"steps": before.get("steps", steps) + total_steps}
        stages["fresh"] = sft | {"init_from": last, "from_scratch": True, "train": train}
    return stages


def _down(rungs: list[tuple[str, Rung]], start: str, prefix: str, learn: Values) -> dict[str, Values]:
    stages, before = {}, start
    for name, rung in rungs:
        stages[f"{prefix}{name}-pruned"] = {"do": "prune", "init_from": before, **rung.prune}
        before = f"{prefix}{name}"
        stages[before] = learn | {"init_from": f"{before}-pruned", "train": rung.train}
    return stages
