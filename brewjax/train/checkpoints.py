"""Checkpoints of a training run, which resumes from the newest one that can be read."""

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
    """A run has checkpoints, and none of them can be read."""


@contextlib.contextmanager
def open_checkpoints(folder: Path, keep: int) -> Iterator[ocp.training.Checkpointer]:
    """Context manager: Orbax's checkpointer for `folder/checkpoints`, which keeps the newest `keep` checkpoints.

    Within it Orbax does not log: a failure is raised once, and every thread would log it again.
    """
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
    """The newest checkpoint that can be read, in the shapes and shardings of `abstract`; None if there is none yet.

    Newer checkpoints are damaged: each is named on stderr and moved to `damaged-STEP`, next to the folder.

    Raises:
      UnreadableCheckpointError: if there are checkpoints and none can be read; then nothing is moved.
    """
    steps = sorted((checkpoint.step for checkpoint in checkpointer.checkpoints), reverse=True)
    damaged: dict[int, str] = {}
    for step in steps:
        try:
            with _quiet_coroutines():
                restored = checkpointer.load_checkpointables(step, abstract)
        except Exception as error:  # of many types, depending on which file is missing or incomplete
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
    shutil.rmtree(aside, ignore_errors=True)  # from an earlier run
    path.rename(aside)
    print(f"{path}: cannot be read ({reason}); moved to {aside}, going on from step {good}", file=sys.stderr)


@contextlib.contextmanager
def _quiet_coroutines() -> Iterator[None]:
    """Context manager: silences warnings about coroutines that a failed read leaves; its error is raised already."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
