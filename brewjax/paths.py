"""Where the shipped configs are, inside an installed package or beside it in a checkout; and folders to be written."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

INSTALLED = Path(__file__).parent / "configs"
CONFIGS = INSTALLED if INSTALLED.is_dir() else Path(__file__).parent.parent / "configs"


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends well; else nothing is left of it.

    Raises ValueError, before the block, where `out` is there and not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; move it away or write elsewhere")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        building = Path(beside) / out.name
        building.mkdir()
        yield building
        building.rename(out)  # one step on one file system: the folder is complete or absent
