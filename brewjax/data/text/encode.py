"""Encodes a `Prompt` or a plain text as tokens with attention labels, the same in training, evaluation and serving."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from brewjax.data.text.prompt import Prompt
from pallas_kernels.token_labels import ALL, QUESTIONS, SELF

if TYPE_CHECKING:
    from brewjax.data.text.tokenizer import Tokenizer  # importing transformers takes seconds, which training saves

HistoryLayout = Literal["dense", "star"]
NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids.

    Attributes:
      prefix_pieces: the tokens of the preamble, then of each event.
      questions: the tokens of each question, the last of which predicts the label word. If the answer is a text, the
        question also holds its tokens except the last.
      labels: token id of each label word.
      answers: per question, the index of the right answer in `labels`, or the tokens of a text answer, or None.
      layout: "dense": an event attends to all earlier events; "star": an event attends to the preamble and itself only.
      answer_offsets: per event, the position within it of the token that is the right answer to the tokens before it,
        0 if it has none. These tokens are training targets too. Empty if no event has one.
      preference_lists: per question, +l if it is the chosen one of list l, -l if list l rejects it, 0 if it is in no
        list (see `TokenBatch.preference`). The questions of a list are adjacent, each answered by a label word. Empty
        if there are no lists.
      weight: loss weight of every target.
      soft_labels: per question, float [labels], another ranker's probability of each label. Empty if there are none.
      temperature: divides the labels' logits in scoring; training has no use for it.
    """

    prefix_pieces: list[list[int]]
    questions: list[list[int]]
    labels: list[int]
    answers: list[int | list[int] | None]
    layout: HistoryLayout
    answer_offsets: list[int] = dataclasses.field(default_factory=list)
    preference_lists: list[int] = dataclasses.field(default_factory=list)
    weight: float = 1.0
    soft_labels: list[np.ndarray] = dataclasses.field(default_factory=list)
    temperature: float = 1.0

    @property
    def prefix_length(self) -> int:
        """Tokens of the preamble and the history."""
        return sum(map(len, self.prefix_pieces))

    @property
    def context(self) -> int:
        """Tokens of the prefix and of the longest question: what the model must be able to read at once."""
        return self.prefix_length + max(map(len, self.questions), default=0)

    def __len__(self) -> int:
        return self.prefix_length + sum(map(len, self.questions))

    def split(self, capacity: int, max_questions: int | None = None) -> list[EncodedPrompt]:
        """Distributes the questions, in order, over prompts that share the prefix and each fit the capacity.

        A preference list is never split, and the answers within the history are targets of the first prompt only.

        Args:
          capacity: tokens of a prompt.
          max_questions: of a prompt; None for no limit.

        Returns:
          The prompts, each filled before the next begins.

        Raises:
          ValueError: the prefix with one question, or with one list, exceeds the capacity.
        """
        if len(self) <= capacity and (max_questions is None or len(self.questions) <= max_questions):
            return [self]
        room = capacity - self.prefix_length
        groups: list[list[int]] = []
        for index in range(len(self.questions)):
            if (
                index
                and self.preference_lists
                and self.preference_lists[index]
                and abs(self.preference_lists[index]) == abs(self.preference_lists[index - 1])
            ):
                groups[-1].append(index)
            else:
                groups.append([index])
        chunks: list[list[int]] = [[]]
        used = 0
        for group in groups:
            size = sum(len(self.questions[index]) for index in group)
            if size > room:
                noun = "a question" if len(group) == 1 else f"a list of {len(group)} questions"
                raise ValueError(
                    f"a prefix of {self.prefix_length} tokens and {noun} of {size} "
                    f"do not fit in a row of {capacity} tokens; raise seq_len, or lower max_tokens or "
                    "list_size"
                )
            if used + size > room or len(chunks[-1]) == max_questions:
                chunks.append([])
                used = 0
            chunks[-1] += group
            used += size
        return [
            dataclasses.replace(
                self,
                questions=[self.questions[i] for i in chunk],
                answers=[self.answers[i] for i in chunk],
                answer_offsets=self.answer_offsets if chunk_index == 0 else [],
                preference_lists=[self.preference_lists[i] for i in chunk] if self.preference_lists else [],
                soft_labels=[self.soft_labels[i] for i in chunk] if self.soft_labels else [],
            )
            for chunk_index, chunk in enumerate(chunks)
        ]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The fields of `TokenBatch` by name, each [T]: tokens, positions, piece_id, visibility, targets (`NO_TARGET`
        except before an answer) and preference, int32; and weights, float32, which is `weight` at every target.

        The positions of every question start where the history ends, so that a question reads the same alone.
        """
        pieces = self.prefix_pieces + self.questions
        lengths, num_events = [len(piece) for piece in pieces], len(self.prefix_pieces) - 1
        question_lengths = lengths[num_events + 1 :]
        event_visibility = {"dense": ALL, "star": QUESTIONS}[self.layout]
        visibility = np.array([ALL] + [event_visibility] * num_events + [SELF] * len(self.questions), np.int32)
        positions, prefix = np.arange(len(self), dtype=np.int32), self.prefix_length
        positions[prefix:] -= np.repeat(self.starts[:-1] - prefix, question_lengths).astype(np.int32)
        targets = np.full(len(self), NO_TARGET, np.int32)
        for end, answer in zip(self.ends.tolist(), self.answers, strict=True):
            if answer is not None:
                answer_ids = answer if isinstance(answer, list) else [self.labels[answer]]
                targets[end + 1 - len(answer_ids) : end + 1] = answer_ids
        start = len(self.prefix_pieces[0])
        for event, offset in zip(self.prefix_pieces[1:], self.answer_offsets, strict=False):
            if offset:
                targets[start + offset - 1] = event[offset]
            start += len(event)
        is_target = targets != NO_TARGET
        preference = np.zeros(len(self), np.int32)
        if self.preference_lists:
            preference[prefix:] = np.repeat(self.preference_lists, question_lengths)
        return {
            "tokens": np.fromiter(itertools.chain.from_iterable(pieces), np.int32, len(self)),
            "positions": positions,
            "piece_id": np.repeat(np.arange(len(pieces), dtype=np.int32), lengths),
            "visibility": np.repeat(visibility, lengths),
            "targets": targets,
            "preference": preference * is_target,
            "weights": np.float32(self.weight) * is_target,
        }

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [questions + 1]: position of the first token of each question, and the end of the last question."""
        return self.prefix_length + np.cumsum([0, *map(len, self.questions)])

    @property
    def ends(self) -> np.ndarray:
        """int64 [questions]: position of the last token of each question."""
        return self.starts[1:] - 1


def encode(prompt: Prompt, tokenizer: Tokenizer, layout: HistoryLayout) -> EncodedPrompt:
    """Tokenizes each piece of a prompt separately.

    No piece's tokens then depend on its neighbours, nor an answer's on its question, and a cached prefix fits every
    question. All pieces except the preamble are tokenized as continuations of other text. A text answer ends with EOS.

    Args:
      prompt: with or without answers.
      tokenizer: of the model.
      layout: whether events see each other ("dense") or not ("star").

    Returns:
      The tokens of each piece, and of each label.

    Raises:
      ValueError: a label word is not one token, or a question is empty.
    """
    labels = [tokenizer.label_token_id(word) for word in prompt.labels]
    offsets = prompt.answer_offsets or (0,) * len(prompt.events)
    groups = (
        [event[:offset] for event, offset in zip(prompt.events, offsets, strict=True)],
        [event[offset:] for event, offset in zip(prompt.events, offsets, strict=True)],
        [question.heading + question.text for question in prompt.questions],
        [question.answer for question in prompt.questions],
    )
    ids = iter(tokenizer.encode([text for group in groups for text in group]))
    heads, tails, question_ids, answer_ids = ([next(ids) for _ in group] for group in groups)
    [preamble] = tokenizer.encode([prompt.preamble], begins=True)
    empty = next((number for number, question in enumerate(question_ids, 1) if not question), None)
    if empty is not None:
        raise ValueError(f"question {empty} is empty")
    text_answers = [answer + tokenizer.eos if answer else [] for answer in answer_ids]
    return EncodedPrompt(
        [tokenizer.with_bos(preamble), *(head + tail for head, tail in zip(heads, tails, strict=True))],
        [question + answer[:-1] for question, answer in zip(question_ids, text_answers, strict=True)],
        labels,
        [answer or question.label for question, answer in zip(prompt.questions, text_answers, strict=True)],
        layout,
        answer_offsets=[len(head) for head in heads] if prompt.answer_offsets else [],
        temperature=prompt.temperature,
    )


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text as token ids: one piece with causal attention, in which every token except the first is a target.

    Attributes:
      tokens: at least two; the last one is a target only.
    """

    tokens: list[int]

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def split(self, capacity: int) -> list[Text]:
        """Parts of at most `capacity` tokens; each begins with the last target of the part before it."""
        return [Text(self.tokens[start : start + capacity + 1]) for start in range(0, len(self), capacity)]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The fields of `TokenBatch` by name, each [T], int32, and weights float32: the target of every token is the
        next token, with weight 1."""
        fields = {
            "tokens": self.tokens[:-1],
            "positions": np.arange(len(self)),
            "piece_id": np.zeros(len(self)),
            "visibility": np.full(len(self), ALL),
            "targets": self.tokens[1:],
            "preference": np.zeros(len(self)),
        }
        arrays = {name: np.asarray(field, np.int32) for name, field in fields.items()}
        return arrays | {"weights": np.ones(len(self), np.float32)}


def encode_text(text: str, tokenizer: Tokenizer) -> Text:
    """Tokenizes a plain text, with BOS and EOS if the tokenizer has them."""
    return Text(tokenizer.bos + tokenizer.encode([text], begins=True)[0] + tokenizer.eos)
