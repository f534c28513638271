"""Schemas and `brewjax help` come from the settings' declarations, and agree with what brewjax takes."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from brewjax.paths import CONFIGS
from brewjax.schemas import FILES, find, schema, settings
from tests.pipeline.test_recipe import LINES

FOLDERS = {
    "datasets": "dataset",
    "union.yaml": "union",
    "tasks": "task",
    "models": "model",
    "recipes": "recipe",
    "scale": "plan",
    "suites": "suite",
}
SHIPPED = sorted(
    (path, next(FOLDERS[part] for part in reversed(path.relative_to(CONFIGS).parts) if part in FOLDERS))
    for path in CONFIGS.rglob("*.yaml")
)


@pytest.mark.parametrize(("path", "file"), SHIPPED, ids=lambda value: getattr(value, "name", value))
def test_every_shipped_file_fits_its_schema(path: Path, file: str):
    jsonschema.validate(yaml.safe_load(path.read_text()), schema(file))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("do: quantize", "do: quantise"),
        ("rungs:", "rung:"),
        ("seq_len: 1024", "seq_len: 0"),
        ("dataset: jobs\n", ""),
        ("dataset: jobs\n", "dataset: jobs\nsurfaces: {films: {dataset: films, tasks: [liked.yaml]}}\n"),
    ],
)
def test_what_brewjax_refuses_a_schema_refuses_too(old, new):
    jsonschema.validate(yaml.safe_load(LINES), schema("recipe"))
    assert old in LINES
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(LINES.replace(old, new)), schema("recipe"))


def test_every_setting_is_described():
    every = [setting for file in FILES for setting in settings(file)]
    assert not [f"{setting.file}: {setting.key}" for setting in every if not setting.description]


def test_a_setting_is_found_by_the_end_of_its_key():
    assert {(steps.file, steps.type, steps.default) for steps in find("train.steps")} == {
        ("recipe", "whole number", ""),
        ("plan", "whole number", ""),
    }
    assert {setting.key for setting in find("d_ff")} >= {"d_ff", "stages.*[prune].d_ff"}
    assert not find("no_such_key")
