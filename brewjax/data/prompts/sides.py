"""The texts of both sides of a dual encoder: a member with a history, and an item, in the words of one card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import pydantic

from brewjax.config import Config
from brewjax.data.prompts.styles import STYLES, PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import encode

T = TypeVar("T")


class SideConfig(Config):
    """What the two sides of an encoder read."""

    task: str = ""
    """The task whose history a member's text holds, and whose best label makes an item a positive; by default the
    first."""
    member_instruction: str = "Represent the {member} to find the next {item}."
    """The instruction of a member's text; {member} and {item} are the card's nouns. It may be empty."""
    item_instruction: str = "Represent the {item}."
    """The instruction of an item's text. It may be empty."""

    @pydantic.field_validator("member_instruction", "item_instruction")
    @classmethod
    def _known_fields(cls, instruction: str) -> str:
        try:
            instruction.format(member="", item="")
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"'{instruction}': only {{member}} and {{item}} can stand in braces") from None
        return instruction

    def choose(self, tasks: Mapping[str, T]) -> T:
        """Chooses the task whose history and words a side is rendered with.

        Args:
          tasks: of a recipe or a bundle, by name.

        Returns:
          The task named by `task`; the first, if none is named.

        Raises:
          ConfigError: there is no task of this name.
        """
        for name, task in tasks.items():
            if self.task in ("", name):
                return task
        raise self.error(f"no task '{self.task}'; tasks: {', '.join(tasks)}", "task")


class Sides:
    """Writes the texts of members and items as tokens, the same in training, evaluation and serving.

    A member's text is a ranking prompt without its question, with an instruction of its own; an item's text has the
    facts of a question. Both end with EOS if the tokenizer has it.

    Args:
      verbalizer: of the dataset.
      task: gives the history and the words around it.
      prompts: the style (`score_style`) and the most tokens of a text.
      config: the instructions.

    Attributes:
      overlong: counts the items whose texts were truncated.
    """

    def __init__(self, verbalizer: Verbalizer, task: Task, prompts: PromptConfig, config: SideConfig):
        card = verbalizer.dataset.card
        nouns = {"member": card.members.noun, "item": task.side_of(card).items.noun}
        self._verbalizer, self._prompts, self.overlong = verbalizer, prompts, verbalizer.overlong
        self._task = task.model_copy(
            update={"instruction": config.member_instruction.format(**nouns), "steering_note": ""}
        )
        self._item_instruction = config.item_instruction.format(**nouns)

    def member(self, example: RankingExample) -> list[int]:
        """The tokens of a member as of an example's cutoff time. The oldest events are left out to fit.

        Its candidates play no part: what the member goes on to must not show in how much of the history fits.

        Args:
          example: of the member; its history is what the text tells.

        Returns:
          Token ids, with BOS and EOS where the tokenizer has them.

        Raises:
          ValueError: the profile alone does not fit.
        """
        try:
            prompt = self._verbalizer.prompt(self._task, example.select(slice(0, 0)), self._prompts.score_style)
        except ValueError:
            dataset = self._verbalizer.dataset
            member = f"{dataset.card.members.noun} {dataset.member_id(example.member)}"
            raise ValueError(f"the profile of {member} has more than {self._prompts.max_tokens:,} tokens") from None
        encoded = encode(prompt, self._verbalizer.tokenizer, "dense")
        return [token for piece in encoded.prefix_pieces for token in piece] + self._verbalizer.tokenizer.eos

    def items(self, rows: np.ndarray, time: int) -> list[list[int]]:
        """The tokens of items as of a time. A text that is too long is truncated, which `overlong` notes.

        Args:
          rows: int [items], rows of the items table.
          time: microseconds since 1970.

        Returns:
          Token ids of each item, with BOS and EOS where the tokenizer has them.
        """
        style, tokenizer = STYLES[self._prompts.score_style], self._verbalizer.tokenizer
        heading = f"{self._item_instruction}\n" if self._item_instruction else ""
        facts = self._verbalizer.facts("items", rows, time, style)
        texts = [heading + style.join.join(item_facts) for item_facts in facts]
        room = self._prompts.max_tokens - len(tokenizer.eos)
        encoded = [tokenizer.with_bos(tokens) for tokens in tokenizer.encode(texts, begins=True)]
        for row, text, tokens in zip(rows.tolist(), texts, encoded, strict=True):
            if len(tokens) > room:
                overlong = self._verbalizer.describe_overlong("items", row, text, room, time, style)
                self.overlong.add(self._task.name, "truncated", overlong)
        return [tokens[:room] + tokenizer.eos for tokens in encoded]
