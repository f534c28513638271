"""Splits a tokenizer's chat template into the texts between the contents of its turns."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, NamedTuple

from brewjax.config import Config

if TYPE_CHECKING:
    from brewjax.data.text.tokenizer import Tokenizer  # importing transformers takes seconds

MARKS = ("\x01", "\x02", "\x03", "\x04")  # stand for the contents of turns
FOLDED = "\n\n"  # between the instruction and the user's text, if the template has no system turn
THINKING = re.compile(r"<think(?:ing)?>(?!.*</think)|\[THINK\](?!.*\[/THINK\])", re.DOTALL)


class ChatTemplate(Config):
    """The values that a chat template is rendered with, apart from the turns."""

    arguments: dict[str, bool | int | float | str] = {}
    """Variables of the template, by name. `enable_thinking` is false unless set here, because an answer is read where
    the assistant's turn begins, not after a model's reasoning."""
    date: datetime.date = datetime.date(2024, 7, 26)
    """The day that the template takes for today. It is fixed, because scores would change with it."""


AS_IT_COMES = ChatTemplate()


class Chat(NamedTuple):
    """The texts that a chat template puts between the contents of turns; all empty without a template.

    Attributes:
      begin: before the instruction.
      user: between the instruction and the user's text.
      assistant: between the user's text and the assistant's turn.
      answer: within the assistant's turn, before the answer.
      user_again: between the answer and the user's next text.
    """

    begin: str = ""
    user: str = ""
    assistant: str = ""
    answer: str = ""
    user_again: str = ""


def chat_parts(tokenizer: Tokenizer, template: ChatTemplate) -> Chat:
    """Splits the tokenizer's chat template. If it refuses a system turn, or moves it, the instruction becomes part of
    the user's turn.

    Args:
      tokenizer: whose template is rendered.
      template: the variables that it is rendered with.

    Returns:
      What stands between the contents of turns.

    Raises:
      ValueError: the template does not render the turns once each and in order, or lets the assistant think first.
    """
    try:
        begin, user, before_answer, user_again, assistant = _split_template(
            tokenizer, template, "system", "user", "assistant", "user"
        )
    except ValueError:
        user = FOLDED
        begin, before_answer, user_again, assistant = _split_template(tokenizer, template, "user", "assistant", "user")
    if THINKING.search(assistant):
        raise ValueError(
            f"its chat template lets the assistant think before it answers ({assistant.strip()!r}); the answer is read "
            "where the turn begins"
        )
    # If only a complete turn has a space before the answer, the space belongs to the answer's first token.
    answer = before_answer.removeprefix(assistant) if before_answer.startswith(assistant) else ""
    return Chat(begin, user, assistant, answer, user_again)


def _split_template(tokenizer: Tokenizer, template: ChatTemplate, *roles: str) -> list[str]:
    """The texts before, between and behind the contents of turns with these roles."""
    marks = MARKS[: len(roles)]
    text = tokenizer.chat([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)], template)
    pattern = "|".join(MARKS)
    if tuple(re.findall(pattern, text)) != marks:
        raise ValueError(f"its chat template does not render the turns of {', '.join(roles)} once each and in order")
    return re.split(pattern, text)
