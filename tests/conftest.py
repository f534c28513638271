"""For every test, and every process a test starts."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest

from brewjax import cli  # which imports no JAX before a verb needs it

# XLA spends most of a test's time on making code fast that runs for milliseconds. JAX reads this when first imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests run on the CPU, whatever else is installed; libtpu is, and would look for its chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The same on every machine: a CPU with bfloat16 instructions would round what it multiplies. Tests of that ask for it.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
# What one process has compiled the others need not; the workers of a run and all that they start share a folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """What a verb sets in the environment of its process must not reach later tests, or the processes they start."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def refuse(monkeypatch, capsys) -> Callable[..., str]:
    """Runs a command line that must be refused; what it says, on one line."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(cli, "device_per_core", lambda: None)  # of the environment of later tests,
    monkeypatch.setattr(cli, "cache_compilations", lambda: None)
    monkeypatch.setattr(cli, "hide_useless_libtpu", lambda: None)  # and of their imports

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["brewjax", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert ended.value.code == 2, captured.out + captured.err
        for word in ("Traceback", "pydantic", "instance of", "nput should", "Errno"):
            assert word not in captured.err
        return " ".join(captured.err.split())

    return run
