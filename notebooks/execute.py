"""Executes the notebooks in order, each in a clean kernel, and writes them with their outputs.

python notebooks/execute.py build/notebooks    # what `make notebooks` and the tests do
python notebooks/execute.py notebooks          # renews the outputs that are committed
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
LIMIT = 600  # seconds of a cell, on a machine that others use too


def execute(source: Path, out: Path) -> float:
    """Executes one notebook; returns its seconds. Raises CellExecutionError for a cell that fails."""
    notebook = jupytext.read(source)
    start = time.perf_counter()
    client = NotebookClient(notebook, timeout=LIMIT, record_timing=False, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{number}"  # the same at every run
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, out / f"{source.stem}.ipynb")
    return time.perf_counter() - start


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        print(f"{source.name}: {execute(source, out):.0f} s", flush=True)
    print(f"{len(SOURCES)} passed, 0 failed")


if __name__ == "__main__":
    main()
