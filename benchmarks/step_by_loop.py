"""A training step with XLA's loop in place of the head's kernels, by the compiler of TPUs that are not there.

    python -m benchmarks.step_by_loop configs/recipes/scale/brew-mini.yaml v5e-16x16 v6e-16x16

What `brewjax compile` would say of it, with the loop's body as often as it runs if every token has a target. With the
kernels `brewjax compile` has the step without them, and `python -m benchmarks.heads` has them. It is no measurement.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from rich.console import Console
from rich.table import Table

from brewjax.aot.hlo import read
from brewjax.aot.program import training_step
from brewjax.aot.report import GIB
from brewjax.aot.topology import topology
from brewjax.model.config import ModelConfig
from brewjax.model.sharding import data_parallel_size
from brewjax.pipeline.recipe import load_plan
from pallas_kernels import cross_entropy

CHUNK = 2048  # tokens of the loop on a TPU


def main(recipe: Path, names: list[str]) -> None:
    plan = load_plan(recipe, ())
    model, config = ModelConfig.load(plan.model), plan.train
    columns = ("devices", "peak, GiB", "operations, ms", "the loop's, ms", "utilisation at most")
    table = Table(*columns, title=f"a training step of {model.name} by XLA's loop")
    for name in names:
        target = topology(name)
        mesh = config.mesh.build(target.devices)
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            mock.patch.object(cross_entropy, "choose_implementation", return_value="xla"),
        ):
            work = training_step(model, config, mesh)
            compiled = work.traced.lower().compile()
        turns = -(-config.batch_size * config.seq_len // data_parallel_size(mesh) // CHUNK)
        once, all_turns = (read(compiled.as_text(), n).cycles.total() / target.chip.clock for n in (1, turns))
        memory, speed = compiled.memory_analysis(), len(target.devices) * target.chip.flops
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        seconds = all_turns + work.kernel_flops / speed
        loop = (all_turns - once) / max(1, turns - 1) * turns
        table.add_row(
            name,
            f"{peak / GIB:.2f}",
            f"{seconds * 1e3:,.0f}",
            f"{loop * 1e3:,.0f}",
            f"{work.flops / speed / seconds:.1%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
