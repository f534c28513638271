"""What the data path costs as tables grow: CPU seconds and peak memory, each in a process of its own.

`python -m benchmarks.data_scale 100k 1m 5m` makes synthetic tables of so many events and prints a table. Compare within
a row: a linear path takes ten times as long for ten times the events. Then it prepares prompts of each on one core and
on all, and prints prompts a second: compare the two.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.excerpt import load_excerpt
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import example_at, sample_examples
from brewjax.data.tasks.excerpts import read_candidates
from brewjax.data.tasks.task import Task
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.pipeline.context import Run
from brewjax.pipeline.preparation import Preparation
from brewjax.pipeline.recipe import Recipe
from brewjax.pipeline.stages import prepare
from brewjax.pipeline.workers import write_here, write_on_all_cores

SIZES = {  # events, members, items
    "100k": (100_000, 10_000, 10_000),
    "1m": (1_000_000, 100_000, 50_000),
    "5m": (5_000_000, 300_000, 200_000),
    "20m": (20_000_000, 1_000_000, 500_000),
}
CARD_TEXT = """\
name: synthetic
members: {attributes: [{column: city, kind: category}]}
items: {attributes: [{column: title, kind: text}, {column: price, kind: number, buckets: 10}]}
events: {actions: {viewed: {past: has viewed}, bought: {past: has bought}}}
facts:
  members: [{name: views, count: [viewed]}]
  items: [{name: popularity, count: [viewed]}, {name: rate, rate: [bought], shrink: 20}]
  pairs: [{name: seen, count: [viewed]}]
"""
TASK = """\
name: buys
instruction: Predict.
history: {{actions: [viewed, bought], max_events: 50}}
questions: {{question: Will they buy, actions: [{actions}], {extra}}}
labels: [{{word: "Yes", value: 1, match: {{action: bought}}}}, {{word: "No", value: 0{no}}}]
"""
MODEL = "{name: small, d_model: 16, layers: 1, heads: 1, kv_heads: 1, head_dim: 16, d_ff: 16}"
SHOWN_TEXT = TASK.format(actions="viewed, bought", extra="span_days: 1", no=", match: {action: viewed}")
SHOWN = Task.parse(SHOWN_TEXT)
SAMPLED = Task.parse(
    TASK.format(actions="bought", extra='repeats: true, sampled_negatives: {label: "No", per_event: 4}', no="")
)


def make_tables(folder: Path, events: int, members: int, items: int) -> None:
    """Synthetic tables: popular items and busy members have most of the events."""
    rng = np.random.default_rng(0)
    draw = lambda count: np.minimum((rng.pareto(1.2, events) * count / 50).astype(np.int64), count - 1)  # noqa: E731
    actions = pa.array(["viewed", "bought"]).take(pa.array((rng.random(events) < 0.1).astype(np.int8)))
    times = 1_600_000_000_000_000 + np.sort(rng.integers(0, 365 * 86_400, events)) * 1_000_000
    tables = {
        "members": pa.table({"member_id": np.arange(members), "city": [f"city {i % 40}" for i in range(members)]}),
        "items": pa.table(
            {
                "item_id": np.arange(items),
                "title": [f"thing number {i} of a shop" for i in range(items)],
                "price": rng.random(items) * 100,
            }
        ),
        "events": pa.table(
            {
                "member_id": draw(members),
                "item_id": draw(items),
                "action": actions,
                "time": pa.array(times).cast(pa.timestamp("us", "UTC")),
            }
        ),
    }
    folder.mkdir()
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    (folder / CARD).write_text(CARD_TEXT)


def measure(work: Callable[..., object], folder: Path, loaded: bool | None) -> tuple[float, float]:
    """CPU seconds of the work in a process of its own, without loading the tables if `loaded`; and its peak in GB. With
    None, the work reads the folder itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (work, folder, loaded))


def _measure(work: Callable[..., object], folder: Path, loaded: bool | None) -> tuple[float, float]:
    start_time = time.process_time()
    dataset = folder if loaded is None else Dataset.load(folder)
    if loaded:
        start_time = time.process_time()
    work(dataset)
    seconds = time.process_time() - start_time
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def load(dataset: Dataset) -> None:
    """Reads and checks the tables."""


def fit_scales(dataset: Dataset) -> None:
    """Fits the scales of attributes and facts on the training period."""
    Scales.fit(dataset, SHOWN.boundaries(dataset)[0])


def sample_shown(dataset: Dataset) -> None:
    """Chooses and builds 1,000 test examples whose negatives were shown."""
    sample_examples(dataset, SHOWN, "test", 1000)


def sample_negatives(dataset: Dataset) -> None:
    """Chooses and builds 1,000 test examples with sampled negatives."""
    sample_examples(dataset, SAMPLED, "test", 1000)


def render(dataset: Dataset) -> None:
    """Renders 1,000 prompts with facts."""
    scales = Scales.fit(dataset, SHOWN.boundaries(dataset)[0])
    verbalizer = Verbalizer(dataset, scales, Tokenizer.byte_level(), 2000)
    for example in sample_examples(dataset, SHOWN, "test", 1000):
        verbalizer.prompt(SHOWN, example, "compact")


def read_member(folder: Path) -> None:
    """Reads what a prompt with 500 items says of one member."""
    excerpt = load_excerpt(folder, ["7"])
    example = example_at(excerpt, SHOWN, excerpt.member_row("7"))
    read_candidates(excerpt, SHOWN, [example.select(np.arange(0, len(example.candidates), 400)[:500])])


def rank_all(dataset: Dataset) -> None:
    """Makes the example that ranks every item for a member."""
    example_at(dataset, SHOWN, 0)


WORKS = {
    "one member and 500 items": (read_member, None),
    "load and check": (load, False),
    "fit scales and facts": (fit_scales, True),
    "1,000 examples, shown": (sample_shown, True),
    "1,000 examples, sampled negatives": (sample_negatives, True),
    "1,000 prompts with facts": (render, True),
    "all items for a member": (rank_all, True),
}


def measure_preparation(folder: Path, examples: int) -> str:
    """Prompts a second that one core prepares, and that all do, of so many examples; processes and tables included."""
    (folder / "task.yaml").write_text(SHOWN_TEXT)
    (folder / "model.yaml").write_text(MODEL)
    values = {
        "name": "scale",
        "dataset": str(folder),
        "tasks": [str(folder / "task.yaml")],
        "model": str(folder / "model.yaml"),
        "tokenizer": {"vocab_size": 512},
        "prompts": {"styles": {"compact": 1}, "max_tokens": 1000},
        "train": {"steps": 1, "batch_size": 1, "seq_len": 2048},
        "stages": {"big": {"do": "sft", "data": {"max_examples": examples}}},
    }
    run = Run(Recipe.of(values, "benchmark"), folder / "run")
    (run.folder / "prepare").mkdir(parents=True)
    prepare(run, run.folder / "prepare")
    rates = []
    for name, write in (("one", write_here), ("all", write_on_all_cores)):
        preparation = Preparation(run.recipe, run.folder, run.recipe.stages["big"].data, 2048, run.folder / name)
        start_time = time.perf_counter()
        write(preparation, run)
        rates.append(examples / (time.perf_counter() - start_time))
    return f"{rates[0]:,.0f} on one core, {rates[1]:,.0f} on all: {rates[1] / rates[0]:.2f} times"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["100k", "1m"], choices=[*SIZES])
    parser.add_argument("--examples", type=int, default=20_000, help="that are prepared as prompts")
    args = parser.parse_args()
    sizes = args.sizes
    print(f"{'CPU seconds / GB':36}" + "".join(f"{size:>16}" for size in sizes))
    with tempfile.TemporaryDirectory() as scratch:
        folders = {size: Path(scratch) / size for size in sizes}
        for size, folder in folders.items():
            make_tables(folder, *SIZES[size])
        for name, (work, loaded) in WORKS.items():
            cells = [measure(work, folder, loaded) for folder in folders.values()]
            print(f"{name:36}" + "".join(f"{f'{seconds:.1f} / {peak:.2f}':>16}" for seconds, peak in cells), flush=True)
        for size, folder in folders.items():
            print(f"prompts a second, of {size}: {measure_preparation(folder, args.examples)}", flush=True)


if __name__ == "__main__":
    main()
