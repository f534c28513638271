"""A file of records keeps what was acknowledged, and says where it is damaged."""

import errno
import os
import threading
from pathlib import Path
from unittest import mock

import pytest

from brewjax.retrieve.log import DamagedError, Segment

RECORDS = [b"a", b"bc" * 1000, b"def"]


@pytest.fixture
def path(tmp_path) -> Path:
    segment = Segment(tmp_path / "log")
    segment.append(RECORDS[:2])
    segment.append(RECORDS[2:])
    segment.close()
    return tmp_path / "log"


def records(segment: Segment, position: int = 0) -> list[bytes]:
    return [record for record, _ in segment.read(position)]


def test_it_is_read_from_any_position_while_it_grows(path):
    segment = Segment(path)
    positions = [position for _, position in segment.read()]
    assert records(segment) == RECORDS
    assert records(segment, positions[0]) == RECORDS[1:]
    assert records(segment, positions[-1]) == []
    segment.append([b"new"])
    assert records(segment, positions[-1]) == [b"new"]


def test_what_a_crash_cut_short_is_cut_off(path):
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 3, len(whole) - 10):  # in the last record, and in its header
        path.write_bytes(whole[:length])
        segment = Segment(path)
        assert records(segment) == RECORDS[:2]
        segment.append([b"next"])
        segment.close()
        again = Segment(path)
        assert records(again) == [*RECORDS[:2], b"next"]
        again.close()


def test_a_damaged_record_with_others_behind_it_is_not_cut_off(path):
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"log: damaged at byte 13 of 2,040; restore the file, or cut it off there"):
        Segment(path)
    assert path.read_bytes() == damaged


def test_a_full_disk_leaves_no_part_of_a_record(path):
    segment = Segment(path)
    with (
        mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(OSError, match="No space"),
    ):
        segment.append([b"lost"])
    segment.append([b"kept"])
    assert records(segment) == [*RECORDS, b"kept"]


def test_threads_append_and_read(path):
    segment = Segment(path)
    writers = [
        threading.Thread(target=lambda n=n: [segment.append([b"%d" % n] * 3) for _ in range(50)]) for n in range(4)
    ]
    for writer in writers:
        writer.start()
    position, seen = 0, []
    while len(seen) < 3 + 600:
        for record, end in segment.read(position):
            seen.append(record)
            position = end
    for writer in writers:
        writer.join()
    assert sorted(seen) == sorted(RECORDS + [b"%d" % n for n in range(4)] * 150)
    assert os.path.getsize(path) == position


def test_it_is_open_once(path):
    segment = Segment(path)
    with pytest.raises(BlockingIOError):
        Segment(path)
    segment.close()
    Segment(path).close()
