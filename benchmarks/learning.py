"""What a step teaches under different settings: short runs on the same records in the same order.

`python -m benchmarks.learning configs/recipes/demo.yaml optimizer.method=adamw optimizer.method=muon` trains the first
stage of a recipe once for each setting of its `train`, for as many steps as `--steps` says, and prints the mean loss of
each fifth of the run. Several keys of one setting are joined by commas.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from brewjax.pipeline.context import Run
from brewjax.pipeline.recipe import Recipe, TrainedStage
from brewjax.pipeline.stages import run_recipe, train_stage
from brewjax.train.metrics_writer import METRICS, read_metrics

PARTS = 5


def train_with(path: str, name: str, setting: str, steps: int, prepared: Path, folder: Path) -> tuple[list[float], int]:
    """Mean loss of each part of a run of the stage `name` with a setting, and its seconds.

    Args:
      prepared: a run's folder with the stage's data.
      folder: for the model.
    """
    keys = [*setting.split(","), f"steps={steps}"]
    recipe = Recipe.load(path, [f"stages.{name}.train.{key}" for key in keys if key])
    start = time.perf_counter()
    train_stage(Run(recipe, prepared), recipe.stages[name], prepared / f"data-{name}", folder)  # type: ignore[arg-type]
    losses = [row["loss"] for row in read_metrics(folder / METRICS)]
    return [float(np.mean(part)) for part in np.array_split(losses, PARTS)], round(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="+", help="KEY=VALUE[,KEY=VALUE]; '' for the recipe as it is")
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    parser.add_argument("--prepared", type=Path, help="a folder of `brewjax run`, whose data is used")
    arguments = parser.parse_args()
    stages = Recipe.load(arguments.recipe).stages.items()
    name = next(name for name, stage in stages if isinstance(stage, TrainedStage))
    with tempfile.TemporaryDirectory() as scratch:
        prepared = arguments.prepared or Path(scratch) / "prepared"
        run_recipe(Recipe.load(arguments.recipe), prepared, allow_code_mismatch=True, until=f"data-{name}")
        print("| setting | " + " | ".join(f"loss, part {part + 1}" for part in range(PARTS)) + " | seconds |")
        print("|---|" + "---|" * (PARTS + 1))
        for index, setting in enumerate(arguments.settings):
            folder = Path(scratch) / str(index)
            losses, seconds = train_with(arguments.recipe, name, setting, arguments.steps, prepared, folder)
            print(f"| {setting or 'as it is'} | " + " | ".join(f"{loss:.4f}" for loss in losses) + f" | {seconds} |")


if __name__ == "__main__":
    main()
