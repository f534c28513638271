"""Steps run in order, each into a folder of its own. What is done is not done again; what was killed goes on."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from brewjax import hosts
from brewjax.config import ConfigError
from brewjax.console import bold, plain_console

RECORD = "stage.json"
KILOBYTE = 1 if sys.platform == "darwin" else 1024  # what the system counts a process's memory in, in bytes
HERE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
      run: does it, in the folder that it is given.
      after: the steps whose results it needs.
      settings: what else it depends on, as JSON has it.
      code: the folders of the package whose code makes its result.
      keep: what it leaves is too dear to be replaced unasked; begun, it goes on.
      together: all processes run it, each on its devices; else the first one does, and the others wait.
    """

    name: str
    run: Callable[[Path], None]
    after: tuple[str, ...]
    settings: Any
    code: tuple[str, ...]
    keep: bool = False
    together: bool = False


def run_steps(steps: Sequence[Step], folder: Path, data: str, any_code: bool = False) -> None:
    """Runs steps into `folder/<name>`; what is done from the same data, settings and code is skipped.

    Raises ConfigError instead of mixing outputs: what is dear, made otherwise, is neither continued nor overwritten.

    Args:
      data: a hash of what all steps read.
      any_code: takes what other code made for good.
    """
    console = plain_console()
    made: dict[str, dict[str, str]] = {}
    for step in steps:
        before = [made[name] for name in step.after]
        output = folder / step.name
        now = made[step.name] = {
            "made_of": _hash([data, step.settings, [one["made_of"] for one in before]]),
            "code": _hash([_hash_code(step.code), [one["code"] for one in before]]),
        }
        record = hosts.on_first(functools.partial(_begin, output, step.keep, now, any_code))
        if "seconds" in record:
            console.print(bold(step.name, f": done before, in {record['seconds']:.0f} s"))
            continue
        console.print(bold(step.name))
        began = time.perf_counter()
        if step.together:
            step.run(output)
        else:
            hosts.on_first(functools.partial(step.run, output))
        record["seconds"] = time.perf_counter() - began
        hosts.on_first(functools.partial(_write_record, output, record))
        gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE / 1e9
        took = f": {record['seconds']:.0f} s, {gigabytes:.1f} GB of memory at most so far"
        console.print(bold(step.name, took))


def _begin(output: Path, keep: bool, now: dict[str, str], any_code: bool) -> dict[str, Any]:
    """The record of a step that is done, or that of one to run, in a folder made ready for it."""
    before = read_record(output)
    same_settings = before.get("made_of") == now["made_of"]
    same = same_settings and (any_code or before.get("code") == now["code"])
    if same and "seconds" in before:
        return before
    if before and not same and keep:
        what = (
            f"other code ({before.get('commit') or 'of an unknown commit'})"
            if same_settings
            else "other data or settings"
        )
        hint = ", or take it as it is with --any-code" if same_settings else ""
        raise ConfigError(
            f"{output}: made from {what}, so it is neither continued nor replaced; "
            f"give another --out, or delete that folder{hint}"
        )
    if output.exists() and not (same and keep):
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    record = now | {"commit": before.get("commit") if same else _commit()}
    _write_record(output, record)
    return record


def read_record(output: Path) -> dict[str, Any]:
    """What a step was made of, its commit, and its seconds once it is done; nothing where it was never begun."""
    record = output / RECORD
    return json.loads(record.read_text()) if record.exists() else {}


def _write_record(output: Path, record: dict[str, Any]) -> None:
    temporary = output / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(record))
    temporary.replace(output / RECORD)


def _hash(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@functools.cache
def _hash_code(packages: tuple[str, ...]) -> str:
    files = [path for package in packages for path in sorted((HERE / package).rglob("*.py"))]
    # Parsed, so that comments and line breaks do not count.
    return _hash([(path.name, ast.dump(ast.parse(path.read_text()))) for path in files])


def _commit() -> str:
    """The commit of the code that is run, where it is run from a clone."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
