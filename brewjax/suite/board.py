"""The leaderboard of a suite: every model and baseline by tier and domain, with the error of each very mean."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.stats

from brewjax.data.tasks.task import MetricName, Task
from brewjax.evaluate.predictions import QUESTION
from brewjax.evaluate.results import Estimate, estimates
from brewjax.suite.predictors import POPULARITY
from brewjax.suite.questions import first_moments, questions_path, read_frozen
from brewjax.suite.runs import PLAIN, Entry, read_entries, read_predictions
from brewjax.suite.slices import COLD, note_followed, read_slices, slice_masks
from brewjax.suite.suite import Size, Suite, SurfaceTask

HEADLINE: MetricName = "gauc"
CHANCE = 0.5  # of the headline
BOARD_METRICS: tuple[MetricName, ...] = ("gauc", "ndcg@10", "auc", "log_loss", "calibration_error")
POISSON = scipy.stats.poisson.cdf(np.arange(12), 1)  # of the number of times that a resample holds a member

Estimates = dict[MetricName, Estimate]


@dataclasses.dataclass(frozen=True)
class BoardTask:
    """A task as the leaderboard knows it.

    Attributes:
      surface_task: with its tier and version.
      domain: of its surface.
      task: as its questions were frozen.
      digest: of the questions.
      member_hash: the hash of each member by row.
      first_moments: the examples that cold starts are asked about.
      questions: their number.
      slices: what `read_slices` knows of them.
    """

    surface_task: SurfaceTask
    domain: str
    task: Task
    digest: str
    member_hash: Mapping[int, int]
    first_moments: list[int]
    questions: int
    slices: pa.Table | None

    @property
    def name(self) -> str:
        """Within the suite: "films/liked"."""
        return self.surface_task.name

    @property
    def tier(self) -> str:
        """The name of its tier."""
        return self.surface_task.entry.tier


@dataclasses.dataclass(frozen=True)
class Row:
    """A model or baseline on the leaderboard.

    Attributes:
      entry: which it is.
      tasks: the metrics of each task that it has answered as the questions now are; others are missing.
      domains, tiers: means of each domain's tasks, and of each tier over domains; where complete.
      mean: the unweighted mean over domains; empty where a task is missing, and the row is then not ranked.
      missing: tasks that it has not answered, or in an earlier version.
      slices: the headline by kind of slice, task and slice; those of cold starts are of the same questions.
      notes: by task, whether its note was followed, see `note_followed`.
      seconds, tokens: that scoring took.
    """

    entry: Entry
    tasks: dict[str, Estimates]
    domains: dict[str, Estimates]
    tiers: dict[str, Estimates]
    mean: Estimates
    missing: list[str]
    slices: dict[tuple[str, str, str], Estimate]
    notes: dict[str, Estimate]
    seconds: float
    tokens: float

    @property
    def name(self) -> str:
        """The name of the model or baseline."""
        return self.entry.name

    def minus(self, baseline: Row, domain: str | None = None) -> Estimate:
        """The paired difference of the headline, in the mean or in a domain."""
        if domain is None:
            return self.mean[HEADLINE] - baseline.mean[HEADLINE]
        return self.domains[domain][HEADLINE] - baseline.domains[domain][HEADLINE]

    def share_of(self, oracle: Row, domain: str) -> Estimate | None:
        """What the headline has over chance, as a share of the oracle's, paired; None where the domain is missing."""
        if domain not in self.domains:
            return None
        excess = [row.domains[domain][HEADLINE] for row in (self, oracle)]
        value, best = (each.value - CHANCE for each in excess)
        resamples, best_resamples = (each.resamples - CHANCE for each in excess)
        return Estimate(value / best, resamples / best_resamples)


@dataclasses.dataclass(frozen=True)
class Board:
    """All rows, the best first; those that are not ranked, last.

    Attributes:
      suite, size: what was asked.
      tasks: those whose questions are frozen, in the suite's order.
      rows: ranked ones by their mean, then the others.
      groups: for each ranked row, the number of its tie group, from 1: rows of a group are not told apart from its
        best, by the interval of their paired difference.
    """

    suite: Suite
    size: Size
    tasks: list[BoardTask]
    rows: list[Row]
    groups: list[int]

    def counts(self, row: Row, tier: str) -> tuple[int, int, int]:
        """How many tasks of a tier a row has answered; on how many of them its headline is above popularity's; and on
        how many it is above chance by more than its interval."""
        popularity = self.row(POPULARITY)
        answered = [task.name for task in self.tasks if task.tier == tier and task.name in row.tasks]
        values = {name: row.tasks[name][HEADLINE] for name in answered}
        popular = {name: metrics[HEADLINE].value for name, metrics in (popularity.tasks if popularity else {}).items()}
        above_popular = sum(values[name].value > popular.get(name, np.inf) for name in answered)
        return len(answered), above_popular, sum(each.value - each.error > CHANCE for each in values.values())

    @property
    def domains(self) -> list[str]:
        """In the suite's order."""
        return list(dict.fromkeys(surface.domain for surface in self.suite.surfaces.values()))

    def row(self, name: str) -> Row | None:
        """The row of a model or baseline."""
        return next((row for row in self.rows if row.name == name), None)


def make_board(suite: Suite, size: Size, entries: Iterable[Entry] | None = None) -> Board:
    """Makes the leaderboard from the predictions that are kept.

    Args:
      suite: what is asked.
      size: how much of it, "quick" or "full".
      entries: models and baselines; by default all that were run.

    Returns:
      The board.
    """
    tasks = [*_board_tasks(suite, size)]
    expected = [each for surface in suite.surfaces for each in suite.tasks_of(surface)]
    rows = [
        make_row(suite, size, tasks, expected, entry)
        for entry in (read_entries(suite, size) if entries is None else entries)
    ]
    ranked = sorted((row for row in rows if row.mean), key=lambda row: -row.mean[HEADLINE].value)
    unranked = sorted((row for row in rows if not row.mean), key=lambda row: row.name)
    return Board(suite, size, tasks, [*ranked, *unranked], tie_groups(ranked))


def tie_groups(ranked: Sequence[Row]) -> list[int]:
    """For each row, from the best mean down, the number of its group: a group ends where a row is below its first by
    more than the interval of their paired difference."""
    groups: list[int] = []
    first = 0
    for index, row in enumerate(ranked):
        difference = ranked[first].minus(row)
        if index and difference.value > difference.error:
            first = index
            groups.append(groups[-1] + 1)
        else:
            groups.append(groups[-1] if groups else 1)
    return groups


def _board_tasks(suite: Suite, size: Size) -> Iterable[BoardTask]:
    for name, surface in suite.surfaces.items():
        for surface_task in suite.tasks_of(name):
            path = questions_path(suite, size, surface_task)
            if path.exists():
                frozen, rows, digest = read_frozen(path)
                member_hash = {row["member"]: row["member_hash"] for row in rows}
                moments = first_moments([(row["member"], row["cutoff_time"]) for row in rows])
                questions = sum(len(row["candidates"]) for row in rows)
                task = Task.of(frozen["task"], str(path))
                slices = read_slices(suite, size, digest)
                yield BoardTask(surface_task, surface.domain, task, digest, member_hash, moments, questions, slices)


def make_row(
    suite: Suite, size: Size, tasks: Sequence[BoardTask], expected: Sequence[SurfaceTask], entry: Entry
) -> Row:
    """A row from the predictions of an entry; those of other questions than the frozen ones count as missing.

    Args:
      tasks: those whose questions are frozen.
      expected: all of the suite.
    """
    results: dict[str, Estimates] = {}
    slices: dict[tuple[str, str, str], Estimate] = {}
    notes: dict[str, Estimate] = {}
    seconds = tokens = 0.0
    for task in tasks:
        table, cost = _answers(suite, size, entry, task, task.name)
        if table is None:
            continue
        results[task.name] = task_estimates(suite, task, table)
        seconds, tokens = seconds + cost["seconds"], tokens + cost["tokens"]
        for past_events in task.surface_task.entry.past_events:
            cut, _ = _answers(suite, size, entry, task, f"{task.name}@{past_events}")
            if cut is not None:
                slices[COLD, task.name, f"{past_events} past events"] = _headline(suite, task, cut)
        if task.surface_task.entry.past_events:
            same = np.isin(table["example"].to_numpy(), task.first_moments)
            slices[COLD, task.name, "all past events"] = _headline(suite, task, table.filter(pa.array(same)))
        if task.slices is not None:
            for (kind, name), mask in slice_masks(task.slices).items():
                slices[kind, task.name, name] = _headline(suite, task, table.filter(pa.array(mask)))
            plain, _ = _answers(suite, size, entry, task, task.name + PLAIN)
            if plain is not None:
                weights = _table_weights(suite, task, table)
                notes[task.name] = note_followed(task.task, task.slices, table, plain, *weights)
    missing = [each.name for each in expected if each.name not in results]
    domains = _domain_means(suite, expected, results)
    of_tiers: dict[str, Estimates] = {}
    for tier in suite.tiers:
        within = [each for each in expected if each.entry.tier == tier]
        if within and all(each.name in results for each in within):
            of_tiers[tier] = _mean(_domain_means(suite, within, results).values())
    mean = {} if missing else _mean(domains.values())
    return Row(entry, results, domains, of_tiers, mean, missing, slices, notes, seconds, tokens)


def task_estimates(
    suite: Suite, task: BoardTask, table: pa.Table, metrics: tuple[MetricName, ...] = BOARD_METRICS
) -> Estimates:
    """The metrics of a task with their resamples: a bootstrap over members (Poisson: Chamandy et al., 2012).

    The weight of a member in a resample depends on suite, domain and member alone: it is the same for all tasks of a
    domain and for all models, so that means and differences have the error of the very thing that they are.
    """
    judged = task.task.model_copy(update={"metrics": metrics})
    return estimates(table, judged, *_table_weights(suite, task, table))


def _headline(suite: Suite, task: BoardTask, table: pa.Table) -> Estimate:
    return task_estimates(suite, task, table, (HEADLINE,))[HEADLINE]


def _table_weights(suite: Suite, task: BoardTask, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Weights of members, float64 [1 + resamples, members], of which the first are ones; the member of each row."""
    row_hashes = np.array([task.member_hash[member] for member in table["member"].to_pylist()], np.uint64)
    hashes, member = np.unique(row_hashes, return_inverse=True)
    weights = np.ones((1 + suite.bootstrap, len(hashes)))
    weights[1:] = member_weights(hashes, task.domain, suite.seed, suite.bootstrap)
    return weights, member


def member_weights(member_hash: np.ndarray, domain: str, seed: int, resamples: int) -> np.ndarray:
    """float64 [resamples, members]: how often each resample holds each member, Poisson with mean 1, by hashes
    (splitmix64: Steele et al., OOPSLA 2014)."""
    start = np.random.default_rng([seed, zlib.crc32(domain.encode())]).integers(0, 2**63, resamples, np.uint64)
    with np.errstate(over="ignore"):
        state = (member_hash[None, :] ^ start[:, None]) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return np.searchsorted(POISSON, state / 2.0**64).astype(np.float64)


def _answers(
    suite: Suite, size: Size, entry: Entry, task: BoardTask, name: str
) -> tuple[pa.Table | None, Mapping[str, Any]]:
    """An entry's predictions, if they are of the questions as they are frozen now; and what they cost."""
    if name not in entry.predictions:
        return None, {}
    try:
        table, key, cost = read_predictions(suite, size, entry.predictions[name])
    except FileNotFoundError:
        return None, {}
    return (table if key["questions"] == task.digest else None), cost


def _domain_means(suite: Suite, tasks: Sequence[SurfaceTask], results: Mapping[str, Estimates]) -> dict[str, Estimates]:
    """The means of each domain's tasks, where all of them are there."""
    names_of: dict[str, list[str]] = {}
    for task in tasks:
        names_of.setdefault(suite.surfaces[task.surface].domain, []).append(task.name)
    return {
        domain: _mean([results[name] for name in names])
        for domain, names in names_of.items()
        if all(name in results for name in names)
    }


def _mean(parts: Iterable[Estimates]) -> Estimates:
    parts = list(parts)
    return {metric: Estimate.mean([part[metric] for part in parts]) for metric in BOARD_METRICS} if parts else {}


def most_different(
    suite: Suite, size: Size, tasks: Sequence[BoardTask], first: Row, second: Row, count: int
) -> list[dict[str, Any]]:
    """The questions about which two models disagree most, by the probability of the first label."""
    candidates = []
    for task in tasks:
        tables = [_answers(suite, size, row.entry, task, task.name)[0] for row in (first, second)]
        if tables[0] is None or tables[1] is None:
            continue
        columns = [np.array(table["probabilities"].to_pylist())[:, 0] for table in tables if table is not None]
        gap = np.abs(columns[0] - columns[1])
        for index in np.argsort(-gap)[:count].tolist():
            row = {name: tables[0][name][index].as_py() for name in QUESTION}
            scores = [float(column[index]) for column in columns]
            candidates.append(row | {"task": task.name, "label": task.task.words[row["label"]], "scores": scores})
    return sorted(candidates, key=lambda row: -abs(row["scores"][0] - row["scores"][1]))[:count]
