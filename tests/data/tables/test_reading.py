from __future__ import annotations

import datetime
from decimal import Decimal

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.excerpt import load_excerpt
from brewjax.data.tables.reading import TEXT, TEXTS, plain, show
from tests.tables import write_dataset


@pytest.mark.parametrize("width", [16, 32])
@hypothesis.given(st.data())
def test_a_narrow_float_reads_as_it_is_written(width, data):
    kind = {16: np.float16, 32: np.float32}[width]
    values = data.draw(st.lists(st.none() | st.floats(width=width, allow_nan=False, allow_infinity=False)))
    column = pa.chunked_array([pa.array([None if v is None else kind(v) for v in values], pa.from_numpy_dtype(kind))])
    expected = [None if value is None else float(str(kind(value))) for value in values]
    assert plain(column).to_pylist() == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([Decimal("129.99")], pa.decimal128(9, 2)), pa.array([129.99])),
        (pa.array([Decimal("129.99")], pa.decimal256(50, 2)), pa.array([129.99])),
        (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), pa.array([["a", "b"]], TEXTS)),
        (pa.ListArray.from_arrays([0, 2], pa.array(["a", "b"]).dictionary_encode()), pa.array([["a", "b"]], TEXTS)),
        (pa.array([2**64 - 1], pa.uint64()), pa.array([2**64 - 1], pa.uint64())),
        (pa.array([1], pa.duration("ns")), pa.array([1], pa.duration("ns"))),
    ],
    ids=lambda value: str(value.type),
)
def test_other_types_read_as_the_plain_one_of_their_kind(column, expected):
    assert plain(pa.chunked_array([column])).combine_chunks().equals(expected)


@pytest.mark.parametrize("load", [Dataset.load, lambda path: load_excerpt(path, ["m1"])], ids=["whole", "excerpt"])
def test_no_column_of_a_dataset_is_short_of_room_for_2_gib_of_characters(tmp_path, load):
    dataset = load(write_dataset(tmp_path / "jobs"))
    types = {field.type for table in (dataset.members, dataset.items, dataset.events) for field in table.schema}
    assert {TEXT, TEXTS} == {pa.large_string(), pa.list_(pa.large_string())} <= types
    assert not {pa.string(), pa.list_(pa.string())} & types


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (pa.scalar(1, pa.duration("ns")), "1"),
        (pa.scalar(1_700_000_000_000, pa.timestamp("s")), "<value out of range: 1700000000000>"),
        (pa.scalar(datetime.date(2025, 1, 2)), "2025-01-02"),
        (pa.scalar("x" * 100), "'" + "x" * 56 + "..."),
    ],
)
def test_every_value_can_be_shown(value, shown):
    assert show(value) == shown
