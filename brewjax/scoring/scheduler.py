"""Continuous batching: which waiting prompts share the next pass, what of them, and in which compiled shape.

A prompt is done over as many passes as it needs: stretches of its prefix, which the pages of the cache keep, and then
its questions, as room is left. So a pass may hold the whole of one prompt, the questions of a member whose prefix is
cached, and the beginning of a prefix longer than a pass, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import LABELS_IN_PASS, PAGE, TOKENS_PER_QUESTION, Bucket, Chunk, Pass
from brewjax.scoring.prefix_cache import PrefixCache, page_hashes
from brewjax.scoring.scorer import NormalizeOver


class Job:
    """A prompt to be scored, and how far it is.

    Attributes:
      against: what its log-probabilities are to be normalised over (see `Scorer.finish`).
      hits: how many of its prefix's tokens were found in the cache; None before it is begun.
      asked: how many of its questions were put into passes.
      turn: places of rows that it had since it last was put at the end of the line.
    """

    def __init__(self, prompt: EncodedPrompt, against: NormalizeOver = "labels", owner: Any = None):
        self.prompt, self.normalize_over, self.owner = prompt, against, owner
        self.page_hashes = page_hashes(prompt)
        self.num_cached_tokens: int | None = None
        self.num_computed_tokens = self.num_scored = self.tokens_since_requeue = 0
        self.pages: list[int] = []

    @property
    def finished(self) -> bool:
        return self.num_scored == len(self.prompt.questions)

    @property
    def past(self) -> int:
        """How many pages it goes on from."""
        return _pages(self.num_computed_tokens)

    def restart(self) -> None:
        """What is cached of its prefix is lost; it goes on with the questions that were not asked yet."""
        self.num_cached_tokens, self.num_computed_tokens, self.pages = None, 0, []

    def left(self) -> int:
        """Places of rows that it still takes."""
        prefix = _pages(self.prompt.prefix_length - self.num_computed_tokens) * PAGE
        answers = len(self.prompt.questions) - self.num_scored
        return prefix + max(
            int(self.prompt.starts[-1] - self.prompt.starts[self.num_scored]), TOKENS_PER_QUESTION * answers
        )

    def least(self) -> int:
        """Places that the smallest step on takes."""
        in_prefix = self.num_computed_tokens < self.prompt.prefix_length
        return PAGE if in_prefix else int(self.prompt.starts[self.num_scored + 1] - self.prompt.starts[self.num_scored])

    def step(self, tokens: int, answers: int) -> Chunk | None:
        """As much as there is room for; None where that is nothing."""
        start, past = self.num_computed_tokens, self.past
        stop = min(start + tokens // PAGE * PAGE, self.prompt.prefix_length)
        store = self.pages[past : past + _pages(stop - start)]
        questions = range(self.num_scored, self.num_scored)
        if stop == self.prompt.prefix_length:
            room = tokens - len(store) * PAGE
            fit = int(np.searchsorted(self.prompt.starts, self.prompt.starts[self.num_scored] + room, side="right")) - 1
            questions = range(
                self.num_scored, max(self.num_scored, min(fit, self.num_scored + answers, len(self.prompt.questions)))
            )
        if stop == start and not questions:
            return None
        self.num_computed_tokens, self.num_scored = stop, questions.stop
        return Chunk(self, self.prompt, questions, start, stop, tuple(self.pages[:past]), tuple(store))


class Scheduler:
    """The jobs that wait.

    Args:
      costs: seconds that a pass of each bucket takes. Every row length comes with every length of past.
      cache: of as many pages as the scorer has.
    """

    def __init__(self, costs: Mapping[Bucket, float], cache: PrefixCache):
        self._costs, self._cache = costs, cache
        self._lengths = sorted({bucket.tokens for bucket in costs})
        self._pasts = sorted({bucket.cached_pages for bucket in costs})
        self._waiting: list[Job] = []
        # The least seconds for so many pages' worth of places, in passes that go on from something.
        self._least_cost = [0.0]
        for pages in range(1, 2 * self._lengths[-1] // PAGE + 1):
            options = (
                costs[Bucket(length, self._pasts[-1])] + self._least_cost[max(0, pages - length // PAGE)]
                for length in self._lengths
            )
            self._least_cost.append(min(options))

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._waiting)

    @property
    def tokens(self) -> int:
        """Places of rows that the waiting jobs take, a cached prefix counted only once it is found."""
        return sum(job.left() for job in self._waiting)

    def check(self, prompt: EncodedPrompt) -> None:
        """Raises ValueError for a prompt that no sequence of passes can score."""
        if prompt.prefix_length > (limit := min(self._pasts[-1], self._cache.capacity) * PAGE):
            raise ValueError(f"a prefix of {prompt.prefix_length} tokens; at most {limit} are served")
        longest = max(map(len, prompt.questions))
        if longest > self._lengths[-1]:
            raise ValueError(f"an item of {longest} tokens; at most {self._lengths[-1]} are served")

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def remove(self, job: Job) -> None:
        """Nobody waits for it any more; what is under way of it is lost."""
        self._waiting.remove(job)
        self._cache.release(job.pages)

    def invalidate(self) -> None:
        """Forgets what is cached; the jobs that began with it begin anew."""
        for job in self._waiting:
            job.restart()
        self._cache.clear()

    def next_pass(self) -> Pass | None:
        """The next pass, to be started before this is called again; None where there is nothing for it."""
        begun = self._begin()
        if not begun:
            return None
        bucket = self._choose(begun)
        parts: list[Chunk] = []
        tokens, answers, past, labels = bucket.tokens, bucket.max_candidates, bucket.cached_pages, set[int]()
        for job in begun:
            if job.past > past or len(labels | set(job.prompt.labels)) > LABELS_IN_PASS:
                continue
            if part := job.step(tokens, answers):
                parts.append(part)
                tokens, answers, past = (
                    tokens - part.tokens,
                    answers - len(part.questions),
                    past - len(part.cached_pages),
                )
                labels |= set(job.prompt.labels)
        for part in parts:
            job, first = part.owner, len(part.cached_pages)
            self._cache.commit(job.page_hashes[first : first + len(part.new_pages)], part.new_pages)
            job.tokens_since_requeue += part.tokens
            if job.finished:
                self._waiting.remove(job)
                self._cache.release(job.pages)
            elif job.tokens_since_requeue >= self._lengths[-1]:
                # Who had the places of a whole pass goes to the end of the line: a long list does not hold up others.
                job.tokens_since_requeue = 0
                self._waiting.remove(job)
                self._waiting.append(job)
        return Pass(bucket, parts)

    def _begin(self) -> list[Job]:
        """Jobs, in their order, that have all their pages: enough of them for the largest pass.

        A job takes up all pages of its prefix or none, so that no two can wait for each other; where there are too few
        for it, none behind it begins, so that there will be enough. One whose prefix is just being computed for another
        waits to find it in the cache.
        """
        begun, filling, new = [], set[bytes](), True
        tokens = 0
        for job in self._waiting:
            if tokens >= self._lengths[-1]:
                break
            if job.num_cached_tokens is None:
                if not new:
                    continue
                if filling & set(job.page_hashes):
                    continue
                held = self._cache.acquire(job.page_hashes)
                if held is None:
                    new = False
                    continue
                job.pages, hits = held
                job.num_computed_tokens = job.num_cached_tokens = min(hits * PAGE, job.prompt.prefix_length)
            filling |= set(job.page_hashes[job.past :])
            begun.append(job)
            tokens += job.left()
        return begun

    def _choose(self, begun: list[Job]) -> Bucket:
        """The row length that begins the cheapest way to do all of them, with enough past for them or the most."""
        pages = sum(job.past for job in begun)
        past = next((past for past in self._pasts if past >= pages), self._pasts[-1])
        left = min(_pages(sum(job.left() for job in begun)), len(self._least_cost) - 1)
        lengths = [length for length in self._lengths if length >= begun[0].least()]
        return min(
            (Bucket(length, past) for length in lengths),
            key=lambda bucket: self._costs[bucket] + self._least_cost[max(0, left - bucket.tokens // PAGE)],
        )


def _pages(tokens: int) -> int:
    return math.ceil(tokens / PAGE)
