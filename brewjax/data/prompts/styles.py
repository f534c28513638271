"""The styles in which prompts are rendered, and the settings that choose among them."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pydantic

from brewjax.config import Config
from brewjax.data.text.chat import ChatTemplate
from brewjax.data.text.encode import HistoryLayout


@dataclasses.dataclass(frozen=True)
class Style:
    """The templates of a style, filled by `str.format`.

    Attributes:
      preamble: the instruction and the profile; fields: instruction, profile, member, item.
      fact: one attribute; fields: name, value.
      join: the text between facts.
      group: the words before the events of one action; fields: member, past, items. If empty, events are in order of
        time instead, each with its action.
      event: a past event; field: facts.
      heading: the beginning of every question.
      question: a question; fields: question, task (its name), facts.
      bucket: a number in buckets; fields: name, bucket, buckets. In a style whose facts have no names, the name is a
        `code`, and name and bucket together are one token of a tokenizer that brewjax trains.
      percentile: the same, of a hundred buckets.
      short: whether ages are short, "2d" and not "2 days".
      history: whether past events are rendered.
      buckets_only: whether only numbers in buckets are rendered, and what `ids` adds, and no other attribute or age.
      ids: whether ids are rendered, as numbers in buckets are, and in questions categories and lists too.
      chat: whether the parts are put into the tokenizer's own chat template.
      by_kind: whether numbers in buckets are called after what they are, "pair_mean_by#7", and not by their own names,
        and are in tenths, however many buckets they have. A model that knows no English can then read a dataset that it
        has never seen: what it learnt of one dataset's rates and counts is true of another's.
      turns: whether each past event is rendered as a chat turn: the question about its item, then the label word, then
        the event. The label words are training targets as well, so a history of n turns adds n targets. Not so with
        sampled negatives, where every past event has the same label. A turn attends to all earlier turns, including
        those with the same timestamp.
    """

    preamble: str
    fact: str
    join: str
    group: str
    event: str
    heading: str
    question: str
    bucket: str = "{name}: {bucket} of {buckets}"
    percentile: str = "{name}: percentile {bucket}"
    short: bool = False
    history: bool = True
    buckets_only: bool = False
    ids: bool = False
    chat: bool = False
    by_kind: bool = False
    turns: bool = False

    def question_text(self, task: str, question: str, facts: str) -> str:
        """The text of a question, by the `task`'s name, its `question` and the `facts` of the item."""
        return self.question.format(question=question, task=task, facts=facts)


SECTIONED = Style(
    preamble="## Instruction\n{instruction}\n## {member} Profile\n{profile}\n## Past {item} interaction data\n",
    fact="{name}: {value}",
    join=", ",
    group="{member} {past} the following {items}:\n",
    event="[{facts}]\n",
    heading="## Question",
    question="\n{question}: [{facts}]\n## Answer\n",
)
CHAT = dataclasses.replace(
    SECTIONED,
    preamble="{profile}\n{member} history:\n",
    group="",
    event="- {facts}\n",
    heading="Question",
    question=": {question}? {facts}",
    chat=True,
)
COMPACT = Style(
    preamble="{instruction}\n{profile}\n",
    fact="{value}",
    join="|",
    group="",
    event="{facts}\n",
    heading="?",
    question=" {task}|{facts}\n",
    bucket="{name}#{bucket}",
    percentile="{name}#{bucket}",
    short=True,
)
STYLES = {
    "sectioned": SECTIONED,
    "chat": CHAT,
    "turns": dataclasses.replace(CHAT, preamble="{profile}\n", turns=True),
    "compact": COMPACT,
    "numbers": dataclasses.replace(COMPACT, history=False, buckets_only=True),
    "ids": dataclasses.replace(COMPACT, event="|{facts}", buckets_only=True, ids=True),
    "kinds": dataclasses.replace(COMPACT, history=False, buckets_only=True, by_kind=True),
    "key-value": Style(
        preamble="task={instruction}\nmember: {profile}\n",
        fact="{name}={value}",
        join="; ",
        group="",
        event="event: {facts}\n",
        heading="question",
        question=": {question}; {facts}; answer=",
        bucket="{name}={bucket}/{buckets}",
        percentile="{name}=p{bucket}",
        short=True,
    ),
}


@functools.lru_cache
def code(name: str) -> str:
    """A name as a code of small letters, digits and underscores: "Average stars" becomes "average_stars"."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


class PromptConfig(Config):
    """How prompts are rendered, and how long they may be."""

    styles: dict[str, float] = {"compact": 1.0}
    """The styles that training draws from, by name, with their weights."""
    score_style: str = "compact"
    """The style of prompts in evaluation and serving."""
    max_tokens: int = pydantic.Field(default=1024, gt=0)
    """Token budget for the preamble, the history and one question; the oldest events are left out to fit. Training
    packs the questions into the rest of a row of `seq_len`: half of it or less lets many questions share a history."""
    layout: HistoryLayout = "dense"
    """Attention within the history: "dense", causal; or "star", in which events do not attend to each other."""
    chat: ChatTemplate = ChatTemplate()
    """Variables of the tokenizer's chat template, for the styles that use it."""

    @pydantic.model_validator(mode="after")
    def _known_styles(self) -> PromptConfig:
        for style in [*self.styles, self.score_style]:
            if style not in STYLES:
                raise ValueError(f"no style '{style}'; styles: {', '.join(STYLES)}")
        if not self.styles or min(self.styles.values()) <= 0:
            raise ValueError("styles: give at least one style, each with a weight above 0")
        return self

    def draw(self, rng: np.random.Generator) -> str:
        """Draws the style of a training record.

        Args:
          rng: decides, by the weights of `styles`.

        Returns:
          A key of `STYLES`.
        """
        shares = np.cumsum([*self.styles.values()])
        return [*self.styles][int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
