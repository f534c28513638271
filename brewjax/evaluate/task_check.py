"""What a task would ask of a dataset, split by split, and what about it is suspicious, before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import DAY, PointInTimeIndex
from brewjax.data.tasks.examples import RankingExample, sample_examples
from brewjax.data.tasks.questions import split_questions
from brewjax.data.tasks.task import Split, Task
from brewjax.evaluate.metrics import auc

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MAX_EXAMPLES = 2000  # of each split that are looked at
FEW = 100  # questions of a split that say little about a model
TELLING = 0.7  # AUC at which "nobody has had this item yet" gives an answer away


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """What a split asks; shares and medians are of at most MAX_EXAMPLES examples.

    Attributes:
      split: its name.
      questions: events in question, without sampled negatives.
      label_shares: float64 [labels], of all candidates.
      candidates_per_prompt: mean.
      past_events: median number of events of the member before the moment.
      gap_days: median, over prompts, of the days from the moment to the last question.
      new_items: share of candidates that nobody had an event with before the moment.
      new_item_auc: AUC of being such an item for the best label; NaN where it is undefined.
    """

    split: Split
    questions: int
    label_shares: np.ndarray
    candidates_per_prompt: float
    past_events: float
    gap_days: float
    new_items: float
    new_item_auc: float


def summarize_splits(dataset: Dataset, task: Task) -> list[SplitSummary]:
    """A summary of each split of `task` that has questions, of at most MAX_EXAMPLES examples of it."""
    index = PointInTimeIndex(dataset.event_item.astype(np.int64), dataset.event_time)
    summaries = []
    for split in SPLITS:
        questions = len(split_questions(dataset, task, split).events)
        examples = sample_examples(dataset, task, split, MAX_EXAMPLES)
        if examples:
            summaries.append(_summarize(dataset, task, split, questions, examples, index))
    return summaries


def suspicions(dataset: Dataset, task: Task, summaries: list[SplitSummary]) -> Iterator[str]:
    """Looks for what a model would stumble over.

    Args:
      dataset: the tables.
      task: what is asked of them.
      summaries: of its splits.

    Yields:
      A line for each, with what to do about it.
    """
    by_split = {summary.split: summary for summary in summaries}
    for split in SPLITS:
        count = by_split[split].questions if split in by_split else 0
        if count < FEW:
            yield f"{split}: {count} questions, which say little; move the times of 'split', or ask about more actions"
    for summary in summaries:
        for word, share in zip(task.words, summary.label_shares, strict=True):
            if share in (0.0, 1.0):
                yield f"{summary.split}: the answer is {'always' if share else 'never'} '{word}'"
        if max(summary.new_item_auc, 1 - summary.new_item_auc) > TELLING:
            yield (
                f"{summary.split}: that nobody had an event with the item before gives the answer away (AUC "
                f"{summary.new_item_auc:.2f}); state when items exist: 'available' under 'items' of the card"
            )
        if summary.gap_days > 7:
            yield (
                f"{summary.split}: the last question of a prompt is {summary.gap_days:.0f} days from its moment, and "
                "serving asks now; lower 'span_days' of the questions"
            )
    yield from _contradictions(dataset, task)


def _summarize(
    dataset: Dataset,
    task: Task,
    split: Split,
    questions: int,
    examples: list[RankingExample],
    index: PointInTimeIndex,
) -> SplitSummary:
    sizes = [len(example.candidates) for example in examples]
    labels = np.concatenate([example.labels for example in examples])
    items = np.concatenate([example.candidates for example in examples]).astype(np.int64)
    moments = np.repeat([example.cutoff_time for example in examples], sizes)
    start, end = index.window(items, moments)
    new = start == end
    gaps = [dataset.event_time[example.exposures].max() - example.cutoff_time for example in examples]
    return SplitSummary(
        split,
        questions,
        np.bincount(labels, minlength=len(task.words)) / len(labels),
        float(np.mean(sizes)),
        float(np.median([example.num_past_events for example in examples])),
        float(np.median(gaps)) / DAY,
        float(new.mean()),
        float(auc(new.astype(float), task.values[labels], np.ones(len(labels)))),
    )


def _contradictions(dataset: Dataset, task: Task) -> Iterator[str]:
    """A member and an item that are asked about twice, with different answers."""
    questions = split_questions(dataset, task, "train")
    pair = dataset.event_member[questions.events].astype(np.int64) * len(dataset.items)
    pair += dataset.event_item[questions.events]
    order = np.argsort(pair, kind="stable")
    again = np.diff(pair[order]) == 0
    differs = again & (np.diff(questions.labels[order]) != 0)
    if differs.sum() > 0.01 * len(pair):
        yield (
            f"train: {differs.sum():,} of {len(pair):,} questions repeat an earlier one of the same member and item "
            "with another answer; raise 'window_days', name the 'outcomes' that follow, or set 'repeats: false'"
        )
