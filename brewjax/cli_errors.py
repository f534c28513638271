"""What the command line says where it cannot do what it was asked: one line, in plain words."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import pydantic
import typer
from rich.text import Text

from brewjax.config import describe
from brewjax.console import print_line

USAGE_ERROR: Any = typer.BadParameter.__base__  # of every mistake in a command line; typer does not export it
HELP = "NoArgsIsHelpError"  # the one among them that has printed the help, and needs no words


def run_app(app: typer.Typer) -> NoReturn:
    """Runs a command line and exits: with 2 where it was refused, in one line. A defect ends in its traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except USAGE_ERROR as error:
        if type(error).__name__ != HELP:
            _print_error(_explain_usage(error))
        sys.exit(error.exit_code)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        words = _explain(error)
        if words is None:
            raise
        _print_error(words)
        sys.exit(2)


def _explain_usage(error: Any) -> str:
    """A mistake in the command line, without pydantic's words, which typer passes on."""
    words, cause = error.format_message(), error.__cause__
    if isinstance(cause, pydantic.ValidationError):
        words = f"{words.partition(': ')[0]}: {describe(cause.errors()[0])}"
    return f"{words.rstrip('.')}; see {error.ctx.command_path if error.ctx else 'brewjax'} --help"


def _explain(error: Exception) -> str | None:
    """What a user can mend, as brewjax or the file system says it; None for a defect, which needs its traceback."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return str(error) if Path(raised_in).is_relative_to(Path(__file__).parent) else None


def _print_error(words: str) -> None:
    """To stderr, after "error:"."""
    print_line(Text.assemble(("error:", "bold red"), f" {words}"), stderr=True)
