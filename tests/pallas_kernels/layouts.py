"""Rows of packed examples for tests: built from the lengths of their pieces, or drawn by Hypothesis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from pallas_kernels.token_labels import ALL, PADDING, QUESTIONS, SELF, TokenLabels


class Example(NamedTuple):
    """Lengths of the pieces of one example, and how much padding follows it."""

    preamble: int
    events: Sequence[int] = ()
    questions: Sequence[int] = ()
    star: bool = False
    padding: int = 0


def pack(examples: Iterable[Example], length: int) -> TokenLabels:
    """int32 [length]: the examples one after the other, cut off where the row ends, padded where they do."""
    tokens = []
    for example_id, example in enumerate(examples, 1):
        pieces = [(example.preamble, ALL)]
        pieces += [(event, QUESTIONS if example.star else ALL) for event in example.events]
        pieces += [(question, SELF) for question in example.questions]
        for piece_id, (size, visibility) in enumerate(pieces):
            tokens += [(example_id, piece_id, visibility)] * size
        tokens += [(PADDING, 0, 0)] * example.padding
    tokens += [(PADDING, 0, 0)] * length
    return TokenLabels(*np.array(tokens[:length], np.int32).T)


def stack(rows: Iterable[TokenLabels]) -> TokenLabels:
    """[B, T] of rows of one length."""
    return TokenLabels(*map(np.stack, zip(*rows, strict=True)))


# Pieces of a few tokens, of exactly a block of 16 or 32, one more and one less, and longer than a block.
pieces = st.integers(1, 9) | st.sampled_from([15, 16, 17, 32, 40])
some_pieces = st.lists(pieces, max_size=6)
examples = st.builds(Example, pieces, some_pieces, some_pieces, st.booleans(), st.just(0) | st.integers(1, 40))


def rows(length: int) -> st.SearchStrategy[TokenLabels]:
    """One row [length] of any number of examples; none of them is a row of padding."""
    return st.lists(examples, max_size=6).map(lambda sample: pack(sample, length))


def batches(count: int, length: int) -> st.SearchStrategy[TokenLabels]:
    """`count` rows [count, length]."""
    return st.lists(rows(length), min_size=count, max_size=count).map(stack)
