"""The styles in which prompts are said, and which of them a model is trained and scored in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pydantic

from brewjax.config import Config
from brewjax.data.text.chat import ChatTemplate
from brewjax.data.text.encode import HistoryLayout


@dataclasses.dataclass(frozen=True)
class Style:
    """How things are said. Templates are filled with `str.format`.

    Attributes:
      preamble: filled with instruction, profile, member, item.
      fact: one attribute, filled with name and value; facts are joined by `join`.
      group: said before the events of one action, filled with member, past, items; "" tells events in order of
        time instead, each with its action.
      event, question: filled with facts (and ask, for a question).
      heading: what a question begins with.
      percentile: filled with a number from 1 to 100.
      short: ages as "2d", not "2 days".
      chat: the parts are put into the tokenizer's own chat template.
      turns: the history is told as turns of the chat: what is asked of each event's item, its answer, then the event.
        All is as in `chat` otherwise: the events see each other, and the questions share them. But an event told as
        a turn says its answer in the task's own words, and training learns it (where the answers to events differ:
        not with sampled negatives), so one record has as many answers more as its history has turns. A turn sees
        the turns before it, also those of its own moment.
    """

    preamble: str
    fact: str
    join: str
    group: str
    event: str
    heading: str
    question: str
    percentile: str = "percentile {}"
    short: bool = False
    chat: bool = False
    turns: bool = False


SECTIONED = Style(
    preamble="## Instruction\n{instruction}\n## {member} Profile\n{profile}\n## Past {item} interaction data\n",
    fact="{name}: {value}",
    join=", ",
    group="{member} {past} the following {items}:\n",
    event="[{facts}]\n",
    heading="## Question",
    question="\n{ask}: [{facts}]\n## Answer\n",
)
CHAT = dataclasses.replace(
    SECTIONED,
    preamble="{profile}\n{member} history:\n",
    group="",
    event="- {facts}\n",
    heading="Question",
    question=": {ask}? {facts}",
    chat=True,
)
STYLES = {
    "sectioned": SECTIONED,
    "chat": CHAT,
    "turns": dataclasses.replace(CHAT, preamble="{profile}\n", turns=True),
    "compact": Style(
        preamble="{instruction}\n{profile}\n",
        fact="{value}",
        join="|",
        group="",
        event="{facts}\n",
        heading="?",
        question=" {facts}\n",
        percentile="{}",
        short=True,
    ),
    "key-value": Style(
        preamble="task={instruction}\nmember: {profile}\n",
        fact="{name}={value}",
        join="; ",
        group="",
        event="event: {facts}\n",
        heading="question",
        question=": {ask}; {facts}; answer=",
        percentile="p{}",
        short=True,
    ),
}


class PromptConfig(Config):
    """How prompts are said and cut."""

    styles: dict[str, float] = {"compact": 1.0}
    """The styles that training draws from, with their weights."""
    score_style: str = "compact"
    """The one that evaluation and serving use."""
    max_tokens: int = pydantic.Field(default=1024, gt=0)
    """Budget for the preamble, the history and one question; the oldest events go first. Training packs the
    questions into what is left of a row: half a row or less lets many questions share a history."""
    layout: HistoryLayout = "dense"
    """Dense, or star: events do not see each other."""
    chat: ChatTemplate = ChatTemplate()
    """Of the styles that use the tokenizer's chat template."""

    @pydantic.model_validator(mode="after")
    def _known_styles(self) -> PromptConfig:
        for style in [*self.styles, self.score_style]:
            if style not in STYLES:
                raise ValueError(f"no style '{style}'; styles: {', '.join(STYLES)}")
        if not self.styles or min(self.styles.values()) <= 0:
            raise ValueError("styles: give at least one style, each with a weight above 0")
        return self

    def draw(self, rng: np.random.Generator) -> str:
        """A style to train on."""
        names, weights = zip(*self.styles.items(), strict=True)
        return names[rng.choice(len(names), p=np.array(weights) / sum(weights))]
