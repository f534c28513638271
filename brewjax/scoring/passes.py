"""A pass: one forward call of the model over chunks of prompts, packed into rows of a compiled shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from pallas_kernels.token_labels import PADDING, TokenLabels

PAGE = 64  # tokens in a page of the prefix cache; a multiple of the attention kernel's block on CPU
NULL_PAGE = 0  # the page that takes writes which are never read
TOKENS_PER_QUESTION = 4  # a row has room for one candidate per so many tokens
MIN_HEAD_SIZE = 32  # questions that a head over the vocabulary computes at least: with fewer it takes hardly less time
LABELS_IN_PASS = 32  # different label tokens in one row


class Bucket(NamedTuple):
    """A compiled shape: tokens in a row, and pages of cached prefixes that a row can read."""

    tokens: int
    cached_pages: int = 0

    @property
    def max_candidates(self) -> int:
        """How many questions a row can score."""
        return self.tokens // TOKENS_PER_QUESTION

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Numbers of questions that heads over the vocabulary are compiled for, each four times the one before.

        Such a head is a large part of a pass, so it does not compute all that a row has room for.
        """
        powers = [MIN_HEAD_SIZE * 4**exponent for exponent in range(self.max_candidates.bit_length())]
        return (*(size for size in powers if size < self.max_candidates), self.max_candidates)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The share of one prompt that one pass computes: tokens of its prefix, some of its questions, or both.

    Attributes:
      owner: what the caller knows the chunk by; not used here.
      questions: indices of the questions to score; empty unless the prefix is complete after this pass.
      start, stop: the tokens of the prefix to compute; tokens before `start` are read from `cached_pages`.
      cached_pages: pages that hold the prefix up to `start`.
      new_pages: pages that keep the computed part of the prefix; empty if it is not kept.
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
        """All of a prompt in one pass, without the cache; `owner` is what the caller knows the chunk by."""
        return cls(owner, prompt, range(len(prompt.questions)), 0, prompt.prefix_length)

    @property
    def tokens(self) -> int:
        """Tokens of a row that the chunk takes: a prefix that is kept is padded to whole pages."""
        prefix = self.stop - self.start
        return (len(self.new_pages) * PAGE if self.new_pages else prefix) + len(self.question_tokens)

    @property
    def question_tokens(self) -> range:
        """Positions of the questions' tokens in the prompt's arrays."""
        starts = self.prompt.starts
        return range(int(starts[self.questions.start]), int(starts[self.questions.stop]))


@dataclasses.dataclass(frozen=True)
class Pass:
    """Chunks that share a row of one shape."""

    bucket: Bucket
    chunks: Sequence[Chunk]

    @property
    def tokens(self) -> int:
        """Tokens of the row that the chunks take."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def num_questions(self) -> int:
        """Questions that the chunks score."""
        return sum(len(chunk.questions) for chunk in self.chunks)


class PassInputs(NamedTuple):
    """Passes as int32 arrays, a row each. R rows, T tokens in a row, M cached pages, Q candidates.

    Attributes:
      tokens, positions: [R, T].
      token_labels: [R, M * PAGE + T], of the cached tokens and then of the row's own.
      ends: [R, Q], index in the row of each question's last token, in the order of the chunks; 0 is padding.
      labels: [R, LABELS_IN_PASS], label tokens; -1 is padding.
      cached_pages: [R, M], pages to read.
      new_pages: [R, T / PAGE], the page that keeps each page of the row; NULL_PAGE where it is not kept.
      label_columns: per pass, the index of each label token in its row of `labels`.
    """

    tokens: np.ndarray
    positions: np.ndarray
    token_labels: TokenLabels
    ends: np.ndarray
    labels: np.ndarray
    cached_pages: np.ndarray
    new_pages: np.ndarray
    label_columns: list[dict[int, int]]


def build_inputs(passes: Sequence[Pass], rows: int) -> PassInputs:
    """Makes the arrays of passes.

    Args:
      passes: at most `rows`, all of one bucket.
      rows: of the arrays; those without a pass are padding.

    Returns:
      The arrays.
    """
    bucket = passes[0].bucket
    cached_length = bucket.cached_pages * PAGE
    row_fields = {name: np.zeros((rows, bucket.tokens), np.int32) for name in ("tokens", "positions")}
    label_fields = {
        name: np.zeros((rows, cached_length + bucket.tokens), np.int32) for name in ("piece_id", "visibility")
    }
    example_id = np.full((rows, cached_length + bucket.tokens), PADDING, np.int32)
    ends = np.zeros((rows, bucket.max_candidates), np.int32)
    labels = np.full((rows, LABELS_IN_PASS), -1, np.int32)
    cached_pages = np.full((rows, bucket.cached_pages), NULL_PAGE, np.int32)
    new_pages = np.full((rows, bucket.tokens // PAGE), NULL_PAGE, np.int32)
    label_columns: list[dict[int, int]] = [{} for _ in passes]

    def put(row: int, number: int, start: int, chunk: Chunk, tokens: range) -> int:
        """Copies tokens of a chunk's prompt to `start` of its row; returns where they end."""
        arrays, stop, source = chunk.prompt.arrays, start + len(tokens), slice(tokens.start, tokens.stop)
        for name, field in row_fields.items():
            field[row, start:stop] = arrays[name][source]
        for name, field in label_fields.items():
            field[row, cached_length + start : cached_length + stop] = arrays[name][source]
        example_id[row, cached_length + start : cached_length + stop] = number
        return stop

    for row, pass_ in enumerate(passes):
        start = page = num_scored = 0
        # Prefixes to keep come first, where pages begin: tokens that attend to them must come later in the row.
        for number, chunk in enumerate(pass_.chunks, 1):
            if chunk.new_pages:
                put(row, number, start, chunk, range(chunk.start, chunk.stop))
                new_pages[row, start // PAGE : start // PAGE + len(chunk.new_pages)] = chunk.new_pages
                start += len(chunk.new_pages) * PAGE
        for number, chunk in enumerate(pass_.chunks, 1):
            if chunk.cached_pages:
                cached_pages[row, page : page + len(chunk.cached_pages)] = chunk.cached_pages
                cached = slice(page * PAGE, page * PAGE + chunk.start)
                example_id[row, cached] = number
                for name, field in label_fields.items():
                    field[row, cached] = chunk.prompt.arrays[name][: chunk.start]
                page += len(chunk.cached_pages)
            if not chunk.new_pages:
                start = put(row, number, start, chunk, range(chunk.start, chunk.stop))
            tokens, questions = chunk.question_tokens, chunk.questions
            stop = num_scored + len(questions)
            ends[row, num_scored:stop] = chunk.prompt.ends[questions.start : questions.stop] + start - tokens.start
            start, num_scored = put(row, number, start, chunk, tokens), stop
            for label in chunk.prompt.labels:
                label_columns[row].setdefault(label, len(label_columns[row]))
        labels[row, : len(label_columns[row])] = list(label_columns[row])
    return PassInputs(
        **row_fields,
        token_labels=TokenLabels(example_id, **label_fields),
        ends=ends,
        labels=labels,
        cached_pages=cached_pages,
        new_pages=new_pages,
        label_columns=label_columns,
    )
