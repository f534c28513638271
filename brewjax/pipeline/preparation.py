"""What a stage trains on, written in units: a partition of the data makes a shard, by the same function everywhere.

Units are worked on by all cores of all hosts (`workers.py`), or by Beam (`beam.py`), in any order. None is written
twice, so a run that was killed goes on with the units that are missing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from brewjax import distributed
from brewjax.bundle.bundle import Bundle
from brewjax.console import plain_console
from brewjax.data.records.contrastive import ContrastiveConfig, ItemTableWriter, LookUp, contrastive_records
from brewjax.data.records.example_table import ExampleTable
from brewjax.data.records.preferences import AlignConfig, align_records
from brewjax.data.records.pretrain import PretrainConfig, domain_texts, general_files, general_texts, pretrain_records
from brewjax.data.records.provenance import Provenance
from brewjax.data.records.sft import Predict, SftConfig, sft_records
from brewjax.data.records.shards import Record, TableWriter, finish_shards, is_written, write_shard
from brewjax.data.records.soft_labels import SoftLabelWriter
from brewjax.data.tables.partition import Partition
from brewjax.data.tasks.examples import SplitExamples, sample_examples
from brewjax.evaluate.out_of_fold import LIGHTGBM, OutOfFoldTable, PredictionTable
from brewjax.evaluate.ranker_scores import score_records
from brewjax.pipeline.context import Run, RunSurface, RunTask
from brewjax.pipeline.recipe import Recipe
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.mining import mine_negatives

DataConfig = SftConfig | AlignConfig | PretrainConfig | ContrastiveConfig
GENERAL = "general"  # the source with general text
RECORDS_PER_SHARD, MAX_SHARDS = 1_000, 4_096  # about; a shard takes seconds, or minutes where there are billions


class Source(NamedTuple):
    """Records of one origin: of a task, or a kind of text.

    Attributes:
      size: how many records it has, about.
      records: makes the records of a partition.
      table: what a shard keeps beside them.
    """

    size: int
    records: Callable[[Partition], Iterator[tuple[Record, Provenance]]]
    table: Callable[[], TableWriter] = SoftLabelWriter


class Unit(NamedTuple):
    """A partition of a source, by the source's name."""

    source: str
    partition: Partition


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Writes what a stage trains on: a folder of shards for each source. All that a worker elsewhere needs to know.

    Attributes:
      recipe: the run's.
      run_folder: the run's, where tokenizer and scales are.
      config: the stage's data.
      seq_len: tokens of a record at most.
      folder: where the folders of shards go.
      records_per_shard: about.
    """

    recipe: Recipe
    run_folder: Path
    config: DataConfig
    seq_len: int
    folder: Path
    records_per_shard: int = RECORDS_PER_SHARD

    def sources(self, run: Run) -> dict[str, Source]:
        """The sources by name."""
        prompts, config = run.recipe.prompts, self.config
        if isinstance(config, ContrastiveConfig):
            task = config.choose(run.tasks)
            ranked = ExampleTable(self._ranked(task.name)).look_up if config.ranker else None
            make = functools.partial(
                contrastive_records,
                task.surface.verbalizer,
                task.task,
                prompts,
                config,
                mined=self._mined_items(config, task),
                ranked=ranked,
            )
            return {task.name: Source(_size(config, task, config.repeats), make, ItemTableWriter)}
        if isinstance(config, SftConfig):
            return {
                name: Source(_size(config, task, config.repeats), self._sft_records(run, task, config))
                for name, task in run.tasks.items()
            }
        if isinstance(config, AlignConfig):
            return {
                name: Source(
                    _size(config, task),
                    functools.partial(align_records, task.surface.verbalizer, task.task, prompts, config),
                )
                for name, task in aligned_tasks(run, config).items()
            }
        sources = {domain_name(surface): self._domain(surface, config) for surface in run.surfaces.values()}
        if config.general_text:
            folder, tokenizer = Path(config.general_text), run.tokenizer
            general = lambda part: pretrain_records(general_texts(folder, part), tokenizer)  # noqa: E731
            sources[GENERAL] = Source(len(general_files(folder)), general)
        return sources

    def _sft_records(
        self, run: Run, task: RunTask, config: SftConfig
    ) -> Callable[[Partition], Iterator[tuple[Record, Provenance]]]:
        predict, verbalizer, prompts = self._soft_labels(task, config), task.surface.verbalizer, run.recipe.prompts
        return lambda part: sft_records(verbalizer, task.task, prompts, config, predict, part, task.name)

    def _domain(self, surface: RunSurface, config: PretrainConfig) -> Source:
        dataset, tokenizer = surface.dataset, surface.run.tokenizer
        verbalizer, until = surface.verbalizer, surface.until
        domain = lambda part: pretrain_records(domain_texts(verbalizer, until, config, part), tokenizer)  # noqa: E731
        return Source(config.repeats * (len(dataset.items) + len(dataset.members)), domain)

    def predict_soft_labels(self, run: Run) -> None:
        """Trains LightGBM and writes its probabilities of all examples, where the data asks for them."""
        if not isinstance(self.config, SftConfig) or self.config.soft_labels != LIGHTGBM:
            return
        for name, (surface, task) in run.tasks.items():
            if not (path := self._predictions(name)).exists():
                samples = [
                    sample_examples(surface.dataset, task, "train", self.config.max_examples, self.config.seed + repeat)
                    for repeat in range(self.config.repeats)
                ]
                path.parent.mkdir(parents=True, exist_ok=True)
                OutOfFoldTable.save(path, surface.dataset, task, samples)

    def mine_negatives(self, run: Run) -> None:
        """Finds hard negatives in the index of an encoder, where the data asks for them."""
        if isinstance(self.config, ContrastiveConfig) and (mined := self.config.mined_negatives):
            task = self.config.choose(run.tasks)
            encoder = Encoder.load(run.model(mined.encoder))
            mine_negatives(encoder, task.surface.dataset, task.task, self.config, mined, self._mined(task.name))

    def score_records(self, run: Run) -> None:
        """Scores the records' items with a ranker, where the data asks for it."""
        if isinstance(self.config, ContrastiveConfig) and self.config.ranker:
            task = self.config.choose(run.tasks)
            ranker, mined = Bundle.load(run.model(self.config.ranker)), self._mined_items(self.config, task)
            score_records(ranker, task.surface.dataset, task.task, self.config, mined, self._ranked(task.name))

    def _mined_items(self, config: ContrastiveConfig, task: RunTask) -> LookUp | None:
        return ExampleTable(self._mined(task.name)).look_up if config.mined_negatives else None

    def _mined(self, name: str) -> Path:
        return self.folder / f"{name}.mined"

    def _ranked(self, name: str) -> Path:
        return self.folder / f"{name}.ranked"

    def _predictions(self, name: str) -> Path:
        return self.folder / f"{name}.lightgbm.npz"

    def _soft_labels(self, task: RunTask, config: SftConfig) -> Predict | None:
        """What gives the soft labels of a task's examples, if the data asks for any."""
        if config.soft_labels is None:
            return None
        if config.soft_labels == LIGHTGBM:
            return OutOfFoldTable(self._predictions(task.name)).look_up
        return PredictionTable(task.surface.dataset, task.task, Path(config.soft_labels)).look_up

    def num_shards(self, sources: Mapping[str, Source]) -> dict[str, int]:
        """How many partitions each source is cut into."""
        return {
            name: min(MAX_SHARDS, -(-source.size // self.records_per_shard) or 1) for name, source in sources.items()
        }

    def missing(self, sources: Mapping[str, Source]) -> list[Unit]:
        """The units whose shards are not there."""
        units = [
            Unit(name, Partition(index, count))
            for name, count in self.num_shards(sources).items()
            for index in range(count)
        ]
        return [unit for unit in units if not is_written(self.folder / unit.source, unit.partition)]

    def write(self, source: Source, unit: Unit) -> None:
        """Writes the shard of a unit: what all workers do, wherever they are."""
        write_shard(
            self.folder / unit.source, unit.partition, source.records(unit.partition), self.seq_len, source.table()
        )

    def finish(self, num_shards: Mapping[str, int]) -> None:
        """Writes and prints the counts of each source's folder, whose shards are complete."""
        for name, count in num_shards.items():
            counts = finish_shards(self.folder / name, count)
            if counts["targets"]:
                each = f"{counts['targets']:,} targets, {counts['tokens'] / counts['targets']:.0f} tokens a target"
            else:
                kinds = (kind for kind in ("positives", "negatives", "tokens") if kind in counts)
                each = ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds)
            plain_console().print(f"{name}: {counts['records']:,} records, {each}")


def _size(config: SftConfig | AlignConfig | ContrastiveConfig, task: RunTask, repeats: int = 1) -> int:
    examples = len(SplitExamples.of(task.surface.dataset, task.task, "train"))
    return repeats * (examples if config.max_examples is None else min(examples, config.max_examples))


def aligned_tasks(run: Run, config: AlignConfig) -> dict[str, RunTask]:
    """The tasks whose preferences are trained on, by name."""
    return {name: task for name, task in run.tasks.items() if not config.tasks or name in config.tasks}


def domain_name(surface: RunSurface) -> str:
    """The source with the text of a surface's tables."""
    return surface.prefixed("domain")


WriteUnits = Callable[[Preparation, Run], dict[str, int]]  # writes what is missing; the number of shards of each source


def write_data(run: Run, config: DataConfig, seq_len: int, write_units: WriteUnits, folder: Path) -> None:
    """What stages train on, into `folder`: the work of a step, of all processes of a run."""
    preparation = Preparation(run.recipe, run.folder, config, seq_len, folder)
    distributed.run_on_process_zero(lambda: preparation.predict_soft_labels(run))
    distributed.run_on_process_zero(lambda: preparation.mine_negatives(run))
    distributed.run_on_process_zero(lambda: preparation.score_records(run))
    num_shards, *_ = distributed.run_on_every_process(lambda: write_units(preparation, run))
    distributed.run_on_process_zero(lambda: preparation.finish(num_shards))
