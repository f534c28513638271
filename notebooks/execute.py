"""Executes the notebooks in order, each in a clean kernel, and writes them with their outputs.

python notebooks/execute.py build/notebooks    # what `make notebooks` and the tests do
python notebooks/execute.py notebooks          # renews the outputs that are committed
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
RUN = FOLDER.parent / "build/notebooks/run"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
LIMIT = 600  # seconds of a cell, on a machine that others use too


def execute(source: Path, out: Path) -> float:
    """Executes one notebook; returns its seconds. Raises CellExecutionError for a cell that fails."""
    notebook = jupytext.read(source)
    start = time.perf_counter()
    resources = {"metadata": {"path": str(FOLDER)}}
    with tempfile.TemporaryDirectory() as sockets:  # and no port that others could connect to
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        client = NotebookClient(
            notebook, kernel, timeout=LIMIT, startup_timeout=LIMIT, record_timing=False, resources=resources
        )
        client.execute(env=os.environ | {"PYTHONWARNINGS": "ignore"})  # which name paths of the machine
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{number}"  # the same at every run
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, out / f"{source.stem}.ipynb")
    return time.perf_counter() - start


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(RUN, ignore_errors=True)  # the model is trained anew, by today's code
    for source in SOURCES:
        print(f"{source.name}: {execute(source, out):.0f} s", flush=True)
    print(f"{len(SOURCES)} passed, 0 failed")


if __name__ == "__main__":
    main()
