"""Why an item ranks where it does: each part of the prompt left out in turn, and the prompt rendered without it.

Leaving out is what the switch of a page does: the prompt is rendered again without the part, positions close up, and no
older event comes in. It is not attribution by gradients or by attention: it answers "and without this?".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from brewjax.data.prompts.styles import STYLES, Style
from brewjax.data.tables.statistics import Table
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt
from brewjax.data.text.prompt import Prompt, Question
from brewjax.explore.views import bars_html

if TYPE_CHECKING:
    import pandas as pd

    from brewjax.explore.context import Context
    from brewjax.explore.plots import Plot

Kind = Literal["event", "history", "profile", "item", "instruction", "note"]
SENTENCE = re.compile(r"(?<=[.!?])\s+")
SHIFTS = (1, 7, 64)  # positions by which a prompt is moved to measure rounding
NOISE = 3  # times the largest difference that rounding makes
MARK = "\0"  # in place of every number in buckets, to find them
MARKED: dict[str, Any] = {"bucket": MARK, "percentile": MARK}  # changes of a style
NAMED: dict[str, Any] = {  # changes of a style that give every known value its name
    field: getattr(STYLES["sectioned"], field) for field in ("fact", "bucket", "percentile", "short")
}
LEAST_NOISE = 8 * float(np.finfo(np.float32).eps)  # of log-odds, which come from float32 probabilities


class Part(NamedTuple):
    """A part of a prompt, and the prompt without it.

    Attributes:
      kind: "event"; "history", all events at once; "profile", an attribute of the member; "item", an attribute of the
        candidate; "instruction", a sentence of it; or "note".
      text: the part, for people to read.
      event: the row of the event; None for the other kinds.
      without: the prompt without the part, with one question.
    """

    kind: Kind
    text: str
    event: int | None
    without: Prompt


@dataclasses.dataclass(frozen=True, repr=False)
class Reasons:
    """What leaving out each part of a prompt does to one score.

    Attributes:
      title: of the item.
      label: the label word whose log-odds are meant.
      log_odds: of the label, with the whole prompt.
      parts: what was left out in turn.
      effects: float64 [parts], log-odds with the part minus without it: above 0, the part speaks for the label.
      noise: the most that rounding alone may change, in log-odds; an effect within it is none.
      spread: standard deviation of the log-odds over all candidates, to compare effects with; 0 for one candidate.
      dropped: the events that the token budget left out, which cannot have an effect.
    """

    title: str
    label: str
    log_odds: float
    parts: tuple[Part, ...]
    effects: np.ndarray
    noise: float
    spread: float
    dropped: tuple[str, ...]

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [parts]: indices of the parts, the largest effect of either sign first."""
        return np.argsort(-np.abs(self.effects), kind="stable")

    def is_noise(self, index: int) -> bool:
        """Whether the effect of a part is within what rounding changes."""
        return bool(abs(self.effects[index]) <= self.noise)

    def table(self) -> pd.DataFrame:
        """The parts as a table, the largest effect first; an effect within noise is 0."""
        import pandas as pd

        rows = [
            (self.parts[i].kind, self.parts[i].text, 0.0 if self.is_noise(i) else self.effects[i])
            for i in self.order.tolist()
        ]
        return pd.DataFrame(rows, columns=["kind", "part", "effect"])

    def summary(self) -> str:
        """Two or three sentences: the largest effect, what the whole history is worth, and what was dropped."""
        odds = f"'{self.label}' has log-odds {self.log_odds:+.2f} for {self.title}."
        sizes = {self.parts[i].kind: self.effects[i] for i in reversed(self.order.tolist())}
        lines = [odds]
        single = [i for i in self.order.tolist() if self.parts[i].kind != "history" and not self.is_noise(i)]
        if single:
            part = self.parts[single[0]]
            lines.append(f"The largest effect has the {part.kind}: “{part.text}” ({self.effects[single[0]]:+.2f}).")
        else:
            lines.append("No single part has an effect beyond rounding.")
        if self.spread and abs(sizes.get("history", self.spread)) < 0.1 * self.spread:
            effect = sizes["history"]
            lines.append(
                f"The history hardly matters: all of it is worth {effect:+.3f}, and items differ by {self.spread:.2f}."
            )
        if self.dropped:
            lines.append(f"The token budget left out {len(self.dropped)} older events.")
        return " ".join(lines)

    def plot(self, top: int = 15) -> Plot:
        """Bars of the `top` largest effects, in log-odds, the noise shaded."""
        from brewjax.explore.plots import plot_bars

        chosen = self.order[:top]
        names = [f"{self.parts[index].kind}: {self.parts[index].text}" for index in chosen]
        axis = f"effect on the log-odds of “{self.label}”"
        return plot_bars(self.title, axis, names, self.effects[chosen], self.noise)

    def __repr__(self) -> str:
        rows = [
            f"  {'none' if self.is_noise(i) else format(self.effects[i], '+.3f'):>8}  {part.kind}: {part.text}"
            for i in self.order[:10].tolist()
            for part in [self.parts[i]]
        ]
        return "\n".join([self.summary(), *rows])

    def _repr_html_(self) -> str:
        rows = [
            (self.parts[i].kind, self.parts[i].text, None if self.is_noise(i) else float(self.effects[i]))
            for i in self.order.tolist()
        ]
        return bars_html(self.summary(), rows, self.dropped)


def explain(context: Context, item: str | int) -> Reasons:
    """Leaves out each part of the prompt in turn, in one call of the scorer.

    Costs as many short prompts as the prompt has parts: events, attributes of the member and of the item, sentences.

    Args:
      context: the member, the task and the candidates.
      item: the id of a candidate.

    Raises:
      ValueError: the item is not a candidate.
    """
    index = context.find(item)
    base = dataclasses.replace(context.text, questions=(context.text.questions[index],))
    parts = tuple(find_parts(context, index))
    encoded = [context.bundle.encode(prompt) for prompt in (base, *(part.without for part in parts))]
    shifted = [_Shifted(**_fields(encoded[0]), shift=shift) for shift in SHIFTS]
    probabilities = np.concatenate(context.bundle.score_encoded([*encoded, *shifted]))
    scores = log_odds(probabilities, context.top_label)
    return Reasons(
        title=context.titles[index],
        label=context.task.words[context.top_label],
        log_odds=float(scores[0]),
        parts=parts,
        effects=scores[0] - scores[1 : len(encoded)],
        noise=max(NOISE * float(np.abs(scores[len(encoded) :] - scores[0]).max()), LEAST_NOISE),
        spread=float(context.log_odds.std()),
        dropped=tuple(context.describe_events(context.dropped)),
    )


def log_odds(probabilities: Float[np.ndarray, "*B L"], label: int) -> Float[np.ndarray, "*B"]:
    """log p / (1 - p) of a label. The other labels are added up, for 1 - p has no digits left where p is almost 1."""
    p = np.maximum(np.asarray(probabilities, np.float64), np.finfo(np.float32).tiny)
    return np.log(p[..., label]) - np.log(np.delete(p, label, -1).sum(-1))


def find_parts(context: Context, index: int) -> Iterator[Part]:
    """The parts of the prompt of one candidate, each with the prompt without it.

    Args:
      index: of the candidate.
    """
    verbalizer, time, style = context.verbalizer, context.example.cutoff_time, STYLES[context.style]
    single = dataclasses.replace(context.example.select(slice(index, index + 1)), history=context.shown)
    base = dataclasses.replace(context.text, questions=(context.text.questions[index],))
    for row, line in zip(context.shown.tolist(), context.describe_events(context.shown), strict=True):
        shorter = dataclasses.replace(single, history=context.shown[context.shown != row])
        yield Part("event", line, row, context.render(shorter))
    if len(context.shown) > 1:
        empty = dataclasses.replace(single, history=context.shown[:0])
        yield Part("history", f"all {len(context.shown)} events", None, context.render(empty))

    tables: tuple[tuple[Kind, Table, int, str], ...] = (
        ("profile", "members", single.member, base.preamble),
        ("item", "items", int(single.candidates[0]), base.questions[0].text),
    )
    for kind, table, row, text in tables:
        rows, members = np.array([row]), np.array([single.member])
        facts, named, marked = (
            verbalizer.facts(table, rows, time, each, members=members)[0]
            for each in (style, dataclasses.replace(style, **NAMED), dataclasses.replace(style, **MARKED))
        )
        bucketed = [fact == MARK for fact in marked]
        for name, shorter_text in _without_facts(facts, named, bucketed, style, text):
            if kind == "profile":
                yield Part(kind, name, None, dataclasses.replace(base, preamble=shorter_text))
            else:
                question: Question = dataclasses.replace(base.questions[0], text=shorter_text)
                yield Part(kind, name, None, dataclasses.replace(base, questions=(question,)))

    sentences = SENTENCE.split(context.task.instruction)
    for number, sentence in enumerate(sentences):
        rest = " ".join(sentences[:number] + sentences[number + 1 :])
        yield Part("instruction", sentence, None, context.render(single, _with_text(context, "instruction", rest)))
    if context.task.steering_note:
        yield Part(
            "note", context.task.steering_note, None, context.render(single, _with_text(context, "steering_note", ""))
        )


def _with_text(context: Context, field: str, text: str) -> Task:
    return context.task.model_copy(update={field: text})


def _without_facts(
    facts: Sequence[str], named: Sequence[str], bucketed: Sequence[bool], style: Style, text: str
) -> Iterator[tuple[str, str]]:
    """The name of each fact, and the text without it, as if its value were unknown.

    Args:
      facts: in the style of the text; in a style without names an unknown value is there, empty.
      named: the known facts with their names.
      bucketed: whether each fact is a number in buckets, which has a name in every style, and is not there if unknown.
      text: which ends with the facts or has them before the last few words; facts that were truncated are not found,
        and nothing is yielded.
    """
    joined = style.join.join(facts)
    start = text.rfind(joined)
    if not joined or start < 0:
        return
    unknown = style.fact.format(name="", value="")
    # Where the place of a value says whose it is, the place stays, empty.
    by_place = ["{name}" not in style.fact and not bucket for bucket in bucketed]
    known = [place for place, fact in enumerate(facts) if not by_place[place] or fact != unknown]
    for place, name in zip(known, named, strict=True):
        shorter = [*facts[:place], *([unknown] if by_place[place] else []), *facts[place + 1 :]]
        yield name, text[:start] + style.join.join(shorter) + text[start + len(joined) :]


@dataclasses.dataclass(frozen=True)
class _Shifted(EncodedPrompt):
    """A prompt read at later positions. RoPE sees only differences of positions, so nothing but rounding changes."""

    shift: int = 0

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        arrays = super().arrays
        return arrays | {"positions": arrays["positions"] + np.int32(self.shift)}


def _fields(prompt: EncodedPrompt) -> dict[str, Any]:
    """The fields of an encoded prompt by name."""
    return {field.name: getattr(prompt, field.name) for field in dataclasses.fields(EncodedPrompt)}
