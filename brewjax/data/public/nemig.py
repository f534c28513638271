"""NeMig (English): news that were shown to readers in lists, and what they clicked (Iana et al., INRA 2023)."""

from __future__ import annotations

import bz2
import datetime
import html
import re
from pathlib import Path

import pyarrow as pa

from brewjax.download import DownloadError, folder_with

BEHAVIORS = "behaviors.tsv"
CONTENT = "nemig_en_base-instances_content_literals.nt.bz2"
METADATA = "nemig_en_base-instances_metadata_literals.nt.bz2"
LITERAL = re.compile(
    r'<http://nemig_en\.org/resource/news_(?:title_|abstract_)?(\d+)> <https://schema\.org/(\w+)> "(.*)" \.$'
)
STEPS = 1_000  # of an impression: room for the history before it


def read_nemig(source: Path | None) -> dict[str, pa.Table]:
    """The tables of a local copy.

    There are no times. A reader's articles, in the order of the file, come before the reader's impressions, in the
    order of their numbers: column `step`.

    Raises:
      DownloadError: there is no copy, or a file of it is missing.
    """
    folder = folder_with(BEHAVIORS, source, "nemig")
    if missing := [name for name in (CONTENT, METADATA) if not (folder / name).is_file()]:
        raise DownloadError(f"{folder} has no {', '.join(missing)}")
    events = _read_events(folder / BEHAVIORS)
    articles = _read_articles(folder, {*events["item_id"]})
    members = sorted({*events["member_id"]})
    return {"members": pa.table({"member_id": members}), "items": articles, "events": pa.table(events)}


def _read_events(path: Path) -> dict[str, list]:
    impressions = []
    for line in path.read_text().splitlines():
        number, member, history, shown = line.split("\t")
        impressions.append((int(number), member, history.split(), shown.split()))
    events: dict[str, list] = {name: [] for name in ("member_id", "item_id", "action", "step", "impression")}
    read: dict[str, set[str]] = {}

    def add(*values: str | int | None) -> None:
        for name, value in zip(events, values, strict=True):
            events[name].append(value)

    for impression, reader, articles, entries in sorted(impressions):
        before = read.setdefault(reader, set())
        new = [article for article in dict.fromkeys(articles) if article not in before]
        before.update(new)
        for index, article in enumerate(new):
            add(reader, article, "read", impression * STEPS - len(new) + index, None)
        for entry in dict.fromkeys(entries):
            article, clicked = entry.rsplit("-", 1)
            add(reader, article, "clicked" if clicked == "1" else "shown", impression * STEPS, impression)
    return events


def _read_articles(source: Path, articles: set[str]) -> pa.Table:
    literals: dict[str, dict[str, str]] = {"headline": {}, "abstract": {}, "datePublished": {}}
    for name in (CONTENT, METADATA):
        for line in bz2.decompress((source / name).read_bytes()).decode().splitlines():
            if (match := LITERAL.match(line)) and match[2] in literals:
                literals[match[2]][f"news_{match[1]}"] = _plain(match[3])
    ids = sorted(articles)
    dates = [literals["datePublished"].get(article) for article in ids]
    return pa.table(
        {
            "item_id": ids,
            "title": [literals["headline"].get(article) for article in ids],
            "abstract": [literals["abstract"].get(article) for article in ids],
            "published": [date and datetime.datetime.strptime(date, "%d.%m.%Y").date() for date in dates],
        }
    )


def _plain(literal: str) -> str:
    """A literal's text: without its escapes, and without those of its page, which some have twice."""
    return html.unescape(html.unescape(literal.replace('\\"', '"')))
