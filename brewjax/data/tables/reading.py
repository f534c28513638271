"""Reads Parquet and CSV files as tables of a few plain types, whatever widths and encodings the files have."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset

from brewjax.config import nearest

MAGIC = b"PAR1"  # a Parquet file begins and ends with it
TEXT = pa.large_string()  # `pa.string()` has no room for the characters of a column in one piece if they are 2 GiB
INTEGER, FLOAT, DAY, TEXTS = pa.int64(), pa.float64(), pa.date32(), pa.list_(TEXT)
TIME = pa.timestamp("us", "UTC")


class UnreadableError(ValueError):
    """A file that cannot be read as a table; the message names the file and the reason."""


def open_table(folder: Path, file: str) -> tuple[pa.Table, list[tuple[int, str]]]:
    """Reads a Parquet or CSV file, or a folder of Parquet files as one table.

    In a CSV file whole numbers, numbers, dates and timestamps are read as such, and an empty field is unknown.

    Args:
      folder: the dataset folder.
      file: name of the file or folder within it.

    Returns:
      The table, and for error messages the first row and the name of each file of a folder, or [(0, "")] for a file.

    Raises:
      UnreadableError: the file is missing, is not Parquet or CSV, or has two columns of one name.
    """
    path = folder / file
    if not path.exists():
        present = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        near = nearest(Path(file).stem, [Path(name).stem for name in present if name.endswith(Path(file).suffix)])
        hint = f"did you mean '{near}{Path(file).suffix}'?" if near else f"there are: {', '.join(present) or 'none'}"
        raise UnreadableError(f"{file}: no such file or folder in {folder}; {hint}")
    if path.is_file() and path.name.endswith((".csv", ".csv.gz")):
        return _read_csv(path, file), [(0, "")]
    for part in _files(path):
        if problem := _no_parquet(part):
            raise UnreadableError(f"{file}{'' if part == path else f': {part.relative_to(path)}'}: {problem}")
    try:
        source = pa.dataset.dataset(path, format="parquet", partitioning="hive" if path.is_dir() else None)
        rows = [fragment.count_rows() for fragment in source.get_fragments()]
        names = source.schema.names
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise UnreadableError(f"{file}: two columns are named '{duplicate}'; give each a name of its own")
        table = source.to_table()
    except (OSError, pa.ArrowException) as error:
        if "duplicate field names" in str(error):
            raise UnreadableError(f"{file}: two columns have the same name; give each a name of its own") from None
        raise UnreadableError(f"{file}: not readable as Parquet: {str(error).splitlines()[0]}") from None
    if not path.is_dir():
        return table, [(0, "")]
    if not source.files:
        raise UnreadableError(f"{file}: a folder without Parquet files")
    names = [str(Path(name).relative_to(path)) for name in source.files]
    return table, list(zip(np.cumsum([0, *rows[:-1]]).tolist(), names, strict=True))


def _read_csv(path: Path, file: str) -> pa.Table:
    convert = pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
    try:
        table = pyarrow.csv.read_csv(path, convert_options=convert)
    except (OSError, pa.ArrowException) as error:
        raise UnreadableError(f"{file}: not readable as CSV: {str(error).splitlines()[0]}") from None
    if duplicate := next((name for name in table.column_names if table.column_names.count(name) > 1), None):
        raise UnreadableError(f"{file}: two columns are named '{duplicate}'; give each a name of its own")
    return table


def _files(path: Path) -> Iterator[Path]:
    """Yields the file itself, or the files of a folder that Arrow reads: names that begin with . or _ are skipped."""
    if path.is_file():
        yield path
        return
    for entry in sorted(path.rglob("*")):
        if entry.is_file() and not any(part.startswith((".", "_")) for part in entry.relative_to(path).parts):
            yield entry


def _no_parquet(path: Path) -> str:
    """Why a file is not Parquet, judged by its first and last bytes; empty if they are right."""
    try:
        with open(path, "rb") as file:
            begin = file.read(60)
            end = b""
            if len(begin) > 8:
                file.seek(-len(MAGIC), 2)
                end = file.read()
    except OSError as error:
        return f"not readable: {error.strerror}"
    if not begin:
        return "an empty file; expected Parquet"
    if not begin.startswith(MAGIC):
        line = begin.decode("utf-8", "replace").splitlines()[0]
        csv = "; if it is CSV, let its name end with .csv" if line.isprintable() else ""
        return f"not Parquet: it begins with {line!r:.40}{csv}"
    return "" if end == MAGIC else "truncated Parquet: its end is missing; write or copy it again"


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Casts a column to the one type that brewjax uses for its kind of value; any other type is left as it is.

    A float of fewer bits becomes the float64 that reads the same: 0.1, not 0.10000000149011612.
    """
    kind = column.type
    try:
        if pa.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        if pa.types.is_float32(kind):
            column = column.cast(TEXT)
        elif pa.types.is_float16(kind):
            texts = [None if value is None else str(np.float16(value)) for value in column.to_pylist()]
            column = pa.chunked_array([pa.array(texts, TEXT)])
        tests = {
            INTEGER: pa.types.is_integer(kind),
            FLOAT: pa.types.is_floating(kind) or pa.types.is_decimal(kind),
            TEXT: _is_text(kind),
            TEXTS: _is_list(kind) and _is_text(kind.value_type),
            DAY: pa.types.is_date(kind),
            TIME: pa.types.is_timestamp(kind),
        }
        for type_, fits in tests.items():
            if fits:
                return column.cast(type_, safe=type_ != TIME)  # nanoseconds are truncated to microseconds
    except pa.ArrowException:  # e.g. an unsigned integer over 2^63: refused by its kind if the card uses it
        return column
    return column


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def show(value: pa.Scalar) -> str:
    """Renders a `value` for an error message, in at most 60 characters; some values, such as a nanosecond or the year
    30000, have no equal in Python."""
    try:
        if pa.types.is_duration(value.type) and value.type.unit == "ns":  # pandas, where it is installed, has an equal
            raise ValueError
        shown = value.as_py()
        text = str(shown) if isinstance(shown, (datetime.date, datetime.time, datetime.timedelta)) else repr(shown)
    except (ValueError, OverflowError, KeyError):
        text = pc.cast(pa.array([value]), TEXT)[0].as_py()
    return text if len(text) <= 60 else f"{text[:57]}..."


def show_type(type_: pa.DataType) -> str:
    """Renders a column's type `type_` for an error message, for instance "texts"."""
    return {TEXT: "texts", TEXTS: "lists of texts"}.get(type_, str(type_))
