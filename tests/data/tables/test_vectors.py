"""The fact of similarity against its definition over a list of vectors; the same bits alone; mistakes named."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from brewjax.config import ConfigError
from brewjax.data.tables.facts import Fact
from brewjax.data.tables.statistics import FactValues
from tests.data.conftest import Event, moment

MEMBERS, ITEMS = 3, 4
FACT = Fact(name="s", similarity="vectors.parquet")
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["member", "item"]), st.integers(0, ITEMS), st.integers(0, 6), st.sampled_from(["a", "b"])
    ),
    max_size=30,
    unique_by=lambda row: row[:3],
)


@pytest.fixture
def dataset(jobs_with, tmp_path):
    events = [Event(member, item, "viewed", 0, 1.0) for member in range(MEMBERS) for item in range(ITEMS)]
    return dataclasses.replace(jobs_with(events, ITEMS), path=tmp_path)


def write(dataset, rows, vectors):
    """Rows of (side, number of the member or item, day, encoder); a number that is none is of an unknown one."""
    names = {
        "member": [dataset.member_id(n) for n in range(MEMBERS)],
        "item": [dataset.item_id(n) for n in range(ITEMS)],
    }
    columns = {
        "side": pa.array([side for side, *_ in rows], pa.string()),
        "id": pa.array([[*names[side], "?", "?"][number] for side, number, *_ in rows], pa.string()),
        "time": pa.array([moment(day) for _, _, day, _ in rows], pa.timestamp("us")),
        "encoder": pa.array([encoder for *_, encoder in rows], pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1]),
    }
    pq.write_table(pa.table(columns), dataset.path / "vectors.parquet")


def test_it_is_of_the_latest_vectors_of_one_encoder_at_the_time(dataset):
    @hypothesis.given(ROWS, st.integers(0, 7))
    @hypothesis.settings(max_examples=60, deadline=None)
    def check(rows, day):
        vectors = np.random.default_rng(len(rows)).standard_normal((len(rows), 33)).astype(np.float32)
        write(dataset, rows, vectors)
        members, items = (grid.ravel() for grid in np.meshgrid(np.arange(MEMBERS), np.arange(ITEMS), indexing="ij"))
        times = np.full(len(items), moment(day))
        facts = FactValues(dataset)
        actual = facts.values("pairs", FACT, members, items, times)
        for n, pair in enumerate(zip(members, items, strict=True)):
            latest = [
                max(
                    ((row[2], at) for at, row in enumerate(rows) if row[:2] == (side, number) and row[2] <= day),
                    default=None,
                )
                for side, number in zip(("member", "item"), pair, strict=True)
            ]
            expected = math.nan
            if all(latest):
                (_, left), (_, right) = latest
                if rows[left][3] == rows[right][3]:
                    expected = float(vectors[left].astype(np.float64) @ vectors[right].astype(np.float64))
            assert actual[n] == pytest.approx(expected, abs=1e-12, nan_ok=True)
            alone = facts.values("pairs", FACT, members[n : n + 1], items[n : n + 1], times[n : n + 1])
            assert alone.tobytes() == actual[n : n + 1].tobytes()

    check()


def test_mistakes_are_named(dataset):
    compute = lambda: FactValues(dataset).values("pairs", FACT, *(np.zeros(1, np.int64),) * 3)  # noqa: E731
    with pytest.raises(ConfigError, match=r"vectors\.parquet.*`brewjax retrieve vectors` writes it"):
        compute()
    pq.write_table(pa.table({"id": ["1"]}), dataset.path / "vectors.parquet")
    with pytest.raises(ConfigError, match="no column side, time, encoder, vector; there are: id"):
        compute()
    row = {"side": ["item"] * 2, "id": ["1"] * 2, "time": [moment(0)] * 2, "encoder": ["a"] * 2}
    pq.write_table(pa.table({**row, "vector": [[1.0], [1.0, 2.0]]}), dataset.path / "vectors.parquet")
    with pytest.raises(ConfigError, match="its vectors are not all of one size"):
        compute()
