"""`Index.search` next to faiss' flat index, on a CPU, in one run.

    pip install faiss-cpu
    python -m benchmarks.search_race [--rows 1000000] [--dimensions 64 256] [--queries 1 32] [--k 2000]

Both take turns on the same clustered unit vectors; a figure is the median of the turns, ours over faiss'. With filters:
half of the rows, and one in a hundred.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from brewjax.retrieve.index import Index, IndexConfig

TURNS = 5
EVEN, RARE = 2, 4  # attribute bits
FILTERS = {"none": 0, "half": EVEN, "1 in 100": RARE}


def clustered(count: int, dimensions: int, random: np.random.Generator) -> np.ndarray:
    centers = random.standard_normal((200, dimensions), dtype=np.float32)
    vectors = random.standard_normal((count, dimensions), dtype=np.float32)
    vectors += 0.7 * centers[random.integers(0, 200, count)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def race(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds of ours and theirs, and the share of their rows that ours has."""
    times: tuple[list[float], list[float]] = ([], [])
    results = [function() for function in (ours, theirs)]  # compiled, warm
    for _ in range(TURNS):
        for function, seconds in zip((ours, theirs), times, strict=True):
            start_time = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start_time)
    overlap = np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(*results, strict=True)])
    return float(np.median(times[0])), float(np.median(times[1])), float(overlap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--k", type=int, default=2000)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    table = Table("vectors", "queries", "filter", "ours, ms", "faiss flat, ms", "ours / faiss", "same rows")
    for dimensions in arguments.dimensions:
        vectors = clustered(arguments.rows, dimensions, random)
        attributes = np.zeros(arguments.rows, np.int32)
        attributes[::2] |= EVEN
        attributes[random.random(arguments.rows) < 0.01] |= RARE
        flat = faiss.IndexFlatIP(dimensions)
        flat.add(vectors)
        with tempfile.TemporaryDirectory() as folder:
            index = Index.create(Path(folder) / "index", IndexConfig(dimensions=dimensions))
            index.upsert(range(arguments.rows), vectors, attributes)
            for count, (name, bit) in itertools.product(arguments.queries, FILTERS.items()):
                queries = clustered(count, dimensions, random)
                bitmap = np.packbits((attributes & bit) == bit, bitorder="little")
                parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bitmap)) if bit else None

                def ours(queries: np.ndarray = queries, bit: int = bit, index: Index = index) -> list[list[int]]:
                    return [hits.ids for hits in index.search(queries, arguments.k, required=bit)]

                def theirs(
                    queries: np.ndarray = queries, parameters: object = parameters, flat: faiss.Index = flat
                ) -> np.ndarray:
                    return flat.search(queries, arguments.k, params=parameters)[1]

                our_seconds, their_seconds, overlap = race(ours, theirs)
                table.add_row(
                    f"{arguments.rows:,} x {dimensions}",
                    str(count),
                    name,
                    f"{our_seconds * 1e3:.1f}",
                    f"{their_seconds * 1e3:.1f}",
                    f"{our_seconds / their_seconds:.2f}",
                    f"{overlap:.4f}",
                )
            index.close()
    Console().print(table)


if __name__ == "__main__":
    main()
