"""Files and folders are written whole or not at all, and by one process at a time."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from brewjax.paths import LockedError, StorageError, atomic_folder, check_renames, locked, write_text

ROOT = Path(__file__).parents[1]
HOLD = "import sys, time; from pathlib import Path; from brewjax.paths import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_failed_write_leaves_the_old_text(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for block in (locked(tmp_path / "file" / "deep"), atomic_folder(tmp_path / "file" / "deep")):
        with pytest.raises(StorageError, match="cannot write there: a file is in the way"), block:
            pass


def test_a_file_system_that_renames_no_folders_is_refused(tmp_path, monkeypatch):
    check_renames(tmp_path)
    assert not list(tmp_path.iterdir())

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # what gcsfuse says of a flat bucket

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match=r"Function not implemented.*hierarchical namespace"):
        check_renames(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_locked_by_one_process_until_it_ends_however_it_ends(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=f"process {holder.pid} on .* is running into this folder"),
            locked(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path):
        pass
