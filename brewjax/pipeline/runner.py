"""Runs steps in order, each into a folder of its own: skips what is done, resumes what was interrupted."""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from brewjax import distributed
from brewjax.config import ConfigError
from brewjax.console import bold, plain_console
from brewjax.fingerprint import hash_json, hash_packages
from brewjax.paths import storage_errors, write_text
from brewjax.train.metrics_writer import METRICS, read_metrics

RECORD = "stage.json"
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
HERE = Path(__file__).parents[1]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
      run: does the work, in the folder that it gets.
      depends_on: the names of the steps whose results it needs.
      settings: everything else that its result depends on, as values that JSON can hold.
      code: the folders of the package whose code makes its result.
      protected: its result took long: it is resumed, and never replaced unless the user deletes it.
      resumable: it goes on with what an interrupted attempt left; as are protected ones.
      all_processes: all processes run it, each on its devices; otherwise process zero runs it while the others wait.
    """

    name: str
    run: Callable[[Path], None]
    depends_on: tuple[str, ...]
    settings: Any
    code: tuple[str, ...]
    protected: bool = False
    resumable: bool = False
    all_processes: bool = False


def run_steps(steps: Sequence[Step], folder: Path, data: str, allow_code_mismatch: bool = False) -> None:
    """Runs steps into `folder/<name>`, and skips those that are done from the same data, settings and code.

    Args:
      steps: in the order in which they run.
      folder: of the run.
      data: a hash of the datasets, which all steps read.
      allow_code_mismatch: accept results that other code made.

    Raises:
      ConfigError: a protected step has a result of other data, settings or code; before anything is written, so that
        outputs are never mixed.
    """
    console = plain_console()
    made = _fingerprints(steps, data)
    records = distributed.run_on_process_zero(
        lambda: {
            step.name: _usable_record(folder / step.name, step, made[step.name], allow_code_mismatch) for step in steps
        }
    )
    for step in steps:
        output, record = folder / step.name, records[step.name]
        if record and "seconds" in record:
            console.print(bold(step.name, f": done before, in {record['seconds']:.0f} s"))
            continue
        console.print(bold(step.name))
        with storage_errors(output):
            record = distributed.run_on_process_zero(functools.partial(_begin, output, record, made[step.name]))
            seconds = _seconds_before(output)
            start_time = time.perf_counter()
            if step.all_processes:
                step.run(output)
            else:
                distributed.run_on_process_zero(functools.partial(step.run, output))
            record["seconds"] = seconds + time.perf_counter() - start_time
            distributed.run_on_process_zero(functools.partial(_write_record, output, record))
        gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES / 1e9
        console.print(bold(step.name, f": {record['seconds']:.0f} s, {gigabytes:.1f} GB of memory at most so far"))


def _fingerprints(steps: Sequence[Step], data: str) -> dict[str, dict[str, str]]:
    """What each step's result depends on, with the steps before: `made_of`, data and settings; and `code`."""
    made: dict[str, dict[str, str]] = {}
    for step in steps:
        before = [made[name] for name in step.depends_on]
        made[step.name] = {
            "made_of": hash_json([data, step.settings, [fingerprint["made_of"] for fingerprint in before]]),
            "code": hash_json([hash_packages(step.code), [fingerprint["code"] for fingerprint in before]]),
        }
    return made


def _usable_record(output: Path, step: Step, now: dict[str, str], allow_code_mismatch: bool) -> Record | None:
    """The record of a step that is done or can be resumed; None where it starts anew. Writes nothing.

    Raises ConfigError where a protected result would be replaced.
    """
    try:
        before = read_record(output)
    except ValueError as error:
        if not step.protected:
            return None
        raise ConfigError(
            f"{error}, so what {output} was made of is unknown; delete that folder to train it again, or give "
            "another --out"
        ) from None
    same_settings = before.get("made_of") == now["made_of"]
    if same_settings and (allow_code_mismatch or before.get("code") == now["code"]):
        return before if step.protected or step.resumable or "seconds" in before else None
    if before and step.protected:
        code = f"other code ({before.get('commit') or 'of an unknown commit'})"
        hint = ", or take it as it is with --allow-code-mismatch" if same_settings else ""
        raise ConfigError(
            f"{output}: made from {code if same_settings else 'other data or settings'}, so it is neither continued "
            f"nor replaced; give another --out, or delete that folder{hint}"
        )
    return None


def _begin(output: Path, record: Record | None, now: dict[str, str]) -> Record:
    """Starts or resumes a step: makes its folder ready and returns its record."""
    if record is None:
        if output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True)
    record = now | {"commit": record.get("commit") if record else _commit()}
    _write_record(output, record)
    return record


def _seconds_before(output: Path) -> float:
    """Seconds of training in earlier, interrupted attempts."""
    rows = read_metrics(output / METRICS)
    return rows[-1]["seconds"] if rows else 0.0


def read_record(output: Path) -> Record:
    """Reads what is known of a step.

    Args:
      output: folder of the step.

    Returns:
      Its fingerprints and commit, and its seconds once it is done; {} where it was never started.

    Raises:
      ValueError: the file is damaged.
    """
    path = output / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: damaged, no JSON object")
    return record


def _write_record(output: Path, record: Record) -> None:
    write_text(output / RECORD, json.dumps(record))


def _commit() -> str:
    """The commit of the running code; "" outside a clone."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
