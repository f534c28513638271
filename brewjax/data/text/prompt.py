"""`Prompt`: one context with its candidates as text pieces, the same in training, evaluation and serving."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from brewjax.config import suggest

NAMES = ("preamble", "events", "questions", "labels")  # keys of a prompt as JSON
ALIASES = {
    "prefix": "preamble",
    "query": "preamble",
    "center": "preamble",
    "history": "events",
    "items": "questions",
    "words": "labels",
}
SHAPE = '{"preamble": "..", "events": [".."], "questions": [".."], "labels": ["Yes", "No"]}'


@dataclasses.dataclass(frozen=True)
class Question:
    """The question about one candidate. The model reads `heading` and `text`, and answers with a label word or a text.

    Attributes:
      text: the question, up to where the answer begins.
      label: index of the right answer in `Prompt.labels`; None if it is unknown, or is a text.
      heading: comes before `text`. It is the same for every question, so that a question's tokens do not depend on its
        position; only `Prompt.render` adds a number.
      answer: the right answer, if it is a text and not a label word.
    """

    text: str
    label: int | None = None
    heading: str = ""
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One context (preamble and history), and the questions about its candidates.

    Attributes:
      preamble: instruction and member profile.
      events: the history, oldest first (within each action, if the style groups by action).
      questions: one per candidate; each sees the preamble and the history, and no other question.
      labels: the possible answers (label words) to every question.
      num_truncated_events: how many of the oldest events were left out to fit the token budget.
      answer_offsets: where a history consists of chat turns, the character in each event's text at which its answer
        begins, 0 if it has none; else empty.
      truncated_texts: a line for each item, and for the profile, whose texts were truncated to fit.
      temperature: divides the labels' logits before the softmax over the labels, so that the model is calibrated.
    """

    preamble: str
    events: tuple[str, ...]
    questions: tuple[Question, ...]
    labels: tuple[str, ...]
    num_truncated_events: int = 0
    answer_offsets: tuple[int, ...] = ()
    truncated_texts: tuple[str, ...] = ()
    temperature: float = 1.0

    def render(self) -> str:
        """Renders the prompt for people to read: questions numbered, known answers filled in.

        Returns:
          The text.
        """
        parts = [self.preamble, *self.events]
        for number, question in enumerate(self.questions, 1):
            heading = f"{question.heading} {number}" if question.heading else ""
            answer = question.answer if question.label is None else self.labels[question.label]
            parts.append(f"{heading}{question.text}{answer}\n")
        return "".join(parts)

    @classmethod
    def from_json(cls, text: str, source: str = "prompt") -> Prompt:
        """Reads `{"preamble": str, "events": [str], "questions": [str], "labels": [str]}`.

        Args:
          text: the JSON.
          source: the name of the file or input that the text is from, for errors.

        Returns:
          The prompt, without answers.

        Raises:
          ValueError: names the key that is unknown, missing or of the wrong type.
        """
        try:
            fields: Any = json.loads(text, object_pairs_hook=_refuse_twice)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{source}: expected {SHAPE}, found {_show(fields)}")
        for name in fields:
            if name not in NAMES:
                raise ValueError(f"{source}: unknown key '{name}'; {suggest(name, NAMES, ALIASES, 'valid keys')}")
        for name in NAMES:
            if name not in fields:
                raise ValueError(f"{source}: '{name}' is missing; expected {SHAPE}")
        if not isinstance(fields["preamble"], str):
            raise ValueError(f"{source}: preamble: expected a text, found {_show(fields['preamble'])}")
        for name in NAMES[1:]:
            if not isinstance(fields[name], list):
                raise ValueError(f"{source}: {name}: expected a list of texts, found {_show(fields[name])}")
            for index, entry in enumerate(fields[name]):
                if not isinstance(entry, str):
                    raise ValueError(f"{source}: {name}[{index}]: expected a text, found {_show(entry)}")
        if not fields["questions"]:
            raise ValueError(f"{source}: questions: expected at least one")
        labels = fields["labels"]
        if len(set(labels)) < max(2, len(labels)):
            raise ValueError(f"{source}: labels: expected at least two, no two of them the same, found {_show(labels)}")
        questions = tuple(Question(text) for text in fields["questions"])
        return cls(fields["preamble"], tuple(fields["events"]), questions, tuple(labels))


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is given twice")
    return fields


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
