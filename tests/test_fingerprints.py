"""What is the same has the same fingerprint, and nothing else has it."""

import os
import shutil

import pytest

from brewjax import fingerprints
from brewjax.fingerprints import hash_file, hash_folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one" / "params").mkdir(parents=True)
    (tmp_path / "one" / "model.yaml").write_text("name: a")
    (tmp_path / "one" / "params" / "d").write_bytes(b"weights")
    return tmp_path / "one"


def test_a_copy_is_the_same_and_a_change_is_not(folder, tmp_path):
    before = hash_folder(folder)
    shutil.copytree(folder, tmp_path / "other")
    os.utime(tmp_path / "other" / "model.yaml", (0, 0))
    assert hash_folder(tmp_path / "other") == before
    (tmp_path / "other" / "params" / "d").write_bytes(b"weighty")
    assert hash_folder(tmp_path / "other") != before
    (folder / "params" / "d").rename(folder / "params" / "e")
    assert hash_folder(folder) != before


def test_a_large_file_is_read_once_while_its_size_and_time_stay(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "LARGE", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    large = folder / "params" / "d"
    before = hash_file(large)
    monkeypatch.setattr(fingerprints, "_digest", lambda path: "read")
    assert hash_file(large) == before
    os.utime(large, (1, 1))
    assert hash_file(large) == "read"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/cache")  # where nothing can be written
    assert hash_file(large) == "read"
