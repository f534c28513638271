"""`import brewjax` is quick, and gives the names that a notebook begins with; docstrings' examples run."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import brewjax
from brewjax.data.tasks.examples import build_examples
from brewjax.data.text.tokenizer import Tokenizer
from tests.pipeline.test_run import TASK
from tests.tables import write_dataset

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_there_and_cost_nothing_until_used():
    code = "import brewjax, sys; assert not {'jax', 'transformers', 'grpc'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert {*brewjax.__all__} <= {*dir(brewjax)}
    for name in brewjax.__all__:
        assert getattr(brewjax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Bundel'"):
        _ = brewjax.Bundel


def modules_with_examples() -> list[str]:
    files = [path for package in ("brewjax", "pallas_kernels") for path in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if ">>> " in path.read_text()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    """The names that examples begin with."""
    folder = tmp_path_factory.mktemp("examples")
    write_dataset(folder / "jobs")
    dataset, task = brewjax.Dataset.load(folder / "jobs"), brewjax.Task.parse(TASK)
    return {"dataset": dataset, "task": task, "tokenizer": Tokenizer.byte_level(), "build_examples": build_examples}


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_in_docstrings_run(name, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, extraglobs=world, optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed
