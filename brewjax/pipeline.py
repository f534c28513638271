"""A recipe run stage by stage: prepare, train, evaluate, baselines, report. What is done is not done again."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console

from brewjax import hosts
from brewjax.config import ConfigError
from brewjax.data.dataset import CARD, Dataset
from brewjax.data.examples import Example, build_examples, sample_examples
from brewjax.data.loader import write_shards
from brewjax.data.numbers import Percentiles
from brewjax.data.task import Task, load_tasks
from brewjax.data.tokenizer import Tokenizer
from brewjax.data.tokens import EncodedPrompt
from brewjax.data.training import Note, SftConfig, sft_records
from brewjax.data.verbalize import Verbalizer
from brewjax.evaluate.baselines import LightGBM, popularity
from brewjax.evaluate.predict import predict
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.report import print_results, write_report
from brewjax.evaluate.results import compare
from brewjax.model.config import ModelConfig
from brewjax.model.params import abstract_params, count
from brewjax.recipe import Recipe
from brewjax.scoring.bundle import PERCENTILES, TOKENIZER, Bundle, PercentileScale
from brewjax.train.loop import train
from brewjax.train.metrics import METRICS, read_metrics
from brewjax.train.objectives import supervised

RECORD = "stage.json"
KILOBYTE = 1 if sys.platform == "darwin" else 1024  # what the system counts a process's memory in, in bytes
TOKENIZER_EXAMPLES = 400  # prompts of each task that a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe and the folder of its outputs; what several stages need is read once."""

    recipe: Recipe
    folder: Path

    @cached_property
    def dataset(self) -> Dataset:
        return Dataset.load(self.recipe.dataset)

    @property
    def task_files(self) -> list[str]:
        """The recipe's patterns filled in; one that fits no file is left as it is, to be refused by its name."""
        return [path for pattern in self.recipe.tasks for path in sorted(glob(pattern)) or [pattern]]

    @cached_property
    def tasks(self) -> list[Task]:
        """The recipe's tasks, checked; all must split time alike, or one's test would be another's training."""
        tasks = load_tasks(self.task_files, self.dataset)
        for task in tasks[1:]:
            if task.boundaries(self.dataset) != tasks[0].boundaries(self.dataset):
                raise task.error(f"not the split of task '{tasks[0].name}'; tasks trained together share one", "split")
        return tasks

    def asked(self, task: Task) -> list[Example]:
        """The examples of the test period that model and baselines answer."""
        return sample_examples(self.dataset, task, "test", self.recipe.evaluate.max_examples)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "prepare" / TOKENIZER)

    @property
    def model(self) -> ModelConfig:
        """The model's config, with the tokenizer's vocabulary where it names none."""
        config = ModelConfig.load(self.recipe.model)
        size = self.tokenizer.vocab_size
        longest = self.recipe.prompts.max_tokens
        if config.max_context is not None and longest > config.max_context:
            raise config.error(
                f"{config.max_context} is less than the recipe's prompts.max_tokens, {longest}", "max_context"
            )
        if not config.vocab_size:
            return config.model_copy(update={"vocab_size": size})
        if config.vocab_size < size:
            raise config.error(f"{config.vocab_size} is too small for the tokenizer's {size} tokens", "vocab_size")
        return config


def prepare(run: Run, folder: Path) -> None:
    """Tokenizer, percentiles and training shards."""
    until = run.tasks[0].boundaries(run.dataset)[0]
    percentiles = Percentiles.fit(run.dataset, until)
    PercentileScale(dataset=run.dataset.card.name, quantiles=percentiles.quantiles).save(folder / PERCENTILES)
    config = run.recipe.tokenizer
    tokenizer = Tokenizer.load(config.path) if config.path else _train_tokenizer(run, percentiles)
    for task in run.tasks:
        task.check_words(tokenizer)
    tokenizer.save(folder / TOKENIZER)
    verbalizer = Verbalizer(run.dataset, percentiles, tokenizer, run.recipe.prompts.max_tokens)
    examples = _training_examples(run, verbalizer)
    counts = write_shards(folder / "shards", examples, run.recipe.train.row_tokens)
    per_question = counts["tokens"] / counts["targets"]
    Console().print(
        f"{counts['records']:,} examples, {counts['targets']:,} questions, {per_question:.0f} tokens a question"
    )


def _train_tokenizer(run: Run, percentiles: Percentiles) -> Tokenizer:
    """Trained on prompts of the training period, which a tokenizer of single bytes says first."""
    words = sorted({word for task in run.tasks for word in task.words})
    of_bytes = Tokenizer.of_bytes()
    verbalizer = Verbalizer(run.dataset, percentiles, of_bytes, max_tokens=1_000_000)
    rng = np.random.default_rng(run.recipe.prepare.seed)
    texts = [
        verbalizer.prompt(task, example, run.recipe.prompts.draw(rng)).render()
        for task in run.tasks
        for example in sample_examples(run.dataset, task, "train", TOKENIZER_EXAMPLES)
    ]
    return Tokenizer.train(texts, words, run.recipe.tokenizer.vocab_size or 0)


def _training_examples(run: Run, verbalizer: Verbalizer) -> Iterator[tuple[EncodedPrompt, Note]]:
    prepare = run.recipe.prepare
    config = SftConfig(passes=prepare.passes, max_examples=prepare.max_examples, seed=prepare.seed)
    for task in run.tasks:
        yield from sft_records(verbalizer, task, run.recipe.prompts, config)


def train_stage(run: Run, folder: Path) -> None:
    """Supervised fine-tuning; leaves the model in `model/`."""
    prepared = run.folder / "prepare"
    params = train(run.model, run.recipe.train, prepared / "shards", folder, supervised)
    scale = PercentileScale.load(prepared / PERCENTILES)
    bundle = Bundle(run.model, params, run.tokenizer, run.recipe.prompts, scale, run.dataset.card, tuple(run.tasks))
    bundle.save(run.folder / "model")


def evaluate_stage(run: Run, folder: Path) -> None:
    """The model's predictions on the test period of every task."""
    bundle = Bundle.load(run.folder / "model", run.recipe.train.mesh)
    for task in run.tasks:
        predictions = predict(bundle, run.dataset, task, run.asked(task))
        if hosts.is_first():
            pq.write_table(predictions, folder / f"{task.name}.parquet")


def baselines_stage(run: Run, folder: Path) -> None:
    """Popularity's and LightGBM's predictions on the same questions."""
    for task in run.tasks:
        train, validation = (list(build_examples(run.dataset, task, split)) for split in ("train", "validation"))
        examples = run.asked(task)
        trees = LightGBM.fit(run.dataset, task, train, validation, run.recipe.evaluate.baseline_settings)
        for name, probabilities in {
            "popularity": popularity(run.dataset, task, train, examples),
            "LightGBM": trees.predict(run.dataset, task, examples),
        }.items():
            pq.write_table(from_examples(examples, probabilities), folder / f"{task.name}.{name}.parquet")
        Console().print(f"{task.name}: LightGBM chose {trees.settings}, {trees.rounds} rounds")


def report_stage(run: Run, folder: Path) -> None:
    """Model against baselines: tables in the terminal, report.md and report.html."""
    console, comparisons = Console(), []
    for task in run.tasks:
        files = {"model": run.folder / "evaluate" / f"{task.name}.parquet"}
        for name in ("popularity", "LightGBM"):
            files[name] = run.folder / "baselines" / f"{task.name}.{name}.parquet"
        predictions = {name: pq.read_table(path) for name, path in files.items()}
        comparisons.append(compare(task, predictions, run.recipe.evaluate.bootstrap))
        print_results(comparisons[-1], console)
    write_report(folder, run.recipe.name, comparisons, _facts(run), run.folder / "train" / METRICS)
    console.print(f"report: {folder / 'report.html'}")


def _facts(run: Run) -> dict[str, str]:
    """What a reader needs to know of how the numbers came about."""
    rows = read_metrics(run.folder / "train" / METRICS)
    seconds = {name: _read_record(run.folder / name).get("seconds") for name in STAGES}
    parameters = count(abstract_params(run.model, run.recipe.train.mesh.build()))
    tokens = sum(row["tokens"] for row in rows)
    return {
        "dataset": f"{run.dataset.card.name}: {len(run.dataset.members):,} members, {len(run.dataset.items):,} items, "
        f"{len(run.dataset.events):,} events",
        "model": f"{run.model.name}, {parameters:,} parameters",
        "training": f"{len(rows):,} steps, {tokens:,} tokens, {sum(row['targets'] for row in rows):,.0f} questions",
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value is not None),
        "date": datetime.date.today().isoformat(),
        "commit": _read_record(run.folder / "train").get("commit") or "unknown",
    }


def _commit() -> str:
    """The commit of the code that is run, where it is run from a clone."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a recipe.

    Attributes:
      keys: the parts of the recipe that it depends on, beside the stages before it.
      keep: what it leaves is too dear to be replaced unasked when its inputs change.
      together: all processes run it, each on its devices; else the first one does, and the others wait.
    """

    run: Callable[[Run, Path], None]
    keys: tuple[str, ...]
    keep: bool = False
    together: bool = False


def run_recipe(recipe: Recipe, folder: Path, stages: dict[str, Stage]) -> None:
    """Runs the stages in order into `folder/<stage>`; what is done with the same inputs is skipped.

    A stage that was killed goes on (train) or starts over. Raises ConfigError instead of mixing outputs: a training
    run made with other settings is never continued or overwritten.
    """
    run, console = Run(recipe, folder), Console()
    fingerprint = hosts.on_first(lambda: _hash_dataset(Path(recipe.dataset)))
    ModelConfig.load(recipe.model)  # refused now, and not after the data are prepared
    contents = [Path(path).read_text() for path in (recipe.model, *run.task_files) if Path(path).is_file()]
    for name, stage in stages.items():
        settings = [functools.reduce(dict.__getitem__, key.split("."), recipe.model_dump()) for key in stage.keys]
        fingerprint = hashlib.sha256(json.dumps([fingerprint, settings, contents]).encode()).hexdigest()
        output = folder / name
        record = hosts.on_first(functools.partial(_begin, output, stage.keep, fingerprint))
        if "seconds" in record:
            console.print(f"[bold]{name}[/]: done before, in {record['seconds']:.0f} s")
            continue
        console.print(f"[bold]{name}[/]")
        began = time.perf_counter()
        if stage.together:
            stage.run(run, output)
        else:
            hosts.on_first(functools.partial(stage.run, run, output))
        seconds = time.perf_counter() - began
        hosts.on_first(functools.partial(_write_record, output, record | {"seconds": seconds}))
        gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE / 1e9
        console.print(f"[bold]{name}[/]: {seconds:.0f} s, {gigabytes:.1f} GB of memory at most so far")


def _begin(output: Path, keep: bool, fingerprint: str) -> dict[str, Any]:
    """The record of a stage that is done, or that of one to run, in a folder made ready for it."""
    before = _read_record(output)
    same = before.get("fingerprint") == fingerprint
    if same and "seconds" in before:
        return before
    if before and not same and keep:
        raise ConfigError(
            f"{output}: made from other data or settings, so it is neither continued nor replaced; "
            "give another --out, or delete that folder"
        )
    if output.exists() and not (same and keep):
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    record = {"fingerprint": fingerprint, "commit": before.get("commit") if same else _commit()}
    _write_record(output, record)
    return record


def _read_record(output: Path) -> dict[str, Any]:
    """A stage's fingerprint and commit, and its seconds once it is done; nothing where it was never begun."""
    record = output / RECORD
    return json.loads(record.read_text()) if record.exists() else {}


def _write_record(output: Path, record: dict[str, Any]) -> None:
    temporary = output / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(record))
    temporary.replace(output / RECORD)


def _hash_dataset(folder: Path) -> str:
    """The card's text and the tables' sizes and times of change: cheap, and different whenever the data are."""
    if not (folder / CARD).is_file():
        raise ConfigError(f"{folder}: no {CARD} there; fetch a dataset with `brewjax data fetch` or make one")
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*.parquet"))]
    return hashlib.sha256(json.dumps([(folder / CARD).read_text(), stats]).encode()).hexdigest()


STAGES = {
    "prepare": Stage(prepare, ("dataset", "tasks", "tokenizer", "prompts", "prepare", "train.row_tokens")),
    "train": Stage(train_stage, ("model", "train"), keep=True, together=True),
    "evaluate": Stage(evaluate_stage, ("evaluate",), together=True),
    "baselines": Stage(baselines_stage, ("evaluate",)),
    "report": Stage(report_stage, ("evaluate",)),
}
