"""Makes ranking examples from events: a cutoff time of a member, the history before it, and candidates from it on.

Every example is point-in-time correct: what happens at or after its cutoff time is invisible to it.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from brewjax.data.tables.dataset import FOREVER, Dataset
from brewjax.data.tables.partition import Partition
from brewjax.data.tables.point_in_time import DAY
from brewjax.data.tasks.chunks import cut_chunks
from brewjax.data.tasks.negatives import NegativeSampler
from brewjax.data.tasks.questions import Questions, eligible_items, split_period, split_questions
from brewjax.data.tasks.task import Split, Task

NO_REQUEST, NO_EVENT = -1, -1


@dataclasses.dataclass(frozen=True)
class RankingExample:
    """One context (a member's history) and its candidates, as rows of the dataset's tables.

    Attributes:
      task: the task's name.
      member: row of the member.
      cutoff_time: microseconds since 1970; every event of `history` is strictly older, no candidate's event is.
      history: int64 [events], rows of the events in the history, oldest first.
      num_past_events: how many events the member had before the cutoff time, in the history or not.
      candidates: int32 [candidates], rows of the items to rank.
      labels: int32 [candidates], indices into `Task.labels`; -1 if the answer is unknown.
      exposures: int64 [candidates], rows of the events that are asked about, for the context of the questions: a
        sampled negative has that of the event it was sampled for; -1 for none.
      soft_labels: float32 [candidates, labels], the probabilities that another ranker gives the answers, to learn from;
        None if there are none.
      request: the request whose list the candidates are, by number (`Dataset.event_request`); -1 for none.
      member_facts, candidate_facts: by key, the numbers of the member's facts, float64 [1], and of the candidates',
        float64 [candidates], where they were computed for many examples at once; see `Verbalizer.with_facts`.
      seed: of whatever is chosen at random about the example: a hash of the caller's seed, the member and the cutoff
        time, the same wherever the member stands in the tables.
    """

    task: str
    member: int
    cutoff_time: int
    history: np.ndarray
    num_past_events: int
    candidates: np.ndarray
    labels: np.ndarray
    exposures: np.ndarray
    request: int = NO_REQUEST
    soft_labels: np.ndarray | None = None
    member_facts: Mapping[str, np.ndarray] | None = None
    candidate_facts: Mapping[str, np.ndarray] | None = None
    seed: int = 0

    def select(self, indices: slice | np.ndarray) -> RankingExample:
        """The same context with some of its candidates, by `indices`: positions, a mask or a slice."""
        facts = self.candidate_facts
        return dataclasses.replace(
            self,
            candidates=self.candidates[indices],
            labels=self.labels[indices],
            exposures=self.exposures[indices],
            soft_labels=None if self.soft_labels is None else self.soft_labels[indices],
            candidate_facts=None if facts is None else {key: numbers[indices] for key, numbers in facts.items()},
        )


class Choice(NamedTuple):
    """A multiple-choice question, answered by an item's name.

    Attributes:
      items: int32 [items], rows of the items to choose from, in the order of the prompt.
      correct: index in `items` of the answer.
    """

    items: np.ndarray
    correct: int


def history_before(dataset: Dataset, task: Task, member: int, cutoff_time: int) -> tuple[np.ndarray, int]:
    """The history of a member as of a time.

    Args:
      dataset: the tables.
      task: says which actions its history has, and how many events of which age.
      member: row of the member.
      cutoff_time: microseconds since 1970.

    Returns:
      int64 [events]: rows of the events that the task's history holds, oldest first; and how many events of the member
      precede the cutoff time, in the history or not.
    """
    start, end = dataset.member_offsets[member : member + 2]
    num_past_events = int(np.searchsorted(dataset.event_time[start:end], cutoff_time, side="left"))
    rows, offsets = dataset.member_rows(task.history.actions)
    rows = rows[offsets[member] : offsets[member + 1]]
    rows = rows[: np.searchsorted(rows, start + num_past_events)]
    if task.history.max_age_days is not None:
        oldest = cutoff_time - int(task.history.max_age_days * DAY)
        rows = rows[np.searchsorted(dataset.event_time[rows], oldest) :]
    return rows[max(0, len(rows) - task.history.max_events) :], num_past_events


def example_at(dataset: Dataset, task: Task, member: int, time: int | None = None) -> RankingExample:
    """Makes an example of a member as of a time, with every item that the task could ask about then as a candidate.

    These are the items within their lives, which fulfil the task's conditions, and which are new to the member unless
    the task asks repeats.

    Args:
      dataset: the tables.
      task: what is asked of them.
      member: row of the member.
      time: microseconds since 1970; by default just after the last event of the dataset.

    Returns:
      The example; its labels are -1, unknown.

    Raises:
      ValueError: no item is left.
    """
    cutoff_time = dataset.last_event_time + 1 if time is None else time
    every_item = unanswered(dataset, task, member, cutoff_time, np.arange(len(dataset.items), dtype=np.int32))
    begins, ends = dataset.item_life
    if task.side_of(dataset.card).items.available is None:
        # Whoever ranks names the items: that they exist is then known.
        begins = np.where(dataset.first_event_time >= FOREVER, -FOREVER, begins)
    eligible = (begins <= cutoff_time) & (cutoff_time < ends) & eligible_items(dataset, task)
    if not task.questions.repeats:
        start = dataset.member_offsets[member]
        eligible[dataset.event_item[start : start + every_item.num_past_events]] = False
    if not eligible.any():
        new = "" if task.questions.repeats else ", new to the member"
        raise ValueError(f"there is no item to rank: none exists at that time{new} and fulfils the task's conditions")
    return every_item.select(eligible)


def unanswered(dataset: Dataset, task: Task, member: int, cutoff_time: int, candidates: np.ndarray) -> RankingExample:
    """An example of a member as of a time, whose answers are not known.

    Args:
      dataset: the tables.
      task: what is asked of them.
      member: row of the member.
      cutoff_time: microseconds since 1970.
      candidates: int32 [candidates], rows of the items.

    Returns:
      The example; its labels and exposures are -1, unknown.
    """
    history, num_past_events = history_before(dataset, task, member, cutoff_time)
    unknown = np.full(len(candidates), -1, np.int32)
    return RankingExample(
        task.name, member, cutoff_time, history, num_past_events, candidates, unknown, unknown.astype(np.int64)
    )


def build_examples(dataset: Dataset, task: Task, split: Split, seed: int = 0) -> Iterator[RankingExample]:
    """Yields every question of a split exactly once, with sampled negatives.

    A member's questions are cut into consecutive chunks; each becomes one example whose cutoff time is that of its
    first event. The events of a chunk lie within the task's `span_days`, and are at most min(candidates_per_prompt,
    max(events before it, MIN_CANDIDATES_PER_EXAMPLE)): later candidates of a chunk see an older history, and this
    bounds how old, and keeps short histories as frequent as they are in serving. If the task asks by request, the
    questions of each request are a chunk.

    History is strictly older than the cutoff time, so no prompt holds an event of a later split, or a candidate's own.

    Args:
      dataset: the tables.
      task: what is asked of them.
      split: "train", "validation" or "test".
      seed: of the sampled negatives, which depend on nothing else but the task, the member and the cutoff time.

    Returns:
      An iterator of examples, a member's in order of time.

    Raises:
      ConfigError: an event matches two labels.
    """
    return SplitExamples.of(dataset, task, split).build(None, seed)


def sample_examples(
    dataset: Dataset,
    task: Task,
    split: Split,
    max_examples: int | None = None,
    seed: int = 0,
    partition: Partition | None = None,
) -> list[RankingExample]:
    """The examples of a split; if there are more than `max_examples`, those with the smallest hashes.

    The hashes are of seed, member and cutoff time: tasks with the same questions get the same examples. They keep
    their order, and no other example is built.

    Args:
      dataset: the tables.
      task: what is asked of them.
      split: "train", "validation" or "test".
      max_examples: the most that are returned; None for all.
      seed: of the choice, and of the sampled negatives.
      partition: only the examples of its members, in order of the hashes of the members' ids.

    Returns:
      The examples, as `build_examples` yields them.

    Raises:
      ConfigError: an event matches two labels.
    """
    return list(SplitExamples.of(dataset, task, split).build(max_examples, seed, partition))


class SplitExamples:
    """The examples of a split, before they are built: which questions each of them has."""

    @classmethod
    def of(cls, dataset: Dataset, task: Task, split: Split) -> SplitExamples:
        """The examples of a dataset's split, found once for it."""
        known = dataset.__dict__.setdefault("_split_examples", {})
        key = (task.model_dump_json(), split)
        if key not in known:
            known[key] = cls(dataset, task, split)
        return known[key]

    def __init__(self, dataset: Dataset, task: Task, split: Split):
        self._dataset, self._task = dataset, task
        self._questions, self._starts, self._stops = cut_chunks(dataset, task, split_questions(dataset, task, split))
        _, self._end = split_period(dataset, task, split)
        self._sampled: dict[tuple[int | None, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._starts)

    @cached_property
    def sampler(self) -> NegativeSampler | None:
        """Draws the negatives; None if the task has no sampled ones."""
        return NegativeSampler(self._dataset, self._task) if self._task.questions.sampled_negatives else None

    def build(
        self, max_examples: int | None, seed: int, partition: Partition | None = None
    ) -> Iterator[RankingExample]:
        """Builds the examples; see `sample_examples`.

        Args:
          max_examples: the most that are yielded; None for all.
          seed: of the choice, and of the sampled negatives.
          partition: only the examples of its members, in order of the hashes of the members' ids.

        Yields:
          Each example that has a candidate.
        """
        chunks = self._sample(max_examples, seed)
        if partition:
            order, member_hashes = self._by_member_hash
            of_partition = order[partition.select(member_hashes)]
            chunks = of_partition[np.isin(of_partition, chunks)]
        events = self._questions.events[self._starts[chunks]]
        hashes = _hash(self._dataset, events, self._places[chunks], seed)
        for chunk, example_seed in zip(chunks.tolist(), hashes.tolist(), strict=True):
            of_chunk = slice(self._starts[chunk], self._stops[chunk])
            example = _build(
                self._dataset, self._task, self._questions, of_chunk, self.sampler, example_seed, self._end
            )
            if len(example.candidates):
                yield example

    def _sample(self, max_examples: int | None, seed: int) -> np.ndarray:
        """int64 [examples]: the chunks that are examples, in their order."""
        if max_examples is None or len(self) <= max_examples:
            return np.arange(len(self))
        if (max_examples, seed) not in self._sampled:
            hashes = _hash(self._dataset, self._questions.events[self._starts], self._places, seed)
            smallest = np.argpartition(hashes, max_examples - 1)[:max_examples]
            self._sampled[max_examples, seed] = np.sort(smallest)
        return self._sampled[max_examples, seed]

    @cached_property
    def _places(self) -> np.ndarray:
        """int64 [chunks]: tells the chunks of one member and time apart, by their place among them."""
        events = self._questions.events[self._starts]
        member, time = self._dataset.event_member[events], self._dataset.event_time[events]
        group = np.cumsum((np.diff(time, prepend=-1) != 0) | (np.diff(member, prepend=-1) != 0))
        return np.arange(len(events)) - np.searchsorted(group, group)

    @cached_property
    def _by_member_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """The chunks in order of their members' hashes, those of a member in order of time; and these hashes."""
        hashes = self._dataset.member_hash[self._dataset.event_member[self._questions.events[self._starts]]]
        order = np.argsort(hashes, kind="stable")
        return order, hashes[order]


def _build(
    dataset: Dataset,
    task: Task,
    questions: Questions,
    chunk: slice,
    sampler: NegativeSampler | None,
    seed: int,
    split_end: int,
) -> RankingExample:
    events, labels = questions.events[chunk], questions.labels[chunk]
    member, cutoff_time = int(dataset.event_member[events[0]]), int(dataset.event_time[events].min())
    history, num_past_events = history_before(dataset, task, member, cutoff_time)
    negatives = task.questions.sampled_negatives
    if sampler and negatives:
        # As for the time of the question itself, in `find_questions`.
        begins, _ = dataset.item_life
        exists = begins[dataset.event_item[events]] <= cutoff_time
        events, labels = events[exists], labels[exists]
    candidates = dataset.event_item[events]
    if sampler and negatives and len(events):
        start, stop = dataset.member_offsets[member : member + 2]
        times = dataset.event_time[start:stop]
        # Items that the member acts on later are excluded up to the end of the split, but not beyond: their absence
        # would give later events away. If repeats are asked, only what the member does next is excluded.
        since = np.searchsorted(times, cutoff_time) if task.questions.asks_repeats else 0
        until = cutoff_time + int(task.questions.span_days * DAY) + 1 if task.questions.asks_repeats else split_end
        touched = dataset.event_item[start + since : start + np.searchsorted(times, until)]
        rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
        sampled, of_event = sampler.draw(rng, candidates, touched, cutoff_time)
        candidates = np.concatenate([candidates, sampled])
        labels = np.concatenate([labels, np.full(len(sampled), task.words.index(negatives.label))])
        events = np.concatenate([events, events[of_event]])
    request = int(dataset.event_request[events[0]]) if task.questions.per_request and len(events) else NO_REQUEST
    return RankingExample(
        task.name,
        member,
        cutoff_time,
        history,
        num_past_events,
        candidates.astype(np.int32),
        labels.astype(np.int32),
        events.astype(np.int64),
        request,
        seed=seed,
    )


def _hash(dataset: Dataset, events: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
    """uint64 hashes of chunks by seed, the member and time of their first events, and `SplitExamples._places`
    (splitmix64: Steele et al., OOPSLA 2014)."""
    member, time = dataset.event_member[events], dataset.event_time[events]
    state = np.full(len(events), seed, np.uint64)
    with np.errstate(over="ignore"):
        for part in (dataset.member_hash[member], time.astype(np.uint64), places.astype(np.uint64)):
            state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
