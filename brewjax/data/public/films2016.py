"""MovieLens as of 2016, a hundred thousand ratings of 671 members: as many as MovieLens-100k has, eighteen years on."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from brewjax.data.public.movielens import article_first
from brewjax.data.public.rtables import read_rdataset


def read_films_2016(source: Path | None) -> dict[str, pa.Table]:
    """The tables of dslabs' copy; stars come in halves, and nothing is known of the members."""
    frame = read_rdataset("dslabs/movielens", source)
    films = frame.drop_duplicates("movieId").sort_values("movieId")
    known = lambda value: value == value  # noqa: E731 (NaN is not itself)
    items = {
        "item_id": films["movieId"].tolist(),
        "title": [
            f"{article_first(title)} ({year:.0f})" if known(year) else None
            for title, year in zip(films["title"], films["year"], strict=True)
        ],
        "genres": [[] if text == "(no genres listed)" else text.split("|") for text in films["genres"].astype(str)],
        "year": pa.array([int(year) if known(year) else None for year in films["year"]], pa.int64()),
    }
    events = {
        "member_id": frame["userId"].tolist(),
        "item_id": frame["movieId"].tolist(),
        "action": ["rated"] * len(frame),
        "time": pa.array(frame["timestamp"].tolist(), pa.timestamp("s", "UTC")).cast(pa.timestamp("us", "UTC")),
        "stars": frame["rating"].tolist(),
    }
    members = {"member_id": sorted(set(frame["userId"].tolist()))}
    return {"members": pa.table(members), "items": pa.table(items), "events": pa.table(events)}
