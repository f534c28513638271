"""`Prompt`: what the model reads, as text; the same noun in training, evaluation and serving."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from brewjax.config import suggest

NAMES = ("preamble", "events", "questions", "labels")  # of a prompt as JSON
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
      preamble: instruction and member profile.
      events: the history, oldest first (within each action, where a style groups by action).
      labels: the possible answers to every question.
      dropped: how many of the oldest events were left out to fit the token budget.
      turns: of a history told as turns, where in each event's text its answer begins; 0 where it has none.
      cut: the items, and the profile, whose texts were cut to fit, and why.
    """

    preamble: str
    events: tuple[str, ...]
    questions: tuple[Question, ...]
    labels: tuple[str, ...]
    num_truncated_events: int = 0
    answer_offsets: tuple[int, ...] = ()
    truncated_texts: tuple[str, ...] = ()

    def render(self) -> str:
        """The prompt for people to read: questions numbered, known answers filled in."""
        parts = [self.preamble, *self.events]
        for number, question in enumerate(self.questions, 1):
            heading = f"{question.heading} {number}" if question.heading else ""
            answer = question.answer if question.label is None else self.labels[question.label]
            parts.append(f"{heading}{question.text}{answer}\n")
        return "".join(parts)

    @classmethod
    def from_json(cls, text: str, place: str = "prompt") -> Prompt:
        """Reads `{"preamble": str, "events": [str], "questions": [str], "labels": [str]}`.

        Raises ValueError naming the field that is missing or has the wrong type; `place` is where the text is from.
        """
        try:
            fields: Any = json.loads(text, object_pairs_hook=_refuse_twice)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{place}: expected {SHAPE}, found {_show(fields)}")
        for name in fields:
            if name not in NAMES:
                raise ValueError(f"{place}: unknown key '{name}'; {suggest(name, NAMES, ALIASES, 'valid keys')}")
        for name in NAMES:
            if name not in fields:
                raise ValueError(f"{place}: '{name}' is missing; expected {SHAPE}")
        if not isinstance(fields["preamble"], str):
            raise ValueError(f"{place}: preamble: expected a text, found {_show(fields['preamble'])}")
        for name in NAMES[1:]:
            if not isinstance(fields[name], list):
                raise ValueError(f"{place}: {name}: expected a list of texts, found {_show(fields[name])}")
            for index, entry in enumerate(fields[name]):
                if not isinstance(entry, str):
                    raise ValueError(f"{place}: {name}[{index}]: expected a text, found {_show(entry)}")
        if not fields["questions"]:
            raise ValueError(f"{place}: questions: expected at least one")
        labels = fields["labels"]
        if len(set(labels)) < max(2, len(labels)):
            raise ValueError(f"{place}: labels: expected at least two, no two of them the same, found {_show(labels)}")
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
