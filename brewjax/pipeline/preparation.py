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
from brewjax.console import plain_console
from brewjax.data.records.contrastive import ContrastiveConfig, ItemTableWriter, contrastive_records
from brewjax.data.records.preferences import AlignConfig, align_records
from brewjax.data.records.pretrain import PretrainConfig, domain_texts, general_files, general_texts, pretrain_records
from brewjax.data.records.provenance import Provenance
from brewjax.data.records.sft import Predict, SftConfig, sft_records
from brewjax.data.records.shards import Record, TableWriter, finish_shards, is_written, write_shard
from brewjax.data.records.soft_labels import SoftLabelWriter
from brewjax.data.tables.partition import Partition
from brewjax.data.tasks.examples import SplitExamples, sample_examples
from brewjax.data.tasks.task import Task
from brewjax.evaluate.out_of_fold import LIGHTGBM, OutOfFoldTable, PredictionTable
from brewjax.pipeline.context import Run
from brewjax.pipeline.recipe import Recipe

DataConfig = SftConfig | AlignConfig | PretrainConfig | ContrastiveConfig
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
      run_folder: the run's, where tokenizer and percentiles are.
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
        verbalizer, prompts, config = run.verbalizer, run.recipe.prompts, self.config
        examples = lambda task: len(SplitExamples.of(run.dataset, task, "train"))  # noqa: E731
        match config:
            case ContrastiveConfig():
                task = config.choose(run.tasks)
                make = functools.partial(contrastive_records, verbalizer, task, prompts, config)
                return {task.name: Source(_size(config, examples(task), config.repeats), make, ItemTableWriter)}
            case SftConfig():
                return {
                    task.name: Source(
                        _size(config, examples(task), config.repeats),
                        functools.partial(
                            sft_records, verbalizer, task, prompts, config, self._soft_labels(run, task, config)
                        ),
                    )
                    for task in run.tasks
                }
            case AlignConfig():
                return {
                    task.name: Source(
                        _size(config, examples(task)),
                        functools.partial(align_records, verbalizer, task, prompts, config),
                    )
                    for task in aligned_tasks(run, config)
                }
        until, tokenizer = run.tasks[0].boundaries(run.dataset)[0], run.tokenizer
        domain = lambda part: pretrain_records(domain_texts(verbalizer, until, config, part), tokenizer)  # noqa: E731
        size = config.repeats * (len(run.dataset.items) + len(run.dataset.members))
        sources = {"domain": Source(size, domain)}
        if config.general_text:
            folder = Path(config.general_text)
            general = lambda part: pretrain_records(general_texts(folder, part), tokenizer)  # noqa: E731
            sources["general"] = Source(len(general_files(folder)), general)
        return sources

    def predict_soft_labels(self, run: Run) -> None:
        """Trains LightGBM and writes its probabilities of all examples, where the data asks for them."""
        if not isinstance(self.config, SftConfig) or self.config.soft_labels != LIGHTGBM:
            return
        for task in run.tasks:
            if not self._predictions(task).exists():
                samples = [
                    sample_examples(run.dataset, task, "train", self.config.max_examples, self.config.seed + repeat)
                    for repeat in range(self.config.repeats)
                ]
                OutOfFoldTable.save(self._predictions(task), run.dataset, task, samples)

    def _predictions(self, task: Task) -> Path:
        return self.folder / f"{task.name}.lightgbm.npz"

    def _soft_labels(self, run: Run, task: Task, config: SftConfig) -> Predict | None:
        """What gives the soft labels of a task's examples, if the data asks for any."""
        if config.soft_labels is None:
            return None
        if config.soft_labels == LIGHTGBM:
            return OutOfFoldTable(self._predictions(task)).look_up
        return PredictionTable(run.dataset, task, Path(config.soft_labels)).look_up

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


def _size(config: SftConfig | AlignConfig | ContrastiveConfig, examples: int, repeats: int = 1) -> int:
    return repeats * (examples if config.max_examples is None else min(examples, config.max_examples))


def aligned_tasks(run: Run, config: AlignConfig) -> list[Task]:
    """The tasks whose preferences are trained on."""
    return [task for task in run.tasks if not config.tasks or task.name in config.tasks]


WriteUnits = Callable[[Preparation, Run], dict[str, int]]  # writes what is missing; the number of shards of each source


def write_data(run: Run, config: DataConfig, seq_len: int, write_units: WriteUnits, folder: Path) -> None:
    """What stages train on, into `folder`: the work of a step, of all processes of a run."""
    preparation = Preparation(run.recipe, run.folder, config, seq_len, folder)
    distributed.run_on_process_zero(lambda: preparation.predict_soft_labels(run))
    num_shards, *_ = distributed.run_on_every_process(lambda: write_units(preparation, run))
    distributed.run_on_process_zero(lambda: preparation.finish(num_shards))
