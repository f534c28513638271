"""Pages of the site that are made from the code: the command line and the settings (see mkdocs.yml)."""

from __future__ import annotations

from collections.abc import Iterator

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from brewjax.cli import app
from brewjax.schemas import FILES, settings

TITLES = {
    "dataset": "dataset.yaml: what a company's tables are",
    "union": "dataset.yaml of a union of datasets",
    "task": "A task",
    "model": "A model",
    "suite": "A suite of tasks",
    "recipe": "A recipe",
    "plan": "A plan for `brewjax compile`",
    "serve": "A server",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for uri, lines in {"reference/cli.md": _cli(), "reference/settings.md": _settings()}.items():
        files.append(File.generated(config, uri, content="\n".join(lines)))
    return files


def _cli() -> Iterator[str]:
    yield "# Command line\n\n`brewjax VERB --help` prints the same.\n"
    for path, command in _commands(typer.main.get_command(app), "brewjax"):
        yield f"## {path}\n\n{command.help or ''}\n"
        rows = [_parameter(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            yield "| | | |\n|---|---|---|"
            yield from (f"| `{name}` | {default} | {_cell(text)} |" for name, default, text in rows)
            yield ""


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(getattr(command, "commands", None), dict):
        for name, child in command.commands.items():  # type: ignore[attr-defined]
            yield from _commands(child, f"{path} {name}")
    else:
        yield path, command


def _parameter(parameter: click.Parameter) -> tuple[str, str, str]:
    if parameter.param_type_name == "argument":
        return (parameter.name or "").upper(), "", getattr(parameter, "help", "") or ""
    default = "" if parameter.default in (None, "", False) else f"`{parameter.default}`"
    return ", ".join(parameter.opts), default, getattr(parameter, "help", "") or ""


def _settings() -> Iterator[str]:
    yield "# Settings\n"
    yield "Every key of every YAML file. `brewjax help KEY` prints a row of it, `brewjax schema FILE` the JSON schema"
    yield "of a file for your editor. `*` stands for a name, or an index, of your own.\n"
    for file in FILES:
        yield f"## {TITLES[file]}\n\n| key | type | default | |\n|---|---|---|---|"
        for setting in settings(file):
            default = f"`{setting.default}`" if setting.default else "required"
            yield f"| `{setting.key}` | {_cell(setting.type)} | {_cell(default)} | {_cell(setting.description)} |"
        yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
