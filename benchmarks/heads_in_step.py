"""What the head's kernels do to a whole training step, by the compiler of TPUs that are not there.

    python -m benchmarks.heads_in_step configs/recipes/scale/brew-mini.yaml v5e-16x16 v6e-16x16

The step of `brewjax compile`, with the kernels and with XLA's loop, as if every token had a target. Of each: the peak
of a device's memory; milliseconds of the compiler's estimates for its own operations, with the loop's body as often as
it runs, and attention at the chip's peak; of the head's kernels, for which it has none, the least time of
`benchmarks.heads`; and the utilisation that their sum allows if collectives take no time. It is no measurement.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

from benchmarks.heads import Chip, train  # isort: skip  # sets up libtpu

import jax
from jax.experimental import pallas as pl
from rich.console import Console

from benchmarks.attention_static import table
from benchmarks.bundles import costs_of
from brewjax.aot.program import training_step
from brewjax.aot.report import GIB
from brewjax.aot.topology import topology
from brewjax.model.config import ModelConfig
from brewjax.model.sharding import data_parallel_size
from brewjax.pipeline.recipe import load_plan
from pallas_kernels import cross_entropy

CHUNK = 2048  # tokens of XLA's loop on a TPU


def main(recipe: Path, names: list[str]) -> None:
    plan = load_plan(recipe, ())
    model, config = ModelConfig.load(plan.model), plan.train
    columns = ("devices", "head by", "peak, GiB", "operations, ms", "head's kernels, ms", "sum, ms", "utilisation <=")
    shown = table(f"a training step of {model.name}", columns)
    for name in names:
        target = topology(name)
        chip = Chip(name.partition("-")[0])
        mesh = config.mesh.build(target.devices)
        N = config.batch_size * config.seq_len // data_parallel_size(mesh)
        for by in ("tpu", "xla"):
            with (
                jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
                mock.patch.object(cross_entropy, "choose_implementation", lambda *_, by=by: by),
            ):
                work = training_step(model, config, mesh)
                compiled = work.traced.lower().compile()
            cost = costs_of(compiled.as_text(), pl.cdiv(N, CHUNK))
            memory = compiled.memory_analysis()
            peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
            speed = len(target.devices) * target.chip.flops
            operations = (cost.estimate / target.chip.clock + work.kernel_flops / speed) * 1e3
            kernels = train(chip, N, model.d_model, "tpu").least if by == "tpu" else 0.0
            total = operations + kernels
            row = (name, "kernels" if by == "tpu" else "XLA's loop", f"{peak / GIB:.2f}", f"{operations:,.0f}")
            row = *row, f"{kernels:.0f}", f"{total:,.0f}", f"{work.flops / speed * 1e3 / total:.1%}"
            shown.add_row(*row)
            print(*row, file=sys.stderr, flush=True)  # compiling takes minutes
    Console(width=120).print(shown)


if __name__ == "__main__":
    assert sys.argv[2:], __doc__
    main(Path(sys.argv[1]), sys.argv[2:])
