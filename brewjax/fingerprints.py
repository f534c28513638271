"""Whether files are the same: by what is in them, wherever they lie and whenever they were written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

LARGE = 64 << 20  # bytes of a file that is not read again while its size and its time of change stay


def hash_folder(folder: Path) -> str:
    """SHA-256 of a folder's files, by their names within it."""
    return hash_files(folder, (path for path in folder.rglob("*") if path.is_file()))


def hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """SHA-256 of some of a folder's files, in any order, by their names within it."""
    contents = {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content. That of a large one is remembered in the user's cache, by path, size and time."""
    stat = path.stat()
    if stat.st_size < LARGE:
        return _digest(path)
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brewjax" / "hashes"
    remembered = cache / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError):
        if len(digest := remembered.read_text()) == 64:
            return digest
    digest = _digest(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
            file.write(digest)
        os.replace(file.name, remembered)
    return digest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
