"""What the TPU compiler says of the search kernel, without a TPU: bundles of a step beside the time of its bytes.

    python -m benchmarks.search_static [v5e v6e tpu7x]

A step reads 2,048 rows, once for all queries. A bundle is issued in a cycle at best, so a step takes the bundles or the
time of the bytes, whichever is more, at nominal clocks and bandwidths; a search takes the steps of a device's share of
100M rows of 256 numbers. It ranks programs; it is no measurement.
"""

from __future__ import annotations

import itertools
import sys

from benchmarks.heads import BF16, CHIPS, F32, Chip  # isort: skip  # sets up libtpu

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks.attention_static import table
from benchmarks.bundles import kernel_bundles
from pallas_kernels.search import BINS, Filter, Rows, top_k

D = 256
ROWS, DEVICES = 100_000_000, 16
QUERIES = (1, 8, 32)


def main(chips: list[str]) -> None:
    shape = jax.ShapeDtypeStruct
    columns = ("rows", "queries", "bundles", "cycles of its bytes", "ratio", "100M on 16, ms", "temporary, MB")
    for name in chips:
        chip, result = Chip(name), table(f"{name}: a step of {BINS:,} rows of {D}", columns)
        for dtype, queries in itertools.product((F32, BF16), QUERIES):
            compiled = chip.compile(
                lambda q, vectors, bits, required, banned: top_k(
                    q, Rows(vectors, bits), Filter(required, banned), 256, "tpu"
                ),
                shape((queries, D), F32),
                shape((64 * BINS, D), dtype),
                *(shape(sizes, jnp.int32) for sizes in ((64 * BINS,), (queries,), (queries,))),
            )
            bundles = sum(kernel_bundles("search_top_k").values())
            cycles = BINS * (D * jnp.dtype(dtype).itemsize + 4) / chip.info.mem_bw_bytes_per_second * chip.clock
            milliseconds = chip.cycles_ms(max(bundles, cycles) * ROWS / DEVICES / BINS)
            temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
            cells = (
                f"{bundles:,}",
                f"{cycles:,.0f}",
                f"{bundles / cycles:.2f}",
                f"{milliseconds:.1f}",
                f"{temporary:.1f}",
            )
            result.add_row(jnp.dtype(dtype).name, str(queries), *cells)
        Console().print(result)


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name in CHIPS] or ["v5e", "v6e", "tpu7x"])
