"""The demo's model reads its prompts: with half of the steps, it is at the floor on every task."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from brewjax.data.tasks.task import Task
from brewjax.evaluate.results import OVERALL, evaluate

ROOT = Path(__file__).parents[2]
BREWJAX = [sys.executable, "-m", "brewjax"]


@pytest.mark.long
def test_the_demo_clears_the_floor(tmp_path):
    dataset = tmp_path / "movielens"
    subprocess.run([*BREWJAX, "data", "fetch", "movielens-100k", "--out", dataset], cwd=ROOT, check=True)
    settings = [f"dataset={dataset}", "stages.big.train.steps=900"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    run = tmp_path / "run"
    subprocess.run([*BREWJAX, "run", "configs/recipes/demo.yaml", "--out", run, *overrides], cwd=ROOT, check=True)
    for path in sorted((ROOT / "configs/tasks/movielens").glob("*.yaml")):
        task = Task.load(path)
        files = {
            "turbo": run / "evaluate-turbo" / f"{task.name}.parquet",
            "floor": run / "baselines" / f"{task.name}.fact regression.parquet",
        }
        results = {name: evaluate(pq.read_table(file), task, 20)[OVERALL].metrics for name, file in files.items()}
        for metric, margin in (("gauc", 0.02), ("auc", 0.02)):
            turbo, floor = (results[name][metric].value for name in ("turbo", "floor"))
            assert turbo > floor - margin, f"{task.name}: {metric} {turbo:.3f}, where a regression has {floor:.3f}"
