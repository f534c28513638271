"""`Prompt`: what the model reads, as text; the same noun in training, evaluation and serving."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class Question:
    """One item asked about. The model reads `heading` and `text` and answers with a label word, or in words of its own.

    Attributes:
      heading: the same for every question: a question reads the same wherever it stands. `Prompt.render` numbers it.
      label: index of the right answer in `Prompt.labels`; None where it is not known.
      answer: the right answer of a question that no label word answers.
    """

    text: str
    label: int | None = None
    heading: str = ""
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One shared history with many questions behind it.

    Attributes:
      center: instruction and member profile.
      events: the history, oldest first (within each action, where a style groups by action).
      labels: the possible answers to every question.
      dropped: how many of the oldest events were left out to fit the token budget.
      turns: of a history told as turns, where in each event's text its answer begins; 0 where it has none.
    """

    center: str
    events: tuple[str, ...]
    questions: tuple[Question, ...]
    labels: tuple[str, ...]
    dropped: int = 0
    turns: tuple[int, ...] = ()

    def render(self) -> str:
        """The prompt for people to read: questions numbered, known answers filled in."""
        parts = [self.center, *self.events]
        for number, question in enumerate(self.questions, 1):
            heading = f"{question.heading} {number}" if question.heading else ""
            answer = question.answer if question.label is None else self.labels[question.label]
            parts.append(f"{heading}{question.text}{answer}\n")
        return "".join(parts)

    @classmethod
    def from_json(cls, text: str) -> Prompt:
        """Reads `{"center": str, "events": [str], "questions": [str], "labels": [str]}`.

        Raises ValueError naming the field that is missing or has the wrong type.
        """
        try:
            fields: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompt: not valid JSON: {error}") from None
        shape = '{"center": "..", "events": [".."], "questions": [".."], "labels": ["Yes", "No"]}'
        if not isinstance(fields, dict) or set(fields) != {"center", "events", "questions", "labels"}:
            raise ValueError(f"prompt: expected exactly {shape}")
        if not isinstance(fields["center"], str):
            raise ValueError("prompt: 'center' must be a text")
        for name in ("events", "questions", "labels"):
            if not isinstance(fields[name], list) or not all(isinstance(entry, str) for entry in fields[name]):
                raise ValueError(f"prompt: '{name}' must be a list of texts")
        if not fields["questions"] or len(fields["labels"]) < 2:
            raise ValueError("prompt: at least one question and two labels are needed")
        questions = tuple(Question(text) for text in fields["questions"])
        return cls(fields["center"], tuple(fields["events"]), questions, tuple(fields["labels"]))
