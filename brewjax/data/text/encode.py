"""From a `Prompt` or a text to tokens labelled with `TokenLabels`: the same in training, evaluation and serving."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from brewjax.data.text.prompt import Prompt
from pallas_kernels.token_labels import ALL, QUESTIONS, SELF

if TYPE_CHECKING:
    from brewjax.data.text.tokenizer import Tokenizer  # imports transformers, for seconds, which training does without

HistoryLayout = Literal["dense", "star"]
NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids.

    Attributes:
      prefix_pieces: preamble, then each event.
      questions: the tokens of each question; its last one predicts the label word. A question that is answered in
        words of its own holds them too, but for their last token.
      labels: token id of each label word.
      answers: per question, index into `labels`, or the tokens of a whole answer, or None.
      layout: dense: events see the past and each other; star: an event sees only the preamble and itself.
      turns: per event, which of its tokens is the right answer to those before it; 0 for none. They are targets too.
      lists: per question, +l: list l prefers it, -l: list l rejects it, 0: in none (see `TokenBatch.preference`).
        The questions of a list stand together, and the answer to each is a label word.
      weight: of every target's loss.
    """

    prefix_pieces: list[list[int]]
    questions: list[list[int]]
    labels: list[int]
    answers: list[int | list[int] | None]
    layout: HistoryLayout
    turns: list[int] = dataclasses.field(default_factory=list)
    preference_lists: list[int] = dataclasses.field(default_factory=list)
    weight: float = 1.0

    @property
    def prefix_length(self) -> int:
        return sum(map(len, self.prefix_pieces))

    @property
    def context(self) -> int:
        """Tokens that the longest question ends: those before it and its own."""
        return self.prefix_length + max(map(len, self.questions), default=0)

    def __len__(self) -> int:
        return self.prefix_length + sum(map(len, self.questions))

    def split(self, capacity: int, at_most: int | None = None) -> list[EncodedPrompt]:
        """The same questions over as few prompts as needed for none to exceed `capacity` tokens, `at_most` questions.

        A list stays whole; the turns of the history are learnt once. Raises ValueError where the prefix and one
        question, or one list, do not fit.
        """
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
        for together in groups:
            size = sum(len(self.questions[index]) for index in together)
            if size > room:
                what = "a question" if len(together) == 1 else f"a list of {len(together)} questions"
                raise ValueError(
                    f"a prefix of {self.prefix_length} tokens and {what} of {size} "
                    f"do not fit in a row of {capacity} tokens; raise seq_len, or lower max_tokens or the size of "
                    "lists"
                )
            if used + size > room or len(chunks[-1]) == at_most:
                chunks.append([])
                used = 0
            chunks[-1] += together
            used += size
        return [
            dataclasses.replace(
                self,
                questions=[self.questions[i] for i in chunk],
                answers=[self.answers[i] for i in chunk],
                turns=self.turns if number == 0 else [],
                preference_lists=[self.preference_lists[i] for i in chunk] if self.preference_lists else [],
            )
            for number, chunk in enumerate(chunks)
        ]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """[T] each, as in `TokenBatch`: tokens, positions, segment, reach, targets (`NO_TARGET` but where an answer
        follows), preference, int32; and weights, float32: `weight` at every target.

        Positions of every question restart where the history ends, so that it reads the same alone.
        """
        pieces = self.prefix_pieces + self.questions
        lengths = [len(piece) for piece in pieces]
        prefix, events = self.prefix_length, len(self.prefix_pieces) - 1
        event_reach = {"dense": ALL, "star": QUESTIONS}[self.layout]
        reach = [ALL] + [event_reach] * events + [SELF] * len(self.questions)
        positions = [np.arange(prefix)] + [prefix + np.arange(len(question)) for question in self.questions]
        targets = np.full(len(self), NO_TARGET)
        for end, answer in zip(self.ends, self.answers, strict=True):
            if answer is not None:
                words = answer if isinstance(answer, list) else [self.labels[answer]]
                targets[end + 1 - len(words) : end + 1] = words
        begin = len(self.prefix_pieces[0])
        for event, turn in zip(self.prefix_pieces[1:], self.turns, strict=False):
            if turn:
                targets[begin + turn - 1] = event[turn]
            begin += len(event)
        preference = np.zeros(len(self))
        if self.preference_lists:
            preference[prefix:] = np.repeat(self.preference_lists, lengths[len(self.prefix_pieces) :])
        arrays = {
            "tokens": np.concatenate([np.asarray(piece, np.int32) for piece in pieces]),
            "positions": np.concatenate(positions),
            "piece_id": np.repeat(np.arange(len(pieces)), lengths),
            "visibility": np.repeat(reach, lengths),
            "targets": targets,
            "preference": np.where(targets == NO_TARGET, 0, preference),
        }
        weights = np.where(targets == NO_TARGET, 0, self.weight).astype(np.float32)
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
    """Tokens of each piece by itself, so that no piece's tokens depend on its neighbour's, nor an answer's on what it
    answers; of all but the first, as they are behind other text. A whole answer ends with the token that ends a text.

    Raises ValueError where a label word is not one token, or a question is empty.
    """
    labels = [tokenizer.label_token_id(word) for word in prompt.labels]
    turns = prompt.answer_offsets or (0,) * len(prompt.events)
    groups = (
        [event[:turn] for event, turn in zip(prompt.events, turns, strict=True)],
        [event[turn:] for event, turn in zip(prompt.events, turns, strict=True)],
        [question.heading + question.text for question in prompt.questions],
        [question.answer for question in prompt.questions],
    )
    ids = iter(tokenizer.encode([text for group in groups for text in group]))
    heads, tails, asked, said = ([next(ids) for _ in group] for group in groups)
    [preamble] = tokenizer.encode([prompt.preamble], begins=True)
    empty = next((number for number, question in enumerate(asked, 1) if not question), None)
    if empty is not None:
        raise ValueError(f"question {empty} is empty")
    whole = [answer + tokenizer.eos if answer else [] for answer in said]
    return EncodedPrompt(
        [tokenizer.with_bos(preamble), *(head + tail for head, tail in zip(heads, tails, strict=True))],
        [question + answer[:-1] for question, answer in zip(asked, whole, strict=True)],
        labels,
        [answer or question.label for question, answer in zip(prompt.questions, whole, strict=True)],
        layout,
        turns=[len(head) for head in heads] if prompt.answer_offsets else [],
    )


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text as token ids: one segment that sees all before it; every token is learnt but the first.

    Attributes:
      tokens: at least two; the last one is only a target.
    """

    tokens: list[int]

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def split(self, capacity: int) -> list[Text]:
        """Parts of at most `capacity` tokens; each begins with the last token that the part before it learnt."""
        return [Text(self.tokens[start : start + capacity + 1]) for start in range(0, len(self), capacity)]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """[T] each, as in `TokenBatch`: every token has the next one as its target, with weight 1."""
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
    """A text with the tokens that one begins and ends with."""
    return Text(tokenizer.bos + tokenizer.encode([text], begins=True)[0] + tokenizer.eos)
