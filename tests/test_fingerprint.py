"""Fingerprints are of content: a copy, a touch or another path changes nothing, a byte does."""

from __future__ import annotations

import os
import shutil

from brewjax import fingerprint
from brewjax.fingerprint import hash_code, hash_folder


def test_a_copy_and_a_touch_are_the_same_and_a_byte_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "REMEMBERED_BYTES", 4)
    folder = tmp_path / "here"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "large").write_bytes(b"12345678")
    (folder / "small").write_bytes(b"1")
    os.utime(folder / "deep" / "large", (1, 1))  # old enough to be remembered
    first = hash_folder(folder)
    assert list((tmp_path / "cache").rglob("digests.json"))
    assert hash_folder(folder) == first
    assert hash_folder(shutil.copytree(folder, tmp_path / "copy")) == first
    os.utime(folder / "deep" / "large")
    assert hash_folder(folder) == first
    (folder / "deep" / "large").write_bytes(b"12345679")  # of the same size
    assert hash_folder(folder) != first
    (folder / "deep" / "large").write_bytes(b"12345678")
    (folder / "deep" / "large").rename(folder / "large")
    assert hash_folder(folder) != first


def test_code_is_what_it_does(tmp_path):
    file = tmp_path / "a.py"

    def digest(text: str) -> str:
        file.write_text(text)
        return hash_code([file])

    plain = digest("x = 1\ndef f():\n    return x\n")
    assert digest('"""Module."""\nx = 1  # comment\n\ndef f():\n    """Says."""\n    return x\n') == plain
    assert digest("x = 1\ndef f():\n    return -x\n") != plain
