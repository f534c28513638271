"""The examples of all docstrings run, and their results are as written."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tasks.examples import build_examples
from brewjax.data.text.prompt import Prompt, Question
from brewjax.scoring.passes import Bucket
from brewjax.serve.client import raw

ROOT = Path(__file__).parents[2]


def modules_with_examples() -> list[str]:
    files = [path for package in ("brewjax", "pallas_kernels") for path in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if ">>> " in path.read_text()]


@pytest.fixture(scope="module")
def names(dataset, tasks, bundle, model_folder, server) -> dict[str, Any]:
    """The names that examples begin with."""
    return {
        "dataset": dataset,
        "task": tasks[0],
        "bundle": bundle,
        "tokenizer": bundle.tokenizer,
        "folder": model_folder,
        "address": f"127.0.0.1:{server.port}",
        **{each.__name__: each for each in (Bucket, Prompt, Question, Verbalizer, build_examples, raw)},
    }


@pytest.mark.parametrize("module_name", modules_with_examples())
def test_the_examples_in_docstrings_run(module_name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(module_name)
    failed, tried = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed
