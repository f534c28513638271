"""Fingerprints of files by their content, so that a copy, a `touch` or another path changes nothing."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from brewjax.paths import user_cache, write_text

REMEMBERED_BYTES = 1 << 24  # the digest of a file this large is remembered by its path, size and time of change
REMEMBERED_FILES = 10_000
HERE = Path(__file__).parent


def hash_json(value: object) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_files(root: Path, paths: Iterable[Path]) -> str:
    """Hashes files by name and content. Digests of large files are kept in the user's cache.

    Args:
      root: folder below which the names count.
      paths: of the files, in any order.

    Returns:
      SHA-256, in hexadecimal digits, of the files' names below `root` and their contents, in the order of the names.
    """
    digests, known = [], _Remembered()
    for path in sorted(paths):
        digests.append((path.relative_to(root).as_posix(), known.digest(path)))
    known.save()
    return hash_json(digests)


def hash_folder(folder: Path) -> str:
    """`hash_files` of every file below `folder`."""
    return hash_files(folder, (path for path in folder.rglob("*") if path.is_file()))


def hash_code(files: Iterable[Path]) -> str:
    """SHA-256 of what Python files do: comments, line breaks and docstrings do not count."""
    return hash_json([(path.name, ast.dump(_without_docstrings(ast.parse(path.read_text())))) for path in files])


@functools.cache
def hash_packages(packages: tuple[str, ...]) -> str:
    """`hash_code` of all files in some `packages`: folders of brewjax, such as "model"; "../pallas_kernels" is
    beside it."""
    return hash_code(path for package in packages for path in sorted((HERE / package).rglob("*.py")))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    constant = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


class _Remembered:
    """Digests of large files, in the user's cache folder."""

    def __init__(self) -> None:
        self._file, self._changed = user_cache() / "digests.json", False
        try:
            self._digests: dict[str, str] = json.loads(self._file.read_text())
        except (OSError, ValueError):
            self._digests = {}

    def digest(self, path: Path) -> str:
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        large = stat.st_size >= REMEMBERED_BYTES
        if large and key in self._digests:
            return self._digests[key]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # A file that may still be changing could change again without its time of change showing it.
        if large and time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            self._digests[key], self._changed = digest, True
        return digest

    def save(self) -> None:
        if not self._changed:
            return
        newest = dict(list(self._digests.items())[-REMEMBERED_FILES:])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps(newest))
        except OSError:
            pass
