"""The few shapes that passes are compiled for, and the packing of prompts into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from brewjax.data.tokens import EncodedPrompt

STEP = 128  # lengths are multiples of the attention kernel's block
TOKENS_PER_QUESTION = 4  # a pass has a place for one answer in so many tokens
LABELS_IN_PASS = 32  # different label tokens in one pass
PACK_TO = 4096  # short prompts share passes of about this many tokens


def choose_buckets(lengths: Sequence[int], at_most: int = 4) -> tuple[int, ...]:
    """Row lengths for passes over prompts of these lengths: few, and with the least padding in all.

    Exact: the best `at_most` lengths by dynamic programming over the rounded lengths that occur. Prompts are packed
    together up to `PACK_TO`, which is therefore always among them.
    """
    sizes, counts = np.unique([max(-(-length // STEP) * STEP, STEP) for length in lengths], return_counts=True)
    prompts_up_to = np.concatenate([[0], np.cumsum(counts)])
    # cost[k][j]: tokens run when the first j sizes are served by k buckets, the largest being size j - 1.
    cost = np.full((at_most + 1, len(sizes) + 1), np.inf)
    cost[:, 0] = 0
    choice = np.zeros(cost.shape, int)
    for k in range(1, at_most + 1):
        for j in range(1, len(sizes) + 1):
            options = cost[k - 1, :j] + sizes[j - 1] * (prompts_up_to[j] - prompts_up_to[:j])
            choice[k, j] = int(np.argmin(options))
            cost[k, j] = options[choice[k, j]]
    chosen, j = {PACK_TO}, len(sizes)
    for k in range(at_most, 0, -1):
        if j:
            chosen.add(int(sizes[j - 1]))
            j = choice[k, j]
    return tuple(sorted(chosen))


@dataclasses.dataclass
class Pass:
    """Prompts that share one row of `bucket` tokens: (place in the caller's list, questions done before, prompt)."""

    bucket: int
    parts: list[tuple[int, int, EncodedPrompt]]

    @property
    def tokens(self) -> int:
        return sum(len(prompt) for _, _, prompt in self.parts)


def answers_in(bucket: int) -> int:
    """How many questions a pass of this length can answer."""
    return bucket // TOKENS_PER_QUESTION


def plan_passes(prompts: Sequence[EncodedPrompt], buckets: Sequence[int]) -> list[Pass]:
    """Packs prompts, the longest first, each into the first pass with room; each pass takes its smallest bucket.

    A prompt longer than the largest bucket is split by questions; ValueError names a prompt of which not even one
    question fits.
    """
    largest = max(buckets)
    pieces: list[tuple[int, int, EncodedPrompt]] = []
    for index, prompt in enumerate(prompts):
        done = 0
        try:
            parts = prompt.split(largest, answers_in(largest))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        for part in parts:
            pieces.append((index, done, part))
            done += len(part.questions)
    pieces.sort(key=lambda piece: -len(piece[2]))
    passes: list[Pass] = []
    rooms: list[tuple[int, int, set[int]]] = []  # tokens and answers left in each pass, and its label tokens
    target = min(largest, PACK_TO)
    for piece in pieces:
        tokens, answers, labels = len(piece[2]), len(piece[2].questions), set(piece[2].labels)
        for at, (free_tokens, free_answers, others) in enumerate(rooms):
            if tokens <= free_tokens and answers <= free_answers and len(labels | others) <= LABELS_IN_PASS:
                passes[at].parts.append(piece)
                rooms[at] = (free_tokens - tokens, free_answers - answers, labels | others)
                break
        else:
            passes.append(Pass(0, [piece]))
            rooms.append((target - tokens, answers_in(target) - answers, labels))
    for one in passes:
        answers = sum(len(prompt.questions) for _, _, prompt in one.parts)
        one.bucket = min(size for size in buckets if size >= one.tokens and answers_in(size) >= answers)
    return passes
