"""Continuous batching: which waiting prompts share the next pass, which chunk of each, and in which compiled shape.

A prompt takes as many passes as it needs: chunks of its prefix, which pages of the cache keep, and then its questions,
as room allows. So one pass may hold a whole prompt, the questions of a member whose prefix is cached, and the first
chunk of a prefix longer than a pass, side by side.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import LABELS_IN_PASS, PAGE, TOKENS_PER_QUESTION, Bucket, Chunk, Pass
from brewjax.scoring.prefix_cache import PrefixCache, page_hashes
from brewjax.scoring.scorer import NormalizeOver


class Job:
    """A prompt to score, and its progress.

    Args:
      prompt: to score.
      normalize_over: see the attribute.
      owner: what the caller knows the job by; not used here.
      priority: see the attribute.

    Attributes:
      normalize_over: what its log-probabilities are normalized over (see `Scorer.collect`).
      priority: jobs of a higher one come first, and those of a lower one into what passes have left.
      num_cached_tokens: tokens of its prefix that were found in the cache; None before its pages are acquired.
      num_computed_tokens: tokens of its prefix that are in the cache or in passes so far.
      num_scored: questions that were put into passes so far.
      tokens_since_requeue: tokens of rows that it took since it was last moved behind all others of its priority.
      pages: pages of the cache that it holds, one for each of `page_hashes`.
    """

    def __init__(
        self, prompt: EncodedPrompt, normalize_over: NormalizeOver = "labels", owner: Any = None, priority: int = 0
    ):
        self.prompt, self.normalize_over, self.owner, self.priority = prompt, normalize_over, owner, priority
        self.page_hashes = page_hashes(prompt)
        self.num_cached_tokens: int | None = None
        self.num_computed_tokens = self.num_scored = self.tokens_since_requeue = 0
        self.pages: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether every question was put into a pass."""
        return self.num_scored == len(self.prompt.questions)

    @property
    def num_cached_pages(self) -> int:
        """Pages that its next chunk reads."""
        return _pages(self.num_computed_tokens)

    def restart(self) -> None:
        """Computes the prefix again, whose pages are lost; questions that were scored stay scored."""
        self.num_cached_tokens, self.num_computed_tokens, self.pages = None, 0, []

    def remaining_tokens(self) -> int:
        """Tokens of rows that it still needs, each question counted as `TOKENS_PER_QUESTION` or more."""
        prefix = _pages(self.prompt.prefix_length - self.num_computed_tokens) * PAGE
        num_questions = len(self.prompt.questions) - self.num_scored
        question_tokens = int(self.prompt.starts[-1] - self.prompt.starts[self.num_scored])
        return prefix + max(question_tokens, TOKENS_PER_QUESTION * num_questions)

    def min_step(self) -> int:
        """Tokens of a row that its smallest next chunk takes."""
        in_prefix = self.num_computed_tokens < self.prompt.prefix_length
        return PAGE if in_prefix else int(self.prompt.starts[self.num_scored + 1] - self.prompt.starts[self.num_scored])

    def next_chunk(self, tokens: int, max_questions: int) -> Chunk | None:
        """Advances by the largest chunk that fits.

        Args:
          tokens: free ones of a row.
          max_questions: the most questions that the row has room for.

        Returns:
          The chunk; None, without progress, if none fits.
        """
        start = self.num_computed_tokens
        first_page = self.num_cached_pages
        stop = min(start + tokens // PAGE * PAGE, self.prompt.prefix_length)
        new_pages = self.pages[first_page : first_page + _pages(stop - start)]
        questions = range(self.num_scored, self.num_scored)
        if stop == self.prompt.prefix_length:
            room = tokens - len(new_pages) * PAGE
            fit = int(np.searchsorted(self.prompt.starts, self.prompt.starts[self.num_scored] + room, side="right")) - 1
            last = min(fit, self.num_scored + max_questions, len(self.prompt.questions))
            questions = range(self.num_scored, max(self.num_scored, last))
        if stop == start and not questions:
            return None
        self.num_computed_tokens, self.num_scored = stop, questions.stop
        return Chunk(self, self.prompt, questions, start, stop, tuple(self.pages[:first_page]), tuple(new_pages))


class Scheduler:
    """The waiting jobs, and the choice of the next pass.

    Args:
      costs: seconds that a pass of each bucket takes. Every row length comes with every number of cached pages.
      cache: with as many pages as the scorer has.
    """

    def __init__(self, costs: Mapping[Bucket, float], cache: PrefixCache):
        self._costs, self._cache = costs, cache
        self._lengths = sorted({bucket.tokens for bucket in costs})
        self._page_counts = sorted({bucket.cached_pages for bucket in costs})
        self._waiting: list[Job] = []
        # Minimum seconds for so many pages of row tokens, in passes that read cached pages.
        self._min_cost = [0.0]
        for pages in range(1, 2 * self._lengths[-1] // PAGE + 1):
            options = (
                costs[Bucket(length, self._page_counts[-1])] + self._min_cost[max(0, pages - length // PAGE)]
                for length in self._lengths
            )
            self._min_cost.append(min(options))

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._waiting)

    @property
    def tokens(self) -> int:
        """Tokens of rows that the waiting jobs need. A cached prefix is subtracted only once its pages are acquired."""
        return sum(job.remaining_tokens() for job in self._waiting)

    def check(self, prompt: EncodedPrompt) -> None:
        """Checks that a prompt can be scored.

        Args:
          prompt: to score.

        Raises:
          ValueError: no sequence of passes can score it.
        """
        limit = min(self._page_counts[-1], self._cache.capacity) * PAGE
        if prompt.prefix_length > limit:
            raise ValueError(
                f"the prefix has {prompt.prefix_length:,} tokens, over the limit of {limit:,} (max_prefix_tokens)"
            )
        longest = max(map(len, prompt.questions))
        if longest > self._lengths[-1]:
            raise ValueError(
                f"an item has {longest:,} tokens, over the longest row of {self._lengths[-1]:,} (token_buckets)"
            )

    def add(self, job: Job) -> None:
        """Queues a job, behind all others of its priority."""
        bisect.insort_right(self._waiting, job, key=lambda waiting: -waiting.priority)

    def remove(self, job: Job) -> None:
        """Drops a job and releases its pages; results of its passes in flight are ignored."""
        self._waiting.remove(job)
        self._cache.release(job.pages)

    def invalidate(self) -> None:
        """Drops all cached prefixes; jobs that used them compute theirs again."""
        for job in self._waiting:
            job.restart()
        self._cache.clear()

    def next_pass(self) -> Pass | None:
        """Makes the next pass, which must be dispatched before this is called again.

        Returns:
          The pass, whose chunks are owned by their jobs; None if no job can run.
        """
        admitted = self._admit()
        if not admitted:
            return None
        bucket = self._choose_bucket(admitted)
        chunks = self._fill(bucket, admitted)
        for chunk in chunks:
            job, first = chunk.owner, len(chunk.cached_pages)
            self._cache.commit(job.page_hashes[first : first + len(chunk.new_pages)], chunk.new_pages)
            job.tokens_since_requeue += chunk.tokens
            if job.finished:
                self._waiting.remove(job)
                self._cache.release(job.pages)
            elif job.tokens_since_requeue >= self._lengths[-1]:
                # After the tokens of a whole pass a job goes behind its equals: long lists delay no others.
                job.tokens_since_requeue = 0
                self._waiting.remove(job)
                self.add(job)
        return Pass(bucket, chunks)

    def _fill(self, bucket: Bucket, admitted: list[Job]) -> list[Chunk]:
        """The next chunk of each job, in order, as far as there is room in the bucket."""
        chunks: list[Chunk] = []
        tokens, candidates, pages = bucket.tokens, bucket.max_candidates, bucket.cached_pages
        labels = set[int]()
        for job in admitted:
            if job.num_cached_pages > pages or len(labels | set(job.prompt.labels)) > LABELS_IN_PASS:
                continue
            if chunk := job.next_chunk(tokens, candidates):
                chunks.append(chunk)
                tokens -= chunk.tokens
                candidates -= len(chunk.questions)
                pages -= len(chunk.cached_pages)
                labels |= set(job.prompt.labels)
        return chunks

    def _admit(self) -> list[Job]:
        """Jobs that have all their pages, in queue order, until they fill the largest pass.

        Pages are acquired all or nothing, which rules out deadlock. If the first job that needs pages cannot get them,
        no later job is admitted either (those already admitted go on), so that pages free up for it. A job whose
        prefix is being computed by another waits and then hits the cache.
        """
        admitted, in_progress, may_acquire = [], set[bytes](), True
        tokens = 0
        for job in self._waiting:
            if tokens >= self._lengths[-1]:
                break
            if job.num_cached_tokens is None:
                if not may_acquire or in_progress & set(job.page_hashes):
                    continue
                acquired = self._cache.acquire(job.page_hashes)
                if acquired is None:
                    may_acquire = False
                    continue
                job.pages, hits = acquired
                job.num_computed_tokens = job.num_cached_tokens = min(hits * PAGE, job.prompt.prefix_length)
            in_progress |= set(job.page_hashes[job.num_cached_pages :])
            admitted.append(job)
            tokens += job.remaining_tokens()
        return admitted

    def _choose_bucket(self, admitted: list[Job]) -> Bucket:
        """The first bucket of the cheapest sequence of passes for all jobs, with pages for all or the maximum."""
        pages = sum(job.num_cached_pages for job in admitted)
        cached_pages = next((count for count in self._page_counts if count >= pages), self._page_counts[-1])
        remaining = min(_pages(sum(job.remaining_tokens() for job in admitted)), len(self._min_cost) - 1)
        lengths = [length for length in self._lengths if length >= admitted[0].min_step()]
        return min(
            (Bucket(length, cached_pages) for length in lengths),
            key=lambda bucket: self._costs[bucket] + self._min_cost[max(0, remaining - bucket.tokens // PAGE)],
        )


def _pages(tokens: int) -> int:
    return math.ceil(tokens / PAGE)
