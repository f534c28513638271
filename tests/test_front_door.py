"""`import brewjax` is quick, and gives the names that a notebook begins with; the README is true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import brewjax
from brewjax import cli
from brewjax.data.tables.card import Card
from brewjax.data.tasks.task import Task
from brewjax.pipeline.recipe import Recipe

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_there_and_cost_nothing_until_used():
    code = "import brewjax, sys; assert not {'jax', 'transformers', 'grpc'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert {*brewjax.__all__} <= {*dir(brewjax)}
    for name in brewjax.__all__:
        assert getattr(brewjax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Bundel'"):
        _ = brewjax.Bundel


README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)  # language and content


def test_the_files_of_the_readme_are_valid():
    card, task, recipe = (content for language, content in BLOCKS if language == "yaml")
    actions = Card.parse(card).events.actions
    assert {*Task.parse(task).questions.actions, *Task.parse(task).history.actions} <= {*actions}
    assert "small-pruned" in Recipe.parse(recipe).stages


def command_lines() -> list[str]:
    shell = "".join(content for language, content in BLOCKS if not language).replace("\\\n", " ")
    return re.findall(r"^brewjax .*", shell, re.MULTILINE) + re.findall(r"`(brewjax [^`]*)`", README)


@pytest.mark.parametrize("line", command_lines())
def test_the_command_lines_of_the_readme_have_verbs_and_options_that_there_are(line):
    command, words = typer.main.get_command(cli.app), shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
