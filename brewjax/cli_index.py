"""`brewjax index VERB`: build an index of vectors, change it, search it, and give it to other systems."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from rich.table import Table

from brewjax.config import suggest
from brewjax.console import plain_console, print_line
from brewjax.paths import atomic_file, write_table

if TYPE_CHECKING:
    from brewjax.distributed import Leader

# Heavy imports are inside the verbs, so that --help answers at once.

app = typer.Typer(no_args_is_help=True, help="Build, change, search and export an index of vectors.")
console = plain_console()

IndexFolder = Annotated[Path, typer.Argument(help="The folder of an index.")]
VectorTable = Annotated[Path, typer.Argument(help="A Parquet file with columns id, vector, and maybe attributes.")]
ENCODER_KEY = "brewjax.encoder"  # of a table's metadata: name and version of the encoder that made it
ROWS = 10_000  # that are added at a time


@contextlib.contextmanager
def _leading() -> Iterator[Leader | None]:
    """Yields a leader to process zero of several, None to a process that is alone; the others follow until its verb is
    done, and exit here."""
    from brewjax import distributed
    from brewjax.retrieve.device_rows import follow

    with distributed.distributed_runtime():
        if distributed.process_index_and_count()[1] == 1:
            yield None
        elif distributed.is_process_zero():
            with distributed.Leader() as leader:
                yield leader
        else:
            follow()
            raise typer.Exit


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    table: VectorTable,
    model: Annotated[
        str, typer.Option(help="Name and version of the encoder that made the vectors; by default as the table says.")
    ] = "",
) -> None:
    """Make an index of a table of vectors."""
    import pyarrow as pa

    from brewjax.retrieve.index import Index, IndexConfig

    with _leading() as leader:
        file = _open(table)
        schema = file.schema_arrow
        ids: Literal["int64", "text"] = "int64" if pa.types.is_integer(schema.field("id").type) else "text"
        first = next(file.iter_batches(1, columns=["vector"]), None)
        if first is None or not first.num_rows:
            raise ValueError(f"{table}: no rows")
        dimensions = len(first["vector"][0])
        model = model or (schema.metadata or {}).get(ENCODER_KEY.encode(), b"").decode()
        config = IndexConfig(dimensions=dimensions, ids=ids, model=model)
        with contextlib.closing(Index.create(folder, config, leader=leader)) as index:
            _add(index, file, table)
            index.snapshot()
            print_line(f"{folder}: {len(index):,} vectors of {dimensions} dimensions")


@app.command()
def add(folder: IndexFolder, table: VectorTable) -> None:
    """Add the vectors of a table, or replace those of ids that are there."""
    from brewjax.retrieve.index import Index

    with _leading() as leader, contextlib.closing(Index(folder, leader=leader)) as index:
        _add(index, _open(table), table)
        print_line(f"{folder}: {len(index):,} vectors")


@app.command()
def search(
    folder: IndexFolder,
    table: Annotated[Path, typer.Argument(help="A Parquet file with a column vector: the queries.")],
    k: Annotated[int, typer.Option(help="How many ids for each query.", min=1)] = 10,
    required: Annotated[int, typer.Option(help="Attribute bits that a row must have.", min=0)] = 0,
    banned: Annotated[int, typer.Option(help="Attribute bits that a row must not have.", min=0)] = 0,
    out: Annotated[Optional[Path], typer.Option(help="Write query, rank, id and score to this Parquet file.")] = None,
) -> None:
    """Search for the vectors of a table: the k ids with the largest inner products."""
    import pyarrow as pa

    from brewjax.retrieve.index import Index

    with _leading() as leader, contextlib.closing(Index(folder, leader=leader)) as index:
        queries = _vectors(_open(table, ("vector",)).read(columns=["vector"])["vector"].combine_chunks())
        hits = index.search(queries, k, required, banned)
    rows = [
        (query, rank, id_, float(score))
        for query, (ids, scores) in enumerate(hits)
        for rank, (id_, score) in enumerate(zip(ids, scores, strict=True), 1)
    ]
    if out:
        names = ("query", "rank", "id", "score")
        write_table(out, pa.table({name: [row[n] for row in rows] for n, name in enumerate(names)}))
        print_line(f"{out}: {len(rows):,} rows")
        return
    printed = Table("query", "rank", "id", "score", box=None, pad_edge=False)
    for query, rank, id_, score in rows:
        printed.add_row(str(query), str(rank), str(id_), f"{score:.4f}")
    console.print(printed)


@app.command()
def export(
    folder: IndexFolder,
    out: Annotated[Path, typer.Argument(help="A file: .parquet, .npy (and .ids.parquet next to it), or .faiss.")],
) -> None:
    """Write all vectors for another system: Parquet, NumPy, or faiss' IDMap2,Flat."""
    import numpy as np

    from brewjax.retrieve.index import Index

    with _leading() as leader, contextlib.closing(Index(folder, leader=leader)) as index:
        rows = index.rows()
    vectors = _vectors(rows["vector"].combine_chunks())
    if out.suffix == ".parquet":
        write_table(out, rows)
    elif out.suffix == ".npy":
        with atomic_file(out) as temporary, open(temporary, "wb") as file:
            np.save(file, vectors)
        write_table(out.with_suffix(".ids.parquet"), rows.select(["id", "attributes"]))
    elif out.suffix == ".faiss":
        try:
            import faiss
        except ImportError:
            raise RuntimeError("faiss is not installed: pip install faiss-cpu") from None
        flat = faiss.index_factory(vectors.shape[1], "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)
        flat.add_with_ids(vectors, rows["id"].to_numpy())
        with atomic_file(out) as temporary:
            faiss.write_index(flat, str(temporary))
    else:
        raise ValueError(f"{out}: {suggest(out.suffix, ('.parquet', '.npy', '.faiss'), listing='endings')}")
    print_line(f"{out}: {len(rows):,} vectors")


def _open(table: Path, columns: tuple[str, ...] = ("id", "vector")) -> Any:
    """A Parquet file; ValueError where it is none, or lacks a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(table)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{table}: not a Parquet file: {str(error).splitlines()[0]}") from None
    for column in columns:
        if column not in file.schema_arrow.names:
            raise ValueError(f"{table}: no column '{column}'; {suggest(column, file.schema_arrow.names)}")
    return file


def _add(index: Any, file: Any, table: Path) -> None:
    names = file.schema_arrow.names
    row = 0
    for batch in file.iter_batches(ROWS):
        attributes = batch["attributes"].to_numpy() if "attributes" in names else None
        try:
            index.upsert(batch["id"].to_pylist(), _vectors(batch["vector"]), attributes)
        except ValueError as error:
            raise ValueError(f"{table}: rows {row:,} to {row + len(batch) - 1:,}: {error}") from None
        row += len(batch)


def _vectors(lists: Any) -> Any:
    """float32 [n, D] of a column of lists; ValueError where they have different lengths."""
    import numpy as np

    lengths = {len(row) for row in lists}
    if len(lengths) > 1:
        raise ValueError(f"vectors of different lengths: {sorted(lengths)}")
    return np.asarray(lists.flatten(), np.float32).reshape(len(lists), -1)
