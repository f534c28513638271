"""The layouts that attention is judged on, as `TokenLabels` of [1, T]."""

from __future__ import annotations

import numpy as np

from pallas_kernels.token_labels import ALL, QUESTIONS, SELF, TokenLabels


def example(
    preamble: int, events: list[int], questions: list[int], star: bool = False, example_id: int = 1
) -> np.ndarray:
    """int32 [tokens, 3]: example id, piece id and visibility of each token of one example."""
    pieces = [(preamble, ALL), *((size, QUESTIONS if star else ALL) for size in events)]
    pieces += [(size, SELF) for size in questions]
    labels = [(example_id, piece_id, visibility) for piece_id, (_, visibility) in enumerate(pieces)]
    return np.repeat(np.array(labels, np.int32), [size for size, _ in pieces], axis=0)


def packed(length: int) -> np.ndarray:
    """A training row: members with 5 to 40 events and 1 to 30 questions, until it is full."""
    random, rows, used = np.random.default_rng(0), [], 0
    while used < length:
        events, questions = (
            random.integers(20, 50, random.integers(5, 40)),
            random.integers(30, 50, random.integers(1, 30)),
        )
        rows.append(example(120, events.tolist(), questions.tolist(), example_id=len(rows) + 1))
        used += len(rows[-1])
    return np.concatenate(rows)[:length]


STAR, PACKED = "star: 16k in events of 40, 100 x 40", "packed training row of 16k"
LAYOUTS = {
    "4096 + 500 x 64": lambda: example(4096, [], [64] * 500),
    "12288 + 50 x 150": lambda: example(12288, [], [150] * 50),
    STAR: lambda: example(64, [40] * 408, [40] * 100, star=True),
    PACKED: lambda: packed(16384),
    "plain causal 16k": lambda: example(16384, [], []),
}


def make_labels(name: str) -> TokenLabels:
    return TokenLabels(*LAYOUTS[name]().T[:, None])
