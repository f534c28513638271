"""Records for continued pre-training: a dataset's items and histories as prose, and general text from a folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic

from brewjax.config import Config, Seed, read_text
from brewjax.data.prompts.styles import SECTIONED
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.provenance import Provenance
from brewjax.data.tables.partition import WHOLE, Partition
from brewjax.data.text.encode import Text, encode_text
from brewjax.data.text.tokenizer import Tokenizer


class PretrainConfig(Config):
    """The data of continued pre-training."""

    ALIASES: ClassVar = {"passes": "repeats", "general": "general_text", "general_share": "general_fraction"}

    repeats: int = pydantic.Field(default=1, gt=0)
    """How many times every item and history is rendered, each time with its facts in another order."""
    general_text: str | None = None
    """A folder of general text, mixed in so that the model does not forget language: .txt files, each a text, and
    .jsonl files, each line an object with its text as "text", in folders of any depth. By default there is none."""
    general_fraction: float = pydantic.Field(default=0.25, gt=0, lt=1)
    """The share of general text in all tokens."""
    seed: Seed = 0
    """Seed of the orders of facts."""


def domain_texts(
    verbalizer: Verbalizer, until: int, config: PretrainConfig, partition: Partition = WHOLE
) -> Iterator[tuple[str, Provenance]]:
    """Writes prose about every item and every member with an event before `until`.

    All of it is as of `until`: nothing that happened later shows, neither an event, nor a statistic, nor the existence
    of an item or a member. Texts are in order of the hashes of the ids, and the seed decides each by itself.

    Args:
      verbalizer: of the dataset.
      until: microseconds since 1970, where validation begins.
      config: how often each is written about, and the seed.
      partition: only the texts of its items and members.

    Yields:
      Each text with its provenance.
    """
    dataset = verbalizer.dataset
    items = dataset.items_by_hash[partition.select(dataset.item_hash[dataset.items_by_hash])]
    items = items[dataset.first_event_time[items] < until]
    members = dataset.members_by_hash[partition.select(dataset.member_hash[dataset.members_by_hash])]
    members = members[np.diff(dataset.member_offsets)[members] > 0]
    members = members[dataset.event_time[dataset.member_offsets[members]] < until]
    hashes = np.concatenate([dataset.item_hash[items], dataset.member_hash[members]])
    facts = dict(zip(items.tolist(), verbalizer.facts("items", items, until, SECTIONED), strict=True))
    for index in np.argsort(hashes, kind="stable").tolist():
        is_item = index < len(items)
        row = int(items[index] if is_item else members[index - len(items)])
        for repeat in range(config.repeats):
            rng = np.random.default_rng([config.seed, repeat, int(is_item), int(hashes[index])])
            if is_item:
                noun = dataset.item_card(row).items.noun
                text = _sentences(noun.capitalize(), facts[row], rng)
                yield text, {"item": dataset.items[dataset.card.items.id][row].as_py(), "repeat": repeat}
            else:
                text = _history(verbalizer, row, until, rng)
                yield text, {"member": dataset.members[dataset.card.members.id][row].as_py(), "repeat": repeat}


def _history(verbalizer: Verbalizer, member: int, until: int, rng: np.random.Generator) -> str:
    """A member's profile, then the events before `until` month by month: the items by name, with the facts of each
    event."""
    dataset, card = verbalizer.dataset, verbalizer.dataset.card
    events = np.arange(*dataset.member_offsets[member : member + 2])
    events = events[dataset.event_time[events] < until]
    profile = verbalizer.facts("members", np.array([member]), until, SECTIONED)[0]
    parts = [_sentences(card.members.noun.capitalize(), profile, rng)]
    times = dataset.event_time[events]
    names = verbalizer.names(dataset.event_item[events])
    facts = verbalizer.facts("events", events, times, SECTIONED)
    texts = [
        f"{name} ({', '.join(event_facts)})" if event_facts else name
        for name, event_facts in zip(names, facts, strict=True)
    ]
    months = times.astype("M8[us]").astype("M8[M]")
    for (month, action), group_events in itertools.groupby(
        zip(months, map(dataset.action_name, events), texts, strict=True), key=lambda event: event[:2]
    ):
        group = SECTIONED.group.format(
            member=f"the {card.members.noun}",
            past=card.events.actions[action].past,
            items=card.side_of(action).items.plural,
        )
        parts.append(f"{month.item():%B %Y}: {group.strip()} {', '.join(text for *_, text in group_events)}.\n")
    return "".join(parts)


def _sentences(subject: str, facts: list[str], rng: np.random.Generator) -> str:
    """The subject, then each fact, in random order."""
    return ". ".join([subject, *rng.permutation(facts).tolist()]) + ".\n"


def general_files(folder: Path) -> list[Path]:
    """The files of general text in a folder (see `PretrainConfig.general_text`), sorted by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl"))


def general_texts(folder: Path, partition: Partition = WHOLE) -> Iterator[tuple[str, Provenance]]:
    """Reads the general texts of a folder, sorted by file name.

    Args:
      folder: of .txt files, each a text, and .jsonl files, each line a text.
      partition: only the texts of its part of the files.

    Yields:
      Each text with its provenance.

    Raises:
      ValueError: the folder has no such files, or a line is wrong; names file and line.
    """
    files = general_files(folder)
    if not files:
        raise ValueError(f"{folder}: no .txt or .jsonl files there")
    for path in files[partition.split(len(files))]:
        if path.suffix == ".txt":
            yield read_text(path), {"file": str(path)}
            continue
        with open(path, "rb") as lines:
            for line_number, line in enumerate(lines, 1):
                text = _read_line(line, f"{path}:{line_number}")
                yield text, {"file": str(path), "line": line_number}


def _read_line(line: bytes, source: str) -> str:
    try:
        record: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8: byte 0x{line[error.start]:02x}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not valid JSON: {error.msg} at column {error.colno}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{source}: expected an object such as {{"text": ".."}}')
    return text


def pretrain_records(
    texts: Iterable[tuple[str, Provenance]], tokenizer: Tokenizer
) -> Iterator[tuple[Text, Provenance]]:
    """Encodes texts for `write_shard`, without empty ones.

    Args:
      texts: `domain_texts` or `general_texts`.
      tokenizer: of the model.

    Yields:
      Each record with its provenance.
    """
    return ((encode_text(text, tokenizer), provenance) for text, provenance in texts if text.strip())
