"""`import brewjax` is quick, and gives the names that a notebook begins with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import brewjax

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_there_and_cost_nothing_until_used():
    code = "import brewjax, sys; assert not {'jax', 'transformers', 'grpc'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert {*brewjax.__all__} <= {*dir(brewjax)}
    for name in brewjax.__all__:
        assert getattr(brewjax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Bundel'"):
        _ = brewjax.Bundel
