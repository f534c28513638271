"""The runner: what is done is skipped, what was killed goes on, and nothing is mixed."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from brewjax import fingerprint
from brewjax.config import ConfigError
from brewjax.paths import StorageError
from brewjax.pipeline.runner import Step, run_steps

KILLED = KeyboardInterrupt()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(settings=.., code=..)` runs three steps and returns which of them did something."""
    (tmp_path / "src").mkdir()
    monkeypatch.setattr(fingerprint, "HERE", tmp_path / "src")
    did: list[str] = []

    def once(
        settings: str = "a",
        code: str = "x = 1",
        keep: bool = True,
        fails: str = "",
        error: BaseException = KILLED,
        data: str = "hash of the data",
        **arguments: object,
    ):
        did.clear()
        for package in ("data", "train"):
            (tmp_path / "src" / package).mkdir(exist_ok=True)
        (tmp_path / "src" / "train" / "loop.py").write_text(code)
        fingerprint.hash_packages.cache_clear()

        def work(name: str, folder: Path) -> None:
            did.append(name)
            (folder / "begun").touch()
            if name == fails:
                raise error

        all_steps = [
            Step("data", lambda folder: work("data", folder), (), [], ("data",)),
            Step("train", lambda folder: work("train", folder), ("data",), [settings], ("train",), protected=keep),
            Step("report", lambda folder: work("report", folder), ("train",), [], ()),
        ]
        run_steps(all_steps, tmp_path / "out", data, **arguments)
        return list(did)

    once.folder = tmp_path / "out"
    return once


def test_what_is_done_is_skipped(run):
    assert run() == ["data", "train", "report"]
    assert run() == []
    assert json.loads((run.folder / "train" / "stage.json").read_text())["seconds"] >= 0


def test_a_change_redoes_what_depends_on_it(run):
    run(keep=False)
    assert run(settings="b", keep=False) == ["train", "report"]


def test_what_is_dear_is_not_overwritten(run):
    run()
    with pytest.raises(ConfigError, match="made from other data or settings"):
        run(settings="b")
    assert (run.folder / "train" / "begun").exists()


def test_a_refused_run_writes_nothing(run):
    run()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="made from other data or settings"):
        run(settings="b", data="other data")  # of which `data`, before `train`, could be made anew
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_a_damaged_record_of_what_is_dear_is_refused(run):
    run()
    (run.folder / "train" / "stage.json").write_text("")
    with pytest.raises(ConfigError, match=r"train/stage\.json: damaged.*delete that folder"):
        run()
    assert (run.folder / "train" / "begun").exists()
    assert run(keep=False) == ["train"]  # what is cheap is done again


def test_seconds_are_those_of_all_attempts(run):
    with pytest.raises(KeyboardInterrupt):
        run(fails="train")
    row = {"step": 1, "seconds": 1000.0}
    (run.folder / "train" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    run()
    assert 1000 < json.loads((run.folder / "train" / "stage.json").read_text())["seconds"] < 1100


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']"),
    ],
)
def test_a_disk_that_cannot_be_written_to_is_one_line(run, error):
    with pytest.raises(StorageError, match=r"out/train: cannot write there: (No space|Permission)") as raised:
        run(fails="train", error=error)
    assert raised.value.__suppress_context__
    assert "\n" not in str(raised.value)
    assert run() == ["train", "report"]


def test_other_code_is_said_and_can_be_taken(run):
    run()
    assert run(code='"""A docstring."""\n# a comment\nx = 1') == []
    with pytest.raises(ConfigError, match=r"made from other code .* --allow-code-mismatch"):
        run(code="x = 2")
    assert run(code="x = 2", allow_code_mismatch=True) == []


def test_cheap_steps_are_done_anew_by_other_code(run):
    run(keep=False)
    assert run(keep=False, code="x = 2") == ["train", "report"]


def test_what_was_killed_goes_on_or_starts_over(run):
    with pytest.raises(KeyboardInterrupt):
        run(fails="train")
    (run.folder / "train" / "half").touch()
    assert run() == ["train", "report"]
    assert (run.folder / "train" / "half").exists()  # it goes on
    with pytest.raises(KeyboardInterrupt):
        run(settings="b", keep=False, fails="train")
    (run.folder / "train" / "half").touch()
    run(settings="b", keep=False)
    assert not (run.folder / "train" / "half").exists()
