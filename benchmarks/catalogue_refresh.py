"""What a refresh of a live catalogue costs, as a multiple of reading its dataset from disk in the same process.

`python -m benchmarks.catalogue_refresh 100k 1m` makes synthetic tables of so many events and prints, for each, the CPU
seconds of reading them; and as multiples of these what making the catalogue ready takes, at a start, and in refreshes
with one and with 1,000 new events (medians of five). `similar`: with a fact of similar items, fitted anew each time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.data_scale import CARD_TEXT, SHOWN, SIZES, make_tables
from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.changes import read_rows

FACTS = {"counts": "", "similar": "  pairs: [{name: near, together: [viewed]}]\n"}
REPEATS = 5


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The median CPU seconds of some work."""
    spent = []
    for _ in range(repeats):
        start_time = time.process_time()
        work()
        spent.append(time.process_time() - start_time)
    return statistics.median(spent)


def make_change(dataset: Dataset, count: int) -> pb.Change:
    """Events of members and items of the dataset, a second apart, after all that are there."""
    rng = np.random.default_rng(1)
    change = pb.Change()
    for number in range(count):
        event = change.events.add(
            member=str(rng.integers(len(dataset.members))), item=str(rng.integers(len(dataset.items))), action="viewed"
        )
        event.time.FromMicroseconds(dataset.last_event_time + 1_000_000 * (number + 1))
    return change


def measure(folder: Path) -> tuple[float, float, list[float]]:
    """CPU seconds of reading a folder, of making its catalogue ready, and of refreshes with 1 and 1,000 events."""
    loading = seconds(lambda: Dataset.load(folder), REPEATS)
    dataset = Dataset.load(folder)
    surface = Surface.fit("shop", dataset, [SHOWN])
    tokenizer = Tokenizer.byte_level()
    model = ModelConfig(name="none", d_model=16, layers=1, heads=1, kv_heads=1, head_dim=16, d_ff=16, vocab_size=300)
    bundle = Bundle(model, {}, tokenizer, PromptConfig(), {"shop": surface})

    def serve(catalogue: Catalogue) -> Catalogue:
        catalogue.warm_up(bundle, surface)
        return catalogue

    catalogues: list[Catalogue] = []
    starting = seconds(lambda: catalogues.append(serve(Catalogue(dataset))))
    (catalogue,) = catalogues
    refreshes = []
    for count in (1, 1_000):
        change = make_change(dataset, count)

        def refresh(change: pb.Change = change) -> None:
            rows = read_rows(change, dataset, catalogue.member_rows.__contains__, catalogue.item_rows.__contains__)
            serve(catalogue.extended([rows]))

        refreshes.append(seconds(refresh, REPEATS))
    return loading, starting, refreshes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["100k", "1m"], choices=[*SIZES])
    parser.add_argument("--facts", nargs="*", default=[*FACTS], choices=[*FACTS])
    args = parser.parse_args()
    print(f"{'events':>8}{'facts':>10}{'reading, s':>12}{'start':>10}{'1 event':>10}{'1,000':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        for size in args.sizes:
            folder = Path(scratch) / size
            make_tables(folder, *SIZES[size])
            for facts in args.facts:
                card = CARD_TEXT if facts == "counts" else CARD_TEXT[: CARD_TEXT.index("  pairs:")] + FACTS[facts]
                (folder / CARD).write_text(card)
                loading, starting, refreshes = measure(folder)
                multiples = "".join(f"{spent / loading:>9.2f}x" for spent in (starting, *refreshes))
                print(f"{size:>8}{facts:>10}{loading:>12.2f}{multiples}", flush=True)


if __name__ == "__main__":
    main()
