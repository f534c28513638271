"""What the tests of the data floor share: the jobs dataset, the same with other events, a small tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from brewjax.data.tables.dataset import Dataset
from brewjax.data.text.tokenizer import Tokenizer
from tests.tables import COMPANIES, LOCATIONS, POSITIONS, SKILLS, write_dataset

DAY_ZERO = np.datetime64("2025-01-01", "us")


class Event(NamedTuple):
    """An event of the jobs dataset, its member and item by row, its time in days since DAY_ZERO."""

    member: int
    item: int
    action: str
    day: float
    seconds: float | None = None


@pytest.fixture(scope="session")
def jobs(tmp_path_factory) -> Dataset:
    return Dataset.load(write_dataset(tmp_path_factory.mktemp("jobs")))


@pytest.fixture(scope="session")
def jobs_with(jobs) -> Callable[..., Dataset]:
    """Makes the jobs dataset with these events instead of its own, and only so many items."""

    def make(events: list[Event], items: int = len(jobs.items)) -> Dataset:
        events = sorted(events, key=lambda event: (event.member, event.day))
        table = pa.table(
            {
                "member_id": [f"m{event.member}" for event in events],
                "item_id": [100 + event.item for event in events],
                "action": [event.action for event in events],
                "time": pa.array([moment(event.day) for event in events], pa.int64()).cast(pa.timestamp("us", "UTC")),
                "seconds": [event.seconds for event in events],
            },
            schema=jobs.events.schema,
        )
        return dataclasses.replace(jobs, items=jobs.items.slice(0, items), events=table)

    return make


def moment(day: float) -> int:
    """Microseconds since 1970 of a day since DAY_ZERO."""
    return int(DAY_ZERO.astype(np.int64)) + round(day * 86_400_000_000)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [
        f"Title: {p}, Company: {c}, Location: {place}, " for p in POSITIONS for c in COMPANIES for place in LOCATIONS
    ]
    texts += [
        f"[Age: 2 days, Seconds: 30, Skills: {skill}]\nThe member has viewed the following jobs:" for skill in SKILLS
    ]
    return Tokenizer.train(texts, words=["Yes", "No"], vocab_size=500)
