"""Prepared data is the same bytes on one core, on many, on two hosts, and after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.data_scale import SHOWN_TEXT, make_tables
from brewjax.data.records.shards import read_counts
from brewjax.pipeline.context import Run
from brewjax.pipeline.preparation import Preparation
from brewjax.pipeline.recipe import Recipe
from brewjax.pipeline.stages import prepare
from brewjax.pipeline.workers import write_here, write_on_all_cores
from tests.pipeline.test_run import MODEL, TASK
from tests.processes import ROOT, finish, start
from tests.tables import write_dataset

RECIPE = """\
name: jobs
dataset: {folder}/jobs
tasks: [{folder}/task.yaml]
model: {folder}/model.yaml
tokenizer: {{vocab_size: 400}}
prompts: {{styles: {{compact: 1, sectioned: 1}}, max_tokens: 1000}}
train: {{steps: 1, batch_size: 2, seq_len: 1024}}
stages:
  text: {{do: pretrain, data: {{repeats: 2}}}}
  big: {{do: sft, data: {{max_examples: 4000}}}}
"""


def contents(folder: Path) -> dict[str, bytes]:
    """The files of prepared data, without the runner's own records."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("stage.json", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run with a tokenizer; each test prepares data in folders of its own."""
    folder = tmp_path_factory.mktemp("user")
    write_dataset(folder / "jobs")
    (folder / "task.yaml").write_text(TASK)
    (folder / "model.yaml").write_text(MODEL)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    run = Run(Recipe.load(folder / "recipe.yaml"), folder / "run")
    (run.folder / "prepare").mkdir(parents=True)
    prepare(run, run.folder / "prepare")
    return run


def preparation(run: Run, stage: str, folder: str) -> Preparation:
    config = run.recipe.stages[stage].data
    return Preparation(run.recipe, run.folder, config, 1024, run.folder / f"{stage}-{folder}", records_per_shard=9)


def test_all_cores_write_the_bytes_of_one(run):
    alone, together = preparation(run, "big", "alone"), preparation(run, "big", "together")
    num_shards = write_here(alone, run)
    assert num_shards["apply"] > 1
    assert write_on_all_cores(together, run) == num_shards
    assert contents(together.folder) == contents(alone.folder)


def test_two_hosts_write_the_units_of_one_and_what_is_written_stays(run):
    alone, together = preparation(run, "text", "alone"), preparation(run, "text", "together")
    write_here(alone, run)
    write_here(together, run, process=1, processes=2)
    assert 0 < len(contents(together.folder)) < len(contents(alone.folder))
    times = {path: path.stat().st_mtime_ns for path in together.folder.rglob("part-*")}
    write_here(together, run)
    assert contents(together.folder) == contents(alone.folder)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_a_worker_cannot_do_is_raised(run):
    too_short = Preparation(run.recipe, run.folder, run.recipe.stages["big"].data, 16, run.folder / "short", 9)
    with pytest.raises(ValueError, match=r"task apply, member m\d.*raise seq_len"):
        write_on_all_cores(too_short, run)


@pytest.fixture
def shop(tmp_path) -> Path:
    """A folder with a recipe on tables large enough for processes of their own."""
    make_tables(tmp_path / "jobs", events=60_000, members=3_000, items=2_000)
    (tmp_path / "task.yaml").write_text(SHOWN_TEXT)
    (tmp_path / "model.yaml").write_text(MODEL)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path).replace("{repeats: 2}", "{}"))
    return tmp_path


def verb(folder: Path, out: str) -> list[str]:
    return ["data", "prepare", str(folder / "recipe.yaml"), "--out", str(folder / out)]


@pytest.mark.long
def test_killed_again_and_again_and_on_two_hosts_it_ends_with_the_same_bytes(shop):
    command = [sys.executable, "-m", "brewjax"]
    subprocess.run([*command, *verb(shop, "whole")], cwd=ROOT, check=True)
    assert read_counts(shop / "whole" / "data-big" / "buys")["shards"] == 4
    for shards in (1, 3, 6):
        killed = subprocess.Popen([*command, *verb(shop, "killed")], cwd=ROOT, start_new_session=True)
        while len(list(shop.glob("killed/data-*/*/*.counts.json"))) < shards and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        while is_alive(killed.pid):  # its workers end with it
            time.sleep(0.01)
    subprocess.run([*command, *verb(shop, "killed")], cwd=ROOT, check=True)
    hosts = start("brewjax", *verb(shop, "hosts"), folder=shop / "logs", processes=2)
    finish(shop / "logs", hosts)
    whole = contents(shop / "whole")
    for out in ("killed", "hosts"):
        assert contents(shop / out) == whole


def is_alive(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
