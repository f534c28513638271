"""Guesses the card of a dataset folder from its tables: which is which, and what each column holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from brewjax.config import ConfigError
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.reading import (
    DAY,
    FLOAT,
    INTEGER,
    TEXT,
    TEXTS,
    TIME,
    UnreadableError,
    open_table,
    plain,
    show_type,
)
from brewjax.paths import write_text

# Names of files, in the singular, by what they hold.
FILES = {
    "members": ("member", "user", "customer", "household", "person", "people", "client", "account", "reader", "viewer"),
    "items": ("item", "product", "job", "article", "news", "movie", "film", "book", "song", "video", "ad", "good"),
    "events": (
        "event", "interaction", "rating", "click", "transaction", "order", "view", "behavior", "impression", "log",
        "purchase", "action",
    ),
}  # fmt: skip
MAX_CATEGORIES = 60  # values of a category; a text has more
MAX_ACTIONS = 20


class Guess(NamedTuple):
    """One guess: where in the card, what, and why."""

    key: str
    value: str
    reason: str


def guess_card(folder: Path) -> tuple[dict[str, Any], list[Guess]]:
    """The values of a card for the tables in a folder, and every guess that was made.

    Raises:
      ConfigError: the folder has not three tables, or their ids cannot be told.
    """
    guesses: list[Guess] = []
    tables = {name: _open(folder, file) for name, file in _find_files(folder, guesses).items()}
    files = {guess.key.split(".")[0]: guess.value for guess in guesses}
    card: dict[str, Any] = {"name": folder.resolve().name}
    events = tables["events"]
    ids: dict[str, str] = {}
    for name in ("members", "items"):
        own_id, reference = _find_ids(tables[name], events, name, used=[*ids.values()])
        ids[name] = reference
        guesses.append(Guess(f"{name}.id", own_id, "one value for each row, and the events refer to it"))
        guesses.append(Guess(f"events.{name[:-1]}", reference, f"its values are ids of {name}"))
        card[name] = {"file": files[name], "id": own_id}
    used = set(ids.values())
    time = next((column for column in events.column_names if events[column].type == TIME), None)
    guesses.append(Guess("events.time", str(time), "the first timestamps" if time else "there are no timestamps"))
    action = _find_action(events, used)
    actions: list[str]
    if action:
        actions = sorted(value for value in events[action].unique().to_pylist() if value)
        guesses.append(Guess("events.action", action, f"{len(actions)} values: {', '.join(actions)}"))
        where: dict[str, Any] = {"file": files["events"], "action": action}
    else:
        actions = ["acted"]
        guesses.append(Guess("events.files", "acted", "no column with a few names of actions: all events are of one"))
        where = {"files": {"acted": files["events"]}}
    card["events"] = where | {
        "member": ids["members"],
        "item": ids["items"],
        "time": time,
        "actions": {name: {"past": f"has {name.replace('_', ' ')}"} for name in actions},
    }
    skip = {"members": {card["members"]["id"]}, "items": {card["items"]["id"]}, "events": {*used, time, action}}
    for name, table in tables.items():
        card[name]["attributes"] = _attributes(table, skip[name], name, guesses)
    return card, guesses


def write_card(folder: Path) -> list[Guess]:
    """Writes the card that `guess_card` guesses into the folder of the tables.

    Args:
      folder: that holds the three tables, and no card.

    Returns:
      What was guessed, and why, to be looked at.

    Raises:
      ConfigError: there is a card already, or none can be guessed.
    """
    if (folder / CARD).exists():
        raise ConfigError(f"{folder / CARD}: it is there already; remove it to guess another")
    card, guesses = guess_card(folder)
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    Card.parse(text, str(folder / CARD))
    write_text(folder / CARD, text)
    return guesses


def _find_files(folder: Path, guesses: list[Guess]) -> dict[str, str]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder that holds the tables")
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() or path.name.endswith((".parquet", ".csv", ".csv.gz"))
        if not path.name.startswith((".", "_"))
    )
    files: dict[str, str] = {}
    for table, stems in FILES.items():
        matching = [
            name for name in names if any(stem in name.lower() for stem in stems) and name not in files.values()
        ]
        if not matching:
            raise ConfigError(
                f"{folder}: no file that looks like {table} ({', '.join(stems[:4])}, ..); there are: "
                f"{', '.join(names) or 'none'}; name it {table}.parquet or {table}.csv"
            )
        files[table] = matching[0]
        guesses.append(Guess(f"{table}.file", matching[0], "by its name"))
    return files


def _open(folder: Path, file: str) -> pa.Table:
    try:
        table, _ = open_table(folder, file)
    except UnreadableError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return pa.table({name: plain(table[name]) for name in table.column_names})


def _find_ids(table: pa.Table, events: pa.Table, name: str, used: list[str]) -> tuple[str, str]:
    """The id column of a table, and the column of the events whose values are these ids."""
    for column in table.column_names:
        ids = table[column]
        if ids.type not in (INTEGER, TEXT) or ids.null_count or len(ids.unique()) < len(ids):
            continue
        same = [column] if column in events.column_names else []
        for reference in [*same, *events.column_names]:
            if reference in used or events[reference].type != ids.type:
                continue
            if pc.all(pc.is_in(events[reference], value_set=ids.combine_chunks())).as_py():
                return column, reference
    raise ConfigError(
        f"no column of {name} has a different value in each row that a column of the events refers to; every event "
        f"needs the id of one of {name}, of the same type"
    )


def _find_action(events: pa.Table, used: set[str]) -> str | None:
    named = [c for c in events.column_names if any(word in c.lower() for word in ("action", "event", "type", "kind"))]
    for column in [*named, *events.column_names]:
        texts = column not in used and events[column].type == TEXT and not events[column].null_count
        if texts and len(events[column].unique()) <= MAX_ACTIONS:
            return column
    return None


def _attributes(table: pa.Table, skip: set[str | None], name: str, guesses: list[Guess]) -> list[dict[str, Any]]:
    attributes = []
    for column in table.column_names:
        if column in skip:
            continue
        kind, reason = _guess_kind(table[column])
        guesses.append(Guess(f"{name}.{column}", kind or "left out", reason))
        if kind:
            attributes.append({"column": column, "kind": kind} | ({"buckets": 10} if kind == "number" else {}))
    return attributes


def _guess_kind(values: pa.ChunkedArray) -> tuple[str | None, str]:
    singles = pa.chunked_array([pc.list_flatten(values).combine_chunks()]) if values.type == TEXTS else values
    distinct = len(singles.drop_null().unique())
    if distinct <= 1:
        return None, "all rows have the same value"
    if values.type == TEXTS:
        return "list", f"lists of texts, {distinct:,} different ones"
    if values.type in (TIME, DAY):
        return "date", "dates"
    if values.type in (FLOAT, INTEGER):
        if values.type == INTEGER and distinct == len(values):
            return None, "a whole number of its own in each row, as ids are"
        return "number", f"numbers, {distinct:,} different ones"
    if pa.types.is_boolean(values.type):
        return "category", "true or false"
    if values.type == TEXT:
        kind = "category" if distinct <= min(MAX_CATEGORIES, len(values) // 2) else "text"
        return kind, f"{distinct:,} different texts"
    return None, f"{show_type(values.type)} is no kind of attribute"
