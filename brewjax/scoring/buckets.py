"""Which shapes to compile for a list of prompts, and how to pack the prompts into passes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import LABELS_IN_PASS, Bucket, Chunk, Pass

STEP = 128  # lengths are multiples of the attention kernel's block
PACK_TO = 4096  # short prompts share passes of about this many tokens


def choose_buckets(lengths: Sequence[int], at_most: int = 4) -> tuple[Bucket, ...]:
    """Rows for passes over prompts of these lengths: few, and with the least padding in all.

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
    return tuple(Bucket(tokens) for tokens in sorted(chosen))


def plan_passes(prompts: Sequence[EncodedPrompt], buckets: Sequence[Bucket]) -> list[Pass]:
    """Packs prompts, the longest first, each into the first pass with room; each pass takes its smallest bucket.

    A prompt longer than the largest bucket is split by questions. The owner of a part is (the prompt's place in
    `prompts`, how many of its questions are in parts before). ValueError names a prompt of which not even one
    question fits.
    """
    largest = max(buckets)
    pieces: list[Chunk] = []
    for index, prompt in enumerate(prompts):
        done = 0
        try:
            split = prompt.split(largest.tokens, largest.max_candidates)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        for piece in split:
            pieces.append(Chunk.whole((index, done), piece))
            done += len(piece.questions)
    pieces.sort(key=lambda part: -part.tokens)
    passes: list[list[Chunk]] = []
    rooms: list[tuple[int, int, set[int]]] = []  # tokens and answers left in each pass, and its label tokens
    target = Bucket(min(largest.tokens, PACK_TO))
    for part in pieces:
        answers, labels = len(part.questions), set(part.prompt.labels)
        for at, (free_tokens, free_answers, others) in enumerate(rooms):
            if part.tokens <= free_tokens and answers <= free_answers and len(labels | others) <= LABELS_IN_PASS:
                passes[at].append(part)
                rooms[at] = (free_tokens - part.tokens, free_answers - answers, labels | others)
                break
        else:
            passes.append([part])
            rooms.append((target.tokens - part.tokens, target.max_candidates - answers, labels))
    return [Pass(_smallest(buckets, parts), parts) for parts in passes]


def _smallest(buckets: Sequence[Bucket], parts: Sequence[Chunk]) -> Bucket:
    tokens, answers = sum(part.tokens for part in parts), sum(len(part.questions) for part in parts)
    return min(bucket for bucket in buckets if bucket.tokens >= tokens and bucket.max_candidates >= answers)
