"""A small valid dataset folder in the world of jobs, and hooks with which a test breaks one thing of it at a time."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import write_tables

Change = Callable[[pa.Table], pa.Table]

CARD_YAML = """\
name: jobs
members:
  attributes:
    - {column: position, kind: text}
    - {column: company, kind: category}
    - {column: location, kind: category}
    - {column: experience, kind: number, unit: years}
items:
  noun: job
  plural: jobs
  attributes:
    - {column: title, kind: text}
    - {column: company, kind: category}
    - {column: location, kind: category}
    - {column: skills, kind: list}
    - {column: salary, kind: number, percentile: true, unit: dollars}
    - {column: posted, kind: date, where: [question]}
events:
  actions:
    viewed: {past: has viewed}
    applied: {past: has applied to}
  attributes:
    - {column: seconds, kind: number, unit: seconds}
facts:
  items:
    - {name: popularity, count: [applied], buckets: 100}
    - {name: attention, mean: seconds, buckets: null}
"""

EVENTS_PER_MEMBER = (0, 1, 3, 4, 7, 12, 18, 35)
JOBS = 40
POSITIONS = ("Software Engineer", "Nurse", "Accountant", "Teacher")
COMPANIES = ("Acme", "Globex", "Initech", "Umbrella")
LOCATIONS = ("Berlin", "Lisbon", "Oslo")
SKILLS = ("Python", "Care", "Excel", "Teaching", "SQL", "Writing")


def unchanged(table: pa.Table) -> pa.Table:
    return table


def write_dataset(
    path: Path,
    members: Change = unchanged,
    items: Change = unchanged,
    events: Change = unchanged,
    card: Callable[[str], str] = str,
) -> Path:
    """Writes the dataset into the folder `path` (made if need be) and returns it. Always the same, hooks apart.

    8 members (string ids m0, m1, .. with EVENTS_PER_MEMBER events), 40 jobs (integer ids from 100), 80 events of
    2025, not sorted by member or time; some members and jobs have unknown (null) attributes.

    Args:
      members, items, events: change a table before it is written, e.g. `events=put("action", 3, "veiwed")`.
      card: changes the card's text, e.g. `card=lambda text: text.replace("kind: list", "kind: text")`.
    """
    path.mkdir(parents=True, exist_ok=True)
    write_tables(path, members=members(_members()), items=items(_items()), events=events(_events()))
    (path / CARD).write_text(card(CARD_YAML))
    return path


def put(column: str, row: int, value: object) -> Change:
    """A change of one value; the column keeps its type."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        return with_column(column, pa.array(values, table[column].type))(table)

    return change


def append(rows: list[dict[str, object]]) -> Change:
    """A change that adds rows; what a row does not name is null."""
    return lambda table: pa.concat_tables([table, pa.Table.from_pylist(rows, table.schema)])


def with_column(column: str, values: pa.Array) -> Change:
    """A change of a whole column."""
    return lambda table: table.set_column(table.column_names.index(column), column, values)


def _members() -> pa.Table:
    ids = range(len(EVENTS_PER_MEMBER))
    return pa.table(
        {
            "member_id": [f"m{i}" for i in ids],
            "position": [POSITIONS[i % len(POSITIONS)] for i in ids],
            "company": [None if i == 2 else COMPANIES[i % len(COMPANIES)] for i in ids],
            "location": [LOCATIONS[i % len(LOCATIONS)] for i in ids],
            "experience": [None if i == 3 else 2 * i for i in ids],
        }
    )


def _items() -> pa.Table:
    rng = np.random.default_rng(1)
    jobs = range(JOBS)
    return pa.table(
        {
            "item_id": [100 + i for i in jobs],
            "title": [POSITIONS[i % len(POSITIONS)] + (" (senior)" if i % 3 == 0 else "") for i in jobs],
            "company": [COMPANIES[i // 4 % len(COMPANIES)] for i in jobs],
            "location": [LOCATIONS[i % len(LOCATIONS)] for i in jobs],
            "skills": [sorted(rng.choice(SKILLS, i % 4, replace=False).tolist()) for i in jobs],
            "salary": [None if i % 7 == 5 else 30_000.0 + 1_000 * (i * 11 % JOBS) for i in jobs],
            "posted": [datetime.date(2024, 12, 1) + datetime.timedelta(days=i) for i in jobs],
        },
        schema=pa.schema(
            [("item_id", pa.int64()), ("title", pa.string()), ("company", pa.string()), ("location", pa.string()),
             ("skills", pa.list_(pa.string())), ("salary", pa.float64()), ("posted", pa.date32())]
        ),
    )  # fmt: skip


def _events() -> pa.Table:
    rng = np.random.default_rng(2)
    members = rng.permutation(np.repeat(np.arange(len(EVENTS_PER_MEMBER)), EVENTS_PER_MEMBER))
    start = np.datetime64("2025-01-10", "us")
    return pa.table(
        {
            "member_id": [f"m{i}" for i in members],
            "item_id": 100 + rng.integers(0, JOBS, len(members)),
            "action": rng.choice(["viewed", "applied"], len(members), p=[0.7, 0.3]).tolist(),
            "time": pa.array(
                start + rng.integers(0, 300 * 86_400, len(members)).astype("m8[s]"), pa.timestamp("us", "UTC")
            ),
            "seconds": np.round(rng.exponential(60, len(members)), 1),
        }
    )
