"""How good the models of a run are: predictions, baselines, and the report of all of them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from brewjax import distributed
from brewjax.bundle.bundle import Bundle
from brewjax.console import plain_console
from brewjax.data.tasks.task import Task
from brewjax.evaluate.baselines import BASELINES, ORACLE, predict_baselines
from brewjax.evaluate.budgets import BudgetPoint, PrefixSize, budget_curve, predict_within
from brewjax.evaluate.fact_worth import measure_facts
from brewjax.evaluate.mistakes import find_mistakes
from brewjax.evaluate.predict import ScoringCost, TaskExamples, predict
from brewjax.evaluate.report import TaskDetails, describe_agreements, print_models, print_results, write_report
from brewjax.evaluate.results import Comparison, ModelSummary, compare
from brewjax.model.config import ModelConfig
from brewjax.model.flops import model_flops
from brewjax.model.params import MODEL, model_size
from brewjax.paths import write_text
from brewjax.pipeline.context import Run, RunTask
from brewjax.pipeline.recipe import (
    DistillStage,
    PruneStage,
    Stage,
    TrainedStage,
)
from brewjax.pipeline.runner import read_record
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.evaluation import Recall, evaluate_retrieval, print_recall
from brewjax.train.metrics_writer import METRICS, read_metrics

EVALUATE, WORK, RETRIEVAL, SIZES = "evaluate-", "work.json", "recall.json", "sizes.json"


def evaluate_stage(run: Run, name: str, folder: Path) -> None:
    """The model's predictions on the test period of every task, and what they cost."""
    bundle = Bundle.load(run.model(name), run.recipe.evaluate.mesh)
    predicted = predict(bundle, _test_tasks(run))
    if distributed.is_process_zero():
        for of_task, predictions in zip(run.tasks, predicted, strict=True):
            _write_table(predictions.table, folder / f"{of_task}.parquet")
        cost = [sum(column) for column in zip(*(predictions.work for predictions in predicted), strict=True)]
        (folder / WORK).write_text(json.dumps(cost))


def _test_tasks(run: Run) -> list[TaskExamples]:
    return [
        TaskExamples(surface.dataset, task, run.test_examples[of_task], surface.name, of_task)
        for of_task, (surface, task) in run.tasks.items()
    ]


def budgets_stage(run: Run, name: str, folder: Path) -> None:
    """The model's predictions in prompts of each budget of `evaluate.budgets`."""
    bundle, settings = Bundle.load(run.model(name), run.recipe.evaluate.mesh), run.recipe.evaluate
    sizes: dict[str, dict[int, PrefixSize]] = {of_task: {} for of_task in run.tasks}
    for budget in settings.budgets:
        predicted = predict_within(bundle, _test_tasks(run), settings.budget_style, budget)
        for of_task, (table, size) in zip(run.tasks, predicted, strict=True):
            sizes[of_task][budget] = size
            if distributed.is_process_zero():
                _write_table(table, folder / f"{of_task}.{budget}.parquet")
    if distributed.is_process_zero():
        write_text(folder / SIZES, json.dumps(sizes))


def retrieve_stage(run: Run, name: str, folder: Path) -> None:
    """An encoder's recall on the test period, beside that of the baselines."""
    encoder = Encoder.load(run.model(name), run.recipe.evaluate.mesh)
    dataset = run.surfaces[encoder.surface.name].dataset
    results = evaluate_retrieval(encoder, dataset, max_examples=run.recipe.evaluate.max_examples)
    if distributed.is_process_zero():
        write_text(folder / RETRIEVAL, json.dumps([row._asdict() for row in results], indent=1))


def baselines_stage(run: Run, folder: Path) -> None:
    """The predictions of the baselines on the same questions."""
    for of_task, (surface, task) in run.tasks.items():
        predicted = predict_baselines(
            surface.dataset, task, run.test_examples[of_task], run.recipe.evaluate.baseline_settings
        )
        for name, table in predicted.items():
            _write_table(table, folder / f"{of_task}.{name}.parquet")


def _write_table(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)


def report_stage(run: Run, before: Sequence[str], folder: Path) -> None:
    """All models, and the last of them against the largest that it came from and the baselines: tables in the terminal,
    report.md and report.html. `before` are the names of all steps before it."""
    console, comparisons = plain_console(), []
    for name in [name for name in run.recipe.stages if name not in run.recipe.ranking_stages]:
        rows = json.loads((run.folder / f"{EVALUATE}{name}" / RETRIEVAL).read_text())
        print_recall(name, [Recall(**row) for row in rows])
    stages = {name: run.recipe.stages[name] for name in run.recipe.ranking_stages}
    if not stages:
        return
    for of_task, (_, task) in run.tasks.items():
        files = {name: run.folder / f"{EVALUATE}{name}" / f"{of_task}.parquet" for name in stages}
        for name in (*BASELINES, ORACLE):
            files[name] = run.folder / "baselines" / f"{of_task}.{name}.parquet"
        if not files[ORACLE].exists():  # the dataset is no simulation
            del files[ORACLE]
        predictions = {name: pq.read_table(path) for name, path in files.items()}
        comparisons.append(compare(task, predictions, run.recipe.evaluate.bootstrap, name=of_task))
    models = {name: _describe(run, name) for name in stages}
    line = [last := [*stages][-1]]
    while (start := stages[line[-1]].init_from) in stages:
        line.append(start)
    largest = max(line, key=lambda name: models[name].parameters)
    shown = list(dict.fromkeys([last, largest, *BASELINES]))
    for comparison in comparisons:
        print_results(comparison.select(*shown), console)
    for agreement in describe_agreements(comparisons, shown):
        console.print(agreement)
    print_models(comparisons, [*models.values()], console)
    losses = {name: read_metrics(run.folder / name / METRICS) for name in stages if hasattr(stages[name], "train")}
    details = {
        comparison.name: _task_details(run, comparison.select(*shown), run.tasks[comparison.name])
        for comparison in comparisons
    }
    write_report(folder, run.recipe.name, comparisons, [*models.values()], shown, _facts(run, before), losses, details)
    console.print(f"report: {folder / 'report.html'}")


def _task_details(run: Run, comparison: Comparison, of_task: RunTask) -> TaskDetails:
    """Where the last model is most wrong on a task, and what the task's facts are worth."""
    surface, task = of_task
    examples, style = run.test_examples[comparison.name], run.recipe.prompts.score_style
    mistakes = find_mistakes(comparison, BASELINES, surface.verbalizer, examples, style)
    return TaskDetails(
        mistakes, measure_facts(surface.dataset, task, examples), _budget_curve(run, task, comparison.name)
    )


def _budget_curve(run: Run, task: Task, of_task: str) -> list[BudgetPoint]:
    """The last ranker's quality on a task by the budget of its prompts; none without `evaluate.budgets`."""
    settings, folder = run.recipe.evaluate, run.folder / "budgets"
    if not settings.budgets:
        return []
    sizes = json.loads((folder / SIZES).read_text())[of_task]
    predictions = {
        budget: (pq.read_table(folder / f"{of_task}.{budget}.parquet"), PrefixSize(*sizes[str(budget)]))
        for budget in settings.budgets
    }
    return budget_curve(task, predictions, settings.bootstrap)


def _describe(run: Run, name: str) -> ModelSummary:
    """A stage's model, as the report's table has it."""
    stage, config = run.recipe.stages[name], ModelConfig.load(run.model(name) / MODEL)
    of = model_size(config)
    work = ScoringCost(*json.loads((run.folder / f"{EVALUATE}{name}" / WORK).read_text()))
    of_token, _ = model_flops(config, 1, 1)
    flops = of_token * work.tokens / work.questions
    seconds = read_record(run.folder / name)["seconds"]
    return ModelSummary(
        name, describe_stage(stage), of.parameters, of.weight_bytes, seconds, flops, work.questions / work.seconds
    )


def describe_stage(stage: Stage) -> str:
    """What a stage does, in a few words."""
    words: list[str] = [stage.do]
    if isinstance(stage, PruneStage):
        words.append(f"by {stage.method}")
    if isinstance(stage, DistillStage):
        words.append(f"by {stage.teacher}")
    if isinstance(stage, TrainedStage):
        words.append(f"{stage.train.steps} steps")
        words += ["from random weights"] if stage.from_scratch else []
    return " ".join(words + ([f"after {stage.init_from}"] if stage.init_from else []))


def _facts(run: Run, names: Sequence[str]) -> dict[str, str]:
    """What a reader needs to know of how the numbers came about."""
    seconds = {name: read_record(run.folder / name).get("seconds") for name in names}
    rows = [row for name in names for row in read_metrics(run.folder / name / METRICS)]
    commits = {read_record(run.folder / name).get("commit") or "unknown" for name in names}
    datasets = {surface.prefixed("dataset"): surface.dataset for surface in run.surfaces.values()}
    return {
        **{
            name: f"{dataset.card.name}: {len(dataset.members):,} members, {len(dataset.items):,} items, "
            f"{len(dataset.events):,} events"
            for name, dataset in datasets.items()
        },
        "training": f"{len(rows):,} steps, {sum(row['tokens'] for row in rows):,.0f} tokens",
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value is not None),
        "date": datetime.date.today().isoformat(),
        "commit": ", ".join(sorted(commits)),
    }
