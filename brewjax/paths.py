"""Where the shipped configs are, inside an installed package or beside it in a checkout; and how files and folders are
written: whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

INSTALLED = Path(__file__).parent / "configs"
CONFIGS = INSTALLED if INSTALLED.is_dir() else Path(__file__).parent.parent / "configs"
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def user_cache() -> Path:
    """brewjax's folder among the user's caches. Losing it costs time and nothing else."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brewjax"


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Makes a folder to write into, which becomes `out` when the block ends well; else nothing is left of it.

    Args:
      out: must not exist, or be empty.

    Yields:
      The folder to write into.

    Raises:
      ValueError: `out` is taken; before the block.
      StorageError: the disk is full, or cannot be written to.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; move it away or write elsewhere")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            building = Path(temporary) / out.name
            building.mkdir()
            yield building
            building.rename(out)  # one step on one file system: the folder is complete or absent


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step: whoever reads `path`, also after a crash, finds the old text or the new one."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Makes a file to write, which becomes `path` when the block ends well; else nothing is left of it.

    Args:
      path: that is replaced; its folder must exist.

    Yields:
      The path to write to, in the same folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class StorageError(RuntimeError):
    """A folder that cannot be written to: full, read-only, not allowed, or no folder."""


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turns a failed write of this block into one line, whichever library met it.

    Args:
      folder: that the block writes into.

    Yields:
      Nothing.

    Raises:
      StorageError: a write failed; names the folder and the reason.
    """
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, StorageError) else _storage_reason(error)
        if reason is None:
            raise
        raise StorageError(f"{folder}: cannot write there: {reason}; what is complete is kept") from None


def _storage_reason(error: BaseException | None) -> str | None:
    """What the file system said, if that is what an error, or one behind it, comes of."""
    while error is not None:
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            return "a file is in the way"
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            return error.strerror
        for text in ("No space left on device", "Disk quota exceeded", "Read-only file system"):
            if text in str(error):  # of libraries that raise an error of their own
                return text
        error = error.__cause__ or error.__context__
    return None


def check_renames(folder: Path) -> None:
    """Checks that a folder with a file in it can be renamed: Orbax completes a checkpoint that way, and a bucket with a
    flat namespace, mounted by gcsfuse, has no such thing.

    Args:
      folder: below which folders will be renamed.

    Raises:
      StorageError: they cannot be.
    """
    before, after = folder / f".rename-{os.getpid()}", folder / f".renamed-{os.getpid()}"
    try:
        before.mkdir()
        (before / "file").touch()
        before.rename(after)
    except OSError as error:
        raise StorageError(
            f"{folder}: folders cannot be renamed there ({error.strerror}), as checkpoints need; of a bucket mounted "
            "by gcsfuse, take one with a hierarchical namespace (launch/README.md)"
        ) from None
    finally:
        shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(after, ignore_errors=True)


class LockedError(RuntimeError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes out of this block for it. The system drops the lock of a process that
    ends, however it ends.

    Args:
      folder: to lock.

    Yields:
      Nothing.

    Raises:
      LockedError: another process holds the lock; names it.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    with file:
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
