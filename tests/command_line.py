"""The real command line, run in this process: what it says where it refuses, and what it prints where it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest

from brewjax import cli


def check_parts(message: str, parts: Iterable[str]) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


def shown(monkeypatch, capsys, *arguments: object) -> str:
    """What a command line that is right prints."""
    for name in ("device_per_core", "cache_compilations", "hide_useless_libtpu"):  # which change the environment
        monkeypatch.setattr(cli, name, lambda: None)
    monkeypatch.setattr(sys, "argv", ["brewjax", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return capsys.readouterr().out
