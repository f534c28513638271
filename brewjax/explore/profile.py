"""A member's profile as texts that a reader can edit, and the tables with an edited one."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from brewjax.config import suggest
from brewjax.data.tables.dataset import Dataset


def read_profile(dataset: Dataset, member: int) -> dict[str, str]:
    """The attributes of a member by column, as texts; "" for one that is unknown.

    Args:
      dataset: the tables.
      member: row of the member.
    """
    values = {each.column: dataset.members[each.column][member].as_py() for each in dataset.card.members.attributes}
    return {column: _to_text(value) for column, value in values.items()}


def edit_profile(dataset: Dataset, member: int, profile: Mapping[str, str]) -> pa.Table:
    """The table of members with other attributes of one of them.

    Args:
      dataset: the tables.
      member: row of the member.
      profile: texts by column; "" for unknown; commas are between the texts of a list.

    Raises:
      ValueError: no attribute has the column, or a text is no value of it.
    """
    kinds = {each.column: each.kind for each in dataset.card.members.attributes}
    members = dataset.members
    for column, text in profile.items():
        if column not in kinds:
            noun = dataset.card.members.noun
            raise ValueError(f"{noun} has no attribute '{column}'; {suggest(column, kinds, listing='attributes')}")
        old = members[column]
        try:
            new = pa.array([parse_value(text, kinds[column], old.type)], old.type)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from None
        chunks = [*old.slice(0, member).chunks, new, *old.slice(member + 1).chunks]
        members = members.set_column(members.column_names.index(column), column, pa.chunked_array(chunks, old.type))
    return members


def parse_value(text: str, kind: str, dtype: pa.DataType) -> pa.Scalar:
    """Reads a value of a table.

    Args:
      text: as a reader types it: "" for unknown; commas are between the texts of a list.
      kind: of the attribute.
      dtype: of the column.

    Raises:
      ValueError: the text is no such value.
    """
    value = [each.strip() for each in text.split(",")] if kind == "list" else text
    try:
        return pa.array([value if text.strip() else None], pa.infer_type([value])).cast(dtype)[0]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ValueError(f"'{text}' is no {kind}, as {dtype}") from None


def _to_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_to_text, value))
    if isinstance(value, float):
        return f"{value:.12g}"
    return "" if value is None else str(value)
