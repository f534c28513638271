"""Text for continued pre-training: a dataset's items and histories told as prose, and general text from a folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from brewjax.config import Config, Seed, read_text
from brewjax.data.prompts.styles import SECTIONED
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.provenance import Provenance
from brewjax.data.text.encode import Text, encode_text
from brewjax.data.text.tokenizer import Tokenizer


class PretrainConfig(Config):
    """Text for continued pre-training.

    Attributes:
      passes: how often every item and history is told, each time with its facts in another order.
      general: a folder of general text, kept so that the model does not forget it: .txt files, each a text, and
        .jsonl files, each line an object with its text as "text"; in folders of any depth. None: the dataset's text
        alone.
      general_share: of all tokens.
    """

    repeats: int = pydantic.Field(default=1, gt=0)
    general_text: str | None = None
    general_fraction: float = pydantic.Field(default=0.25, gt=0, lt=1)
    seed: Seed = 0


def domain_texts(verbalizer: Verbalizer, until: int, config: PretrainConfig) -> Iterator[tuple[str, Provenance]]:
    """Every item, and every member's profile and history, that has an event before `until` (microseconds; where
    validation begins), told as of then: nothing that happened later shows, neither an event, nor a statistic, nor that
    an item or a member was there at all."""
    rng = np.random.default_rng(config.seed)
    dataset = verbalizer.dataset
    events = np.flatnonzero(dataset.event_time < until)
    items = np.unique(dataset.event_item[events])
    for number in range(config.repeats):
        facts = verbalizer.facts("items", items, until, SECTIONED)
        for item, of_item in zip(items, facts, strict=True):
            text = _sentences(dataset.card.items.noun.capitalize(), of_item, rng)
            yield text, {"item": dataset.items[dataset.card.items.id][int(item)].as_py(), "pass": number}
        for member, own in itertools.groupby(events, key=lambda event: dataset.event_member[event]):
            note = {"member": dataset.members[dataset.card.members.id][int(member)].as_py(), "pass": number}
            yield _history(verbalizer, int(member), np.array(list(own)), until, rng), note


def _history(verbalizer: Verbalizer, member: int, events: np.ndarray, until: int, rng: np.random.Generator) -> str:
    """A profile, then what the member did, month by month: the items by name, with what is said of the events."""
    dataset, card = verbalizer.dataset, verbalizer.dataset.card
    profile = verbalizer.facts("members", np.array([member]), until, SECTIONED)[0]
    parts = [_sentences(card.members.noun.capitalize(), profile, rng)]
    times = dataset.event_time[events]
    names = verbalizer.names(dataset.event_item[events])
    facts = verbalizer.facts("events", events, times, SECTIONED)
    told = [f"{name} ({', '.join(said)})" if said else name for name, said in zip(names, facts, strict=True)]
    months = times.astype("M8[us]").astype("M8[M]")
    for (month, action), some in itertools.groupby(
        zip(months, dataset.event_action[events], told, strict=True), key=lambda event: event[:2]
    ):
        group = SECTIONED.group.format(
            member=f"the {card.members.noun}", past=card.events.actions[action].past, items=card.items.plural
        )
        parts.append(f"{month.item():%B %Y}: {group.strip()} {', '.join(text for *_, text in some)}.\n")
    return "".join(parts)


def _sentences(subject: str, facts: list[str], rng: np.random.Generator) -> str:
    """The subject, then each fact, in an order of its own."""
    return ". ".join([subject, *rng.permutation(facts).tolist()]) + ".\n"


def general_files(folder: Path) -> list[Path]:
    """The files of general text in a folder, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl"))


def general_texts(folder: Path) -> Iterator[tuple[str, Provenance]]:
    """The texts of a folder (see `PretrainConfig`), in the order of their names. ValueError naming file and line."""
    files = general_files(folder)
    if not files:
        raise ValueError(f"{folder}: no .txt or .jsonl files there")
    for path in files:
        if path.suffix == ".txt":
            yield read_text(path), {"file": str(path)}
            continue
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield _read_line(line, f"{path}:{number}"), {"file": str(path), "line": number}


def _read_line(line: bytes, place: str) -> str:
    try:
        record: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8: byte 0x{line[error.start]:02x}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{place}: expected an object such as {{"text": ".."}}')
    return text


def pretrain_records(
    texts: Iterable[tuple[str, Provenance]], tokenizer: Tokenizer
) -> Iterator[tuple[Text, Provenance]]:
    """Records of `domain_texts` or `general_texts`, for `write_shards`; an empty text is none."""
    return ((encode_text(text, tokenizer), note) for text, note in texts if text.strip())
