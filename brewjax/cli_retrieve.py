"""`brewjax retrieve VERB`: embed members and items with an encoder, and judge what it retrieves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from brewjax.cli_index import ENCODER_KEY
from brewjax.console import print_line
from brewjax.devices import device_per_core
from brewjax.paths import write_table

# Heavy imports are inside the verbs, so that --help answers at once.

app = typer.Typer(no_args_is_help=True, help="Embed members and items, and judge what an encoder retrieves.")

EncoderFolder = Annotated[Path, typer.Argument(help="A model folder that a stage `do: contrastive` made.")]
DatasetFolder = Annotated[Path, typer.Argument(help="A folder with dataset.yaml and its Parquet files.")]
Dimensions = Annotated[
    Optional[int], typer.Option(help="Truncate the vectors to this size, one that training taught.", min=1)
]


@app.command()
def embed(
    model: EncoderFolder,
    dataset: DatasetFolder,
    out: Annotated[Path, typer.Argument(help="A Parquet file with columns id and vector, for `brewjax index build`.")],
    side: Annotated[Literal["items", "members"], typer.Option(help="Which table to embed.")] = "items",
    dimensions: Dimensions = None,
) -> None:
    """Embed all items, or all members, as of the last event."""
    device_per_core()
    import numpy as np
    import pyarrow as pa

    from brewjax.data.tables.dataset import Dataset
    from brewjax.data.tasks.examples import example_at
    from brewjax.retrieve.encoder import Encoder

    encoder, tables = Encoder.load(model), Dataset.load(dataset)
    now = tables.last_event_time + 1
    if side == "items":
        rows = np.flatnonzero(tables.items_of(encoder.task.questions.actions[0]))
        ids = tables.items[tables.card.items.id].take(pa.array(rows))
        vectors = encoder.embed_items(tables, rows, now, dimensions)
    else:
        ids = tables.members[tables.card.members.id]
        examples = [example_at(tables, encoder.task, member, now) for member in range(len(ids))]
        vectors = encoder.embed_members(tables, examples, dimensions)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({"id": ids, "vector": lists}).replace_schema_metadata({ENCODER_KEY: Encoder.version(model)})
    write_table(out, table)
    print_line(f"{out}: {len(ids):,} vectors of {vectors.shape[1]} dimensions")


@app.command()
def vectors(
    dataset: DatasetFolder,
    models: Annotated[list[Path], typer.Argument(help="Encoders' folders, each trained until another time.")],
) -> None:
    """Write vectors.parquet into the dataset's folder, for a fact `similarity` of its card."""
    device_per_core()
    from brewjax.data.tables.dataset import Dataset
    from brewjax.data.tables.vectors import VECTORS
    from brewjax.retrieve.encoder import Encoder
    from brewjax.retrieve.similarity import write_vectors

    count = write_vectors(Dataset.load(dataset), {Encoder.version(model): Encoder.load(model) for model in models})
    print_line(f"{dataset / VECTORS}: {count:,} vectors")


@app.command()
def evaluate(
    model: EncoderFolder,
    dataset: DatasetFolder,
    k: Annotated[str, typer.Option(help="How many items are retrieved, separated by commas.")] = "10,100,2000",
    max_examples: Annotated[
        Optional[int], typer.Option(help="The most queries; a random choice of them.", min=1)
    ] = None,
    dimensions: Dimensions = None,
    ranker: Annotated[
        Optional[Path],
        typer.Option(help="A ranker's folder: what is lost if it ranks the k nearest items alone."),
    ] = None,
) -> None:
    """Recall over the whole catalogue in the test period, beside popularity, item-kNN, ALS and BM25."""
    device_per_core()
    from brewjax.data.tables.dataset import Dataset
    from brewjax.retrieve.encoder import Encoder
    from brewjax.retrieve.evaluation import evaluate_retrieval, print_recall

    ks = _parse_ks(k)
    encoder, tables = Encoder.load(model), Dataset.load(dataset)
    rows = evaluate_retrieval(encoder, tables, ks, max_examples, dimensions)
    print_recall(f"{encoder.task.name}: the test period", rows)
    if ranker:
        from brewjax.bundle.bundle import Bundle
        from brewjax.evaluate.funnel import evaluate_funnel, print_funnel

        funnel = evaluate_funnel(encoder, Bundle.load(ranker), tables, ks, max_examples, dimensions)
        print_funnel(f"{encoder.task.name}: retrieve, then rank", funnel)


def _parse_ks(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise ValueError(f"--k {text}: expected whole numbers above 0, separated by commas, such as 10,100,2000")
    return sorted({int(part) for part in parts})
