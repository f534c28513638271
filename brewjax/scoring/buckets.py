"""Which shapes to compile for a list of prompts, and how to pack the prompts into passes of these shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import LABELS_IN_PASS, Bucket, Chunk, Pass

STEP = 128  # lengths are multiples of the attention kernel's block
PACK_TO = 4096  # short prompts share passes of about this many tokens


def choose_buckets(lengths: Sequence[int], max_buckets: int = 4) -> tuple[Bucket, ...]:
    """Row lengths for passes over prompts of these lengths: few, and with the least padding in total.

    Exact: the best lengths by dynamic programming over the rounded lengths that occur.

    Args:
      lengths: tokens of each prompt.
      max_buckets: how many lengths to choose.

    Returns:
      buckets in ascending order. `PACK_TO` is always among them, because short prompts are packed up to that length.
    """
    sizes, counts = np.unique([max(-(-length // STEP) * STEP, STEP) for length in lengths], return_counts=True)
    prompts_up_to = np.concatenate([[0], np.cumsum(counts)])
    # cost[k][j]: tokens run when the first j sizes are served by k buckets, the largest being size j - 1.
    cost = np.full((max_buckets + 1, len(sizes) + 1), np.inf)
    cost[:, 0] = 0
    choice = np.zeros(cost.shape, int)
    for k in range(1, max_buckets + 1):
        for j in range(1, len(sizes) + 1):
            options = cost[k - 1, :j] + sizes[j - 1] * (prompts_up_to[j] - prompts_up_to[:j])
            choice[k, j] = int(np.argmin(options))
            cost[k, j] = options[choice[k, j]]
    chosen, j = {PACK_TO}, len(sizes)
    for k in range(max_buckets, 0, -1):
        if j:
            chosen.add(int(sizes[j - 1]))
            j = choice[k, j]
    return tuple(Bucket(tokens) for tokens in sorted(chosen))


def plan_passes(prompts: Sequence[EncodedPrompt], buckets: Sequence[Bucket]) -> list[Pass]:
    """Packs prompts into passes: longest first, each into the first pass with room (first-fit decreasing).

    A prompt longer than the largest bucket is split by its questions. Each pass uses the smallest bucket that holds it.

    Args:
      prompts: to score.
      buckets: the shapes that passes can have.

    Returns:
      Passes. The owner of a chunk is (index of its prompt, number of the prompt's questions in earlier chunks).

    Raises:
      ValueError: naming a prompt of which not even one question fits.
    """
    largest = max(buckets)
    chunks: list[Chunk] = []
    for index, prompt in enumerate(prompts):
        first_question = 0
        try:
            parts = prompt.split(largest.tokens, largest.max_candidates)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        for part in parts:
            chunks.append(Chunk.whole((index, first_question), part))
            first_question += len(part.questions)
    chunks.sort(key=lambda chunk: -chunk.tokens)
    passes: list[list[Chunk]] = []
    rooms: list[tuple[int, int, set[int]]] = []  # free tokens and free candidates of each pass, and its label tokens
    target = Bucket(min(largest.tokens, PACK_TO))
    for chunk in chunks:
        num_candidates = len(chunk.questions)
        labels = set(chunk.prompt.labels)
        for index, (free_tokens, free_candidates, pass_labels) in enumerate(rooms):
            fits = chunk.tokens <= free_tokens and num_candidates <= free_candidates
            if fits and len(labels | pass_labels) <= LABELS_IN_PASS:
                passes[index].append(chunk)
                rooms[index] = (free_tokens - chunk.tokens, free_candidates - num_candidates, labels | pass_labels)
                break
        else:
            passes.append([chunk])
            rooms.append((target.tokens - chunk.tokens, target.max_candidates - num_candidates, labels))
    return [Pass(_smallest_bucket(buckets, pass_chunks), pass_chunks) for pass_chunks in passes]


def _smallest_bucket(buckets: Sequence[Bucket], chunks: Sequence[Chunk]) -> Bucket:
    """The smallest bucket that holds all of the chunks."""
    tokens = sum(chunk.tokens for chunk in chunks)
    num_candidates = sum(len(chunk.questions) for chunk in chunks)
    return min(bucket for bucket in buckets if bucket.tokens >= tokens and bucket.max_candidates >= num_candidates)
