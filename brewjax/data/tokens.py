"""From a `Prompt` to tokens labelled with `Segments`: the same labels in training, evaluation and serving."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Literal

import numpy as np

from brewjax.data.prompt import Prompt
from brewjax.data.tokenizer import Tokenizer
from pallas_kernels.segments import ALL, QUESTIONS, SELF

HistoryLayout = Literal["dense", "star"]
NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids.

    Attributes:
      pieces: center, then each event.
      questions: the tokens of each question; its last one predicts the label word.
      labels: token id of each label word.
      answers: per question, index into `labels`, or None.
      layout: dense: events see the past and each other; star: an event sees only the center and itself.
    """

    pieces: list[list[int]]
    questions: list[list[int]]
    labels: list[int]
    answers: list[int | None]
    layout: HistoryLayout

    @property
    def prefix_length(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def context(self) -> int:
        """Tokens that the longest question ends: those before it and its own."""
        return self.prefix_length + max(map(len, self.questions), default=0)

    def __len__(self) -> int:
        return self.prefix_length + sum(map(len, self.questions))

    def split(self, capacity: int, at_most: int | None = None) -> list[EncodedPrompt]:
        """The same questions over as few prompts as needed for none to exceed `capacity` tokens, `at_most` questions.

        Raises ValueError where the prefix and one question do not fit.
        """
        room = capacity - self.prefix_length
        longest = max(map(len, self.questions))
        if longest > room:
            raise ValueError(
                f"a prefix of {self.prefix_length} tokens and a question of {longest} "
                f"do not fit in {capacity} tokens; shorten the history or the question"
            )
        chunks: list[list[int]] = [[]]
        used = 0
        for index, question in enumerate(self.questions):
            if used + len(question) > room or len(chunks[-1]) == at_most:
                chunks.append([])
                used = 0
            chunks[-1].append(index)
            used += len(question)
        return [
            dataclasses.replace(
                self, questions=[self.questions[i] for i in chunk], answers=[self.answers[i] for i in chunk]
            )
            for chunk in chunks
        ]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """[T] each, as in `TokenBatch`: tokens, positions, segment, reach, targets (`NO_TARGET` but where a label
        follows), preference, int32; and weights, float32: 1 at every target.

        Positions of every question restart where the history ends, so that it reads the same alone.
        """
        pieces = self.pieces + self.questions
        lengths = [len(piece) for piece in pieces]
        prefix, events = self.prefix_length, len(self.pieces) - 1
        event_reach = {"dense": ALL, "star": QUESTIONS}[self.layout]
        reach = [ALL] + [event_reach] * events + [SELF] * len(self.questions)
        positions = [np.arange(prefix)] + [prefix + np.arange(len(question)) for question in self.questions]
        targets = np.full(len(self), NO_TARGET)
        for end, answer in zip(self.ends, self.answers, strict=True):
            if answer is not None:
                targets[end] = self.labels[answer]
        arrays = {
            "tokens": np.concatenate([np.asarray(piece, np.int32) for piece in pieces]),
            "positions": np.concatenate(positions),
            "segment": np.repeat(np.arange(len(pieces)), lengths),
            "reach": np.repeat(reach, lengths),
            "targets": targets,
            "preference": np.zeros(len(self)),
        }
        weights = (targets != NO_TARGET).astype(np.float32)
        return {name: array.astype(np.int32) for name, array in arrays.items()} | {"weights": weights}

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [questions + 1]: where the first token of each question stands, and where the last question ends."""
        return self.prefix_length + np.cumsum([0, *map(len, self.questions)])

    @property
    def ends(self) -> np.ndarray:
        """int64 [questions]: where the last token of each question stands."""
        return self.starts[1:] - 1


def encode(prompt: Prompt, tokenizer: Tokenizer, layout: HistoryLayout) -> EncodedPrompt:
    """Tokens of each piece by itself, so that no piece's tokens depend on its neighbour's.

    Raises ValueError where a label word is not one token, or a question is empty.
    """
    labels = [tokenizer.word(word) for word in prompt.labels]
    texts = [prompt.center, *prompt.events, *(question.heading + question.text for question in prompt.questions)]
    ids = tokenizer.encode(texts)
    ids[0] = tokenizer.begin(ids[0])
    split = 1 + len(prompt.events)
    empty = next((number for number, question in enumerate(ids[split:], 1) if not question), None)
    if empty is not None:
        raise ValueError(f"question {empty} is empty")
    return EncodedPrompt(ids[:split], ids[split:], labels, [question.label for question in prompt.questions], layout)
