"""Results: every metric with its bootstrap interval, overall and by the member's number of past events."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import scipy.stats

from brewjax.data.tasks.task import MetricName, Task
from brewjax.evaluate.metrics import auc, calibration_error, gauc, log_loss, ndcg
from brewjax.evaluate.predictions import check_same_questions, probabilities, scores, true_values

OVERALL = "all"
SLICES = {  # by name, the least and the greatest number of past events
    OVERALL: (0, np.inf),
    "0": (0, 0),
    "1-5": (1, 5),
    "6-10": (6, 10),
    "11-100": (11, 100),
    "over 100": (101, np.inf),
}
SAME = ["example", "list", "member", "item"]  # columns in which tasks with the same questions are equal
CHUNK = 1_000_000  # weights in memory at a time: 8 MB


class MetricInputs(NamedTuple):
    """Predictions of a task's questions, as metrics take them.

    Attributes:
      probabilities: float64 [rows, labels].
      label: int [rows], index of the true label.
      score: float64 [rows], by which items are ranked.
      value: float64 [rows], the value of the true label.
      lists: int [rows]; rows with the same number are ranked against each other.
    """

    probabilities: np.ndarray
    label: np.ndarray
    score: np.ndarray
    value: np.ndarray
    lists: np.ndarray


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric's title in reports, its direction, its range, and its value under weights float64 [.., rows]."""

    title: str
    higher_is_better: bool
    bounds: tuple[float, float]
    compute: Callable[[MetricInputs, np.ndarray], np.ndarray]


METRICS: dict[MetricName, Metric] = {
    "gauc": Metric("AUC in list", True, (0, 1), lambda p, weights: gauc(p.score, p.value, p.lists, weights)),
    "auc": Metric("AUC", True, (0, 1), lambda p, weights: auc(p.score, p.value, weights)),
    "log_loss": Metric("Log loss", False, (0, np.inf), lambda p, weights: log_loss(p.probabilities, p.label, weights)),
    "ndcg@10": Metric("NDCG@10", True, (0, 1), lambda p, weights: ndcg(p.score, p.value, p.lists, weights)),
    "calibration_error": Metric(
        "Calibration error", False, (0, 1), lambda p, weights: calibration_error(p.probabilities, p.label, weights)
    ),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The value of a metric, and of each bootstrap resample.

    Attributes:
      value: of the questions themselves; NaN if undefined.
      resamples: float64 [bootstrap], the value of each resample of the members; NaN where it is undefined.
      bounds: the least and the greatest value that the metric can have.
    """

    value: float
    resamples: np.ndarray
    bounds: tuple[float, float] = (-np.inf, np.inf)

    @property
    def error(self) -> float:
        """Half of the 95% interval, 1.96 standard errors; NaN if fewer than two resamples are defined.

        The percentiles of the resamples would need thousands, and miss a biased statistic such as ECE.
        """
        defined = self.resamples[np.isfinite(self.resamples)]
        return 1.96 * float(defined.std(ddof=1)) if len(defined) > 1 else np.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The lower and the upper end of the 95% interval, within the metric's range; NaN if the error is undefined."""
        low, high = np.clip([self.value - self.error, self.value + self.error], *self.bounds)
        return float(low), float(high)

    @classmethod
    def mean(cls, estimates: Sequence[Estimate]) -> Estimate:
        """The unweighted mean of `estimates`. Its resamples are the means of theirs, so its error is that of this
        very estimator."""
        values, resamples = [each.value for each in estimates], [each.resamples for each in estimates]
        return cls(float(np.mean(values)), np.mean(resamples, axis=0), estimates[0].bounds)

    def __sub__(self, baseline: Estimate) -> Estimate:
        """The paired difference: both must be of the same questions and the same seed."""
        return Estimate(self.value - baseline.value, self.resamples - baseline.resamples)


@dataclasses.dataclass(frozen=True)
class Result:
    """The metrics of one slice.

    Attributes:
      rows: number of questions.
      members: number of members.
      metrics: the estimates by metric.
    """

    rows: int
    members: int
    metrics: dict[MetricName, Estimate]


def evaluate(predictions: pa.Table, task: Task, bootstrap: int = 200, seed: int = 0) -> dict[str, Result]:
    """Computes the task's metrics for each of SLICES; the first, "all", has every question.

    The bootstrap resamples members, not questions, because the answers of one member are correlated. The same seed
    draws the same members for every table of the same questions, so that two results can be subtracted.

    Args:
      predictions: as `from_examples` makes them.
      bootstrap: number of resamples.
      seed: of the resamples.

    Returns:
      The result of each slice, by name.
    """
    members, member = np.unique(predictions["member"].to_numpy(), return_inverse=True)
    member_weights = np.ones((1 + bootstrap, len(members)))  # the first is the sample itself
    if len(members):
        equally = np.full(len(members), 1 / len(members))
        member_weights[1:] = np.random.default_rng(seed).multinomial(len(members), equally, size=bootstrap)
    num_past_events = predictions["num_past_events"].to_numpy()
    results = {}
    for name, (low, high) in SLICES.items():
        rows = np.flatnonzero((num_past_events >= low) & (num_past_events <= high))
        num_members = len(np.unique(member[rows]))
        weights = member_weights if num_members > 1 else member_weights[:1]  # one member cannot be resampled
        metrics = estimates(predictions.take(rows), task, weights, member[rows])
        results[name] = Result(len(rows), num_members, metrics)
    return results


def estimates(
    predictions: pa.Table, task: Task, member_weights: np.ndarray, member: np.ndarray
) -> dict[MetricName, Estimate]:
    """Computes the task's metrics, with the resamples that some weights of members make.

    Args:
      predictions: as `from_examples` makes them.
      task: whose metrics are computed.
      member_weights: float64 [1 + resamples, members]; the first row is the sample itself, all ones.
      member: int [rows], the column of `member_weights` of each prediction.

    Returns:
      An estimate of each of the task's metrics, NaN without predictions.
    """
    inputs = MetricInputs(
        probabilities(predictions, task),
        predictions["label"].to_numpy(),
        scores(predictions, task),
        true_values(predictions, task),
        predictions["list"].to_numpy(),
    )
    values = {name: np.full(len(member_weights), np.nan) for name in task.metrics}
    for chunk in np.array_split(np.arange(len(member_weights)), member_weights.shape[0] * len(member) // CHUNK + 1):
        weights = member_weights[chunk][:, member]
        for name in task.metrics if len(member) else ():
            values[name][chunk] = METRICS[name].compute(inputs, weights)
    return {name: Estimate(float(v[0]), v[1:], METRICS[name].bounds) for name, v in values.items()}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One task's predictions by name, first the model and then the baselines, and the results of each by slice.

    `name` is that of the task in the report: "apply", or "jobs/apply" where there are several surfaces.
    """

    task: Task
    predictions: dict[str, pa.Table]
    results: dict[str, dict[str, Result]]
    name: str

    def select(self, *names: str) -> Comparison:
        """The comparison of these names alone, with the first as the model."""
        predictions = {name: self.predictions[name] for name in names}
        return Comparison(self.task, predictions, {name: self.results[name] for name in names}, self.name)

    def best(self, metric: MetricName, slice_: str = OVERALL) -> str | None:
        """Finds the best model or baseline.

        Args:
          metric: by which.
          slice_: of the questions.

        Returns:
          The name with the best value; None if no value is defined.
        """
        values = {name: result[slice_].metrics[metric].value for name, result in self.results.items()}
        defined = {name: value for name, value in values.items() if np.isfinite(value)}
        choose = max if METRICS[metric].higher_is_better else min
        return choose(defined, key=defined.__getitem__) if defined else None

    def difference(self, metric: MetricName, baseline: str) -> Estimate:
        """Compares the first model with a baseline.

        Args:
          metric: of all questions.
          baseline: its name, or that of another model.

        Returns:
          The model's value minus the baseline's, with the interval of the paired difference.
        """
        model = next(iter(self.results))
        return self.results[model][OVERALL].metrics[metric] - self.results[baseline][OVERALL].metrics[metric]


class Agreement(NamedTuple):
    """How alike a model ranks the same questions for two tasks: it confuses the tasks if this is far from what the
    baselines show. `liked` and `disliked` ask for opposite orders.

    Attributes:
      tasks: the names of the two.
      spearman: the rank correlation of the scores, by the name of each model and baseline.
    """

    tasks: tuple[str, str]
    spearman: dict[str, float]


def agreements(comparisons: Sequence[Comparison]) -> list[Agreement]:
    """The agreement of every two tasks that ask about the same members, items and moments."""
    result = []
    for first, second in itertools.combinations(comparisons, 2):
        (first_table, *_), (second_table, *_) = first.predictions.values(), second.predictions.values()
        if PurePosixPath(first.name).parent != PurePosixPath(second.name).parent:
            continue  # they are of two surfaces, and rows of other tables
        if len(first_table) < 2 or not first_table.select(SAME).equals(second_table.select(SAME)):
            continue
        spearman = {
            name: float(
                scipy.stats.spearmanr(
                    scores(first.predictions[name], first.task), scores(second.predictions[name], second.task)
                ).statistic
            )
            for name in first.predictions
        }
        result.append(Agreement((first.name, second.name), spearman))
    return result


@dataclasses.dataclass(frozen=True)
class ModelSummary:
    """A model of a run: one row of its table of models.

    Attributes:
      name: of the stage that made it.
      how: the stage's work, and its parent model.
      parameters: their number.
      weight_bytes: size of the weights.
      seconds: duration of the stage on this machine.
      item_flops: FLOPs of the matrix products of a question, with its share of the prefix, without attention.
      speed: questions per second on this machine.
    """

    name: str
    how: str
    parameters: int
    weight_bytes: int
    seconds: float
    item_flops: float
    speed: float


def compare(
    task: Task, predictions: Mapping[str, pa.Table], bootstrap: int = 200, seed: int = 0, name: str = ""
) -> Comparison:
    """Evaluates predictions of the same questions.

    Args:
      task: whose metrics are computed.
      predictions: tables by name, the model's first and then the baselines'.
      bootstrap: number of resamples.
      seed: of the resamples.
      name: of the task in the report; its own by default.

    Returns:
      Every metric with its resamples, by prediction and by slice.

    Raises:
      ValueError: the questions differ.
    """
    tables = dict(predictions)
    for table in tables.values():
        check_same_questions(next(iter(tables.values())), table)
    results = {model: evaluate(table, task, bootstrap, seed) for model, table in tables.items()}
    return Comparison(task, tables, results, name or task.name)
