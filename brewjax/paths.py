"""Where the shipped configs are, inside an installed package or beside it in a checkout; and how files and folders are
written: whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
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


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step: whoever reads it, also after a crash, finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class LockedError(RuntimeError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes out of this block for it. The system drops the lock of a process that
    ends, however it ends. Raises LockedError, which names the process that holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockedError(
                f"{folder}: {file.read().strip() or 'another process'} is running into this folder; wait for it, stop "
                "it, or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
