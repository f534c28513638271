"""Prepares data on Apache Beam: the units and the function of `preparation.py`, on whatever Beam runs on.

Beam carries units, not events: each worker reads the datasets once and makes whole shards of them. Datasets and run
folder are therefore on a file system that all workers mount at the same path. Beam's own pins do not fit brewjax's;
both live together in the environment of `constraints-beam.txt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from brewjax.config import ConfigError
from brewjax.pipeline.context import Run
from brewjax.pipeline.preparation import Preparation, Source, Unit, WriteUnits
from brewjax.pipeline.recipe import RecipeSurface

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError:
    raise ConfigError(
        "--runner needs Apache Beam, in an environment of its own: pip install -c constraints-beam.txt 'brewjax[beam]'"
    ) from None


def write_on_beam(options: Sequence[str]) -> WriteUnits:
    """Makes what writes training data on Apache Beam.

    Args:
      options: Beam's own, e.g. `--runner=DataflowRunner --region=..`.

    Returns:
      A function of a `Preparation` and its run, which writes the shards that are missing.
    """

    def write(preparation: Preparation, run: Run) -> dict[str, int]:
        sources = preparation.sources(run)
        units = preparation.missing(sources)
        if units:
            everywhere = _everywhere(preparation, run)
            with beam.Pipeline(options=PipelineOptions([*options])) as pipeline:
                _ = pipeline | beam.Create(units) | beam.Reshuffle() | beam.ParDo(_WriteUnit(everywhere))
        return preparation.num_shards(sources)

    return write


class _WriteUnit(beam.DoFn):  # type: ignore[misc]  # Beam is not installed where types are checked
    """Writes units. A worker reads the datasets once for all its units."""

    def __init__(self, preparation: Preparation):
        self._preparation = preparation
        self._sources: dict[str, Source] = {}

    def setup(self) -> None:
        run = Run(self._preparation.recipe, self._preparation.run_folder)
        self._run, self._sources = run, self._preparation.sources(run)

    def process(self, unit: Unit) -> Iterable[None]:
        self._preparation.write(self._sources[unit.source], unit)
        self._run.overlong.print()
        return ()


def _everywhere(preparation: Preparation, run: Run) -> Preparation:
    """The same, with paths that do not depend on a worker's directory."""
    absolute = lambda path: str(Path(path).resolve())  # noqa: E731
    recipe, config = preparation.recipe, preparation.config
    surfaces = {
        name: RecipeSurface(
            dataset=absolute(surface.config.dataset),
            tasks=tuple(map(absolute, surface.config.tasks)),
            weight=surface.config.weight,
        )
        for name, surface in run.surfaces.items()
    }
    update = {"surfaces": surfaces, "dataset": None, "tasks": (), "model": absolute(recipe.model)}
    recipe = recipe.model_copy(update=update)
    paths = {name: absolute(path) for name in ("general_text",) if (path := getattr(config, name, None)) is not None}
    return dataclasses.replace(
        preparation,
        recipe=recipe,
        run_folder=preparation.run_folder.resolve(),
        config=config.model_copy(update=paths),
        folder=preparation.folder.resolve(),
    )
