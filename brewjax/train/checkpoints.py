"""Checkpoints of a training run: the newest that can be read is what it goes on from."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from brewjax import distributed

CHECKPOINTS = "checkpoints"


class UnreadableCheckpointError(RuntimeError):
    """No checkpoint of a run can be read."""


@contextlib.contextmanager
def open_checkpoints(folder: Path, keep: int) -> Iterator[ocp.training.Checkpointer]:
    """Orbax's checkpointer for `folder/checkpoints`, of which the newest `keep` stay. What failed is raised once, and
    not logged by every thread that meets it besides."""
    logger, policy = logging.getLogger("absl"), ocp.training.preservation_policies.LatestN(keep)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with ocp.training.Checkpointer(
            (folder / CHECKPOINTS).absolute(), preservation_policy=policy, cleanup_tmp_directories=True
        ) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)


def restore(checkpointer: ocp.training.Checkpointer, abstract: dict[str, Any]) -> dict[str, Any] | None:
    """What the newest readable checkpoint holds, in the shapes and places of `abstract`; None where there is none yet.

    Checkpoints newer than that are damaged: each is named on stderr and moved to `damaged-STEP`, beside the others'
    folder. Raises CheckpointError where there are checkpoints and none can be read; then nothing is moved.
    """
    steps = sorted((checkpoint.step for checkpoint in checkpointer.checkpoints), reverse=True)
    damaged: dict[int, str] = {}
    for step in steps:
        try:
            with _quiet_coroutines():
                restored = checkpointer.load_checkpointables(step, abstract)
        except Exception as error:  # of many types, by what is missing or cut short
            damaged[step] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        for damaged_step, reason in damaged.items():
            distributed.run_on_process_zero(
                functools.partial(_set_aside, Path(checkpointer.directory), damaged_step, reason, step)
            )
        if damaged:
            checkpointer.reload()
        return restored
    if damaged:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise UnreadableCheckpointError(
            f"{checkpointer.directory}: no checkpoint there can be read ({reasons}). Delete the stage's folder to "
            "train it anew"
        )
    return None


def _set_aside(folder: Path, step: int, reason: str, good: int) -> None:
    path, aside = folder / str(step), folder.parent / f"damaged-{step}"
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
    path.rename(aside)
    print(f"{path}: cannot be read ({reason}); moved to {aside}, going on from step {good}", file=sys.stderr)


@contextlib.contextmanager
def _quiet_coroutines() -> Iterator[None]:
    """Without a page for every coroutine that a failed read leaves behind: its error is raised already."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
