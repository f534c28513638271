"""What one run of the model computes: prompts, or parts of them, side by side in rows of a compiled shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from pallas_kernels.token_labels import PADDING, TokenLabels

PAGE = 64  # tokens in a page of the prefix cache; a multiple of the attention kernel's block on CPU
NULL_PAGE = 0  # the page that takes what nobody will read
TOKENS_PER_QUESTION = 4  # a pass has a place for one answer in so many tokens
LABELS_IN_PASS = 32  # different label tokens in one row


class Bucket(NamedTuple):
    """A shape that passes are compiled for: tokens in a row, and pages of cached prefixes that they go on from."""

    tokens: int
    cached_pages: int = 0

    @property
    def max_candidates(self) -> int:
        """How many questions a row can answer."""
        return self.tokens // TOKENS_PER_QUESTION


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a pass does of one prompt: a stretch of its prefix, some of its questions, or both.

    Attributes:
      owner: whose it is; means nothing here.
      questions: which are answered; none unless the prefix is complete by then.
      start, stop: the tokens of the prefix that are computed; those before `start` are in the pages `past`.
      store: the pages that keep what is computed of the prefix; none: it is not kept.
    """

    owner: Any
    prompt: EncodedPrompt
    questions: range
    start: int
    stop: int
    cached_pages: tuple[int, ...] = ()
    new_pages: tuple[int, ...] = ()

    @classmethod
    def whole(cls, owner: Any, prompt: EncodedPrompt) -> Chunk:
        return cls(owner, prompt, range(len(prompt.questions)), 0, prompt.prefix_length)

    @property
    def tokens(self) -> int:
        """What it takes of a row: a stretch that is kept is filled up to whole pages."""
        prefix = self.stop - self.start
        return (len(self.new_pages) * PAGE if self.new_pages else prefix) + len(self.question_tokens)

    @property
    def question_tokens(self) -> range:
        """Where the tokens of its questions stand in the prompt."""
        starts = self.prompt.starts
        return range(int(starts[self.questions.start]), int(starts[self.questions.stop]))


@dataclasses.dataclass(frozen=True)
class Pass:
    """Parts that share a row of one shape."""

    bucket: Bucket
    chunks: Sequence[Chunk]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.chunks)


class PassInputs(NamedTuple):
    """Passes as arrays, a row each; the first axis is rows but for `columns`.

    Attributes:
      token_labels: labels of the cached tokens, and then of the row's own.
      ends: int32 [R, answers], where the questions end, in the order of the parts.
      labels: int32 [R, LABELS_IN_PASS], label tokens; -1 is none.
      pages: int32 [R, past]; store: int32 [R, tokens / PAGE].
      columns: per row, the place of each label token in `labels`.
    """

    tokens: np.ndarray
    positions: np.ndarray
    token_labels: TokenLabels
    ends: np.ndarray
    labels: np.ndarray
    pages: np.ndarray
    store: np.ndarray
    columns: list[dict[int, int]]


def build_inputs(passes: Sequence[Pass], rows: int) -> PassInputs:
    """Arrays of at most `rows` passes of one bucket; rows without a pass are padding."""
    bucket = passes[0].bucket
    before = bucket.cached_pages * PAGE
    own = {name: np.zeros((rows, bucket.tokens), np.int32) for name in ("tokens", "positions")}
    seen = {name: np.zeros((rows, before + bucket.tokens), np.int32) for name in ("piece_id", "visibility")}
    example = np.full((rows, before + bucket.tokens), PADDING, np.int32)
    ends = np.zeros((rows, bucket.max_candidates), np.int32)
    labels = np.full((rows, LABELS_IN_PASS), -1, np.int32)
    pages = np.full((rows, bucket.cached_pages), NULL_PAGE, np.int32)
    store = np.full((rows, bucket.tokens // PAGE), NULL_PAGE, np.int32)
    columns: list[dict[int, int]] = [{} for _ in passes]

    def put(row: int, number: int, start: int, part: Chunk, tokens: range) -> int:
        """Tokens of a part's prompt at `start` of its row; returns where they end."""
        arrays, stop, source = part.prompt.arrays, start + len(tokens), slice(tokens.start, tokens.stop)
        for name, field in own.items():
            field[row, start:stop] = arrays[name][source]
        for name, field in seen.items():
            field[row, before + start : before + stop] = arrays[name][source]
        example[row, before + start : before + stop] = number
        return stop

    for row, one in enumerate(passes):
        start = page = answered = 0
        # Kept prefixes first, where pages begin; whatever sees them comes later in the row.
        for number, part in enumerate(one.chunks, 1):
            if part.new_pages:
                put(row, number, start, part, range(part.start, part.stop))
                store[row, start // PAGE : start // PAGE + len(part.new_pages)] = part.new_pages
                start += len(part.new_pages) * PAGE
        for number, part in enumerate(one.chunks, 1):
            if part.cached_pages:
                pages[row, page : page + len(part.cached_pages)] = part.cached_pages
                cached = slice(page * PAGE, page * PAGE + part.start)
                example[row, cached] = number
                for name, field in seen.items():
                    field[row, cached] = part.prompt.arrays[name][: part.start]
                page += len(part.cached_pages)
            if not part.new_pages:
                start = put(row, number, start, part, range(part.start, part.stop))
            asked, stop = part.question_tokens, answered + len(part.questions)
            ends[row, answered:stop] = (
                part.prompt.ends[part.questions.start : part.questions.stop] + start - asked.start
            )
            start, answered = put(row, number, start, part, asked), stop
            for label in part.prompt.labels:
                columns[row].setdefault(label, len(columns[row]))
        labels[row, : len(columns[row])] = list(columns[row])
    return PassInputs(
        **own,
        token_labels=TokenLabels(example, **seen),
        ends=ends,
        labels=labels,
        pages=pages,
        store=store,
        columns=columns,
    )
