"""The parts of a tokenizer's chat template that stand between what is said in its turns."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, NamedTuple

from brewjax.config import Config

if TYPE_CHECKING:
    from brewjax.data.text.tokenizer import Tokenizer  # imports transformers, for seconds

MARKS = ("\x01", "\x02", "\x03", "\x04")  # the contents of turns, when only what stands between them is asked for
FOLDED = "\n\n"  # between the instruction and the user's text, where a template knows no system's turn
THINKING = re.compile(r"<think(?:ing)?>(?!.*</think)|\[THINK\](?!.*\[/THINK\])", re.DOTALL)


class ChatTemplate(Config):
    """What a chat template is filled with beside the turns."""

    arguments: dict[str, bool | int | float | str] = {}
    """By the names that the template has for them. `enable_thinking` is false unless it is here: an answer is read
    where it is asked for, and not where a model begins to think."""
    date: datetime.date = datetime.date(2024, 7, 26)
    """The day that the template takes for today, always the same: scores would change with it."""


AS_IT_COMES = ChatTemplate()


class Chat(NamedTuple):
    """What a chat template puts before the instruction, between it and the user's turn, between that and the
    assistant's, before the answer within that, and after it before the user's next turn."""

    begin: str = ""
    user: str = ""
    assistant: str = ""
    answer: str = ""
    user_again: str = ""


def chat_parts(tokenizer: Tokenizer, template: ChatTemplate) -> Chat:
    """A template that refuses a system's turn, or says it elsewhere, gets the instruction in the user's.

    Raises ValueError where the template does not say the turns, once each and in order, up to an answer.
    """
    try:
        begin, user, before, user_again, assistant = _between(
            tokenizer, template, "system", "user", "assistant", "user"
        )
    except ValueError:
        user = FOLDED
        begin, before, user_again, assistant = _between(tokenizer, template, "user", "assistant", "user")
    if THINKING.search(assistant):
        raise ValueError(
            f"its chat template lets the assistant think before it answers ({assistant.strip()!r}); the answer is read "
            "where it stands"
        )
    # Where only a turn that is said has a space before the answer, that is part of the answer's first token.
    answer = before.removeprefix(assistant) if before.startswith(assistant) else ""
    return Chat(begin, user, assistant, answer, user_again)


def _between(tokenizer: Tokenizer, template: ChatTemplate, *roles: str) -> list[str]:
    """What stands before, between and behind the contents of turns."""
    marks = MARKS[: len(roles)]
    text = tokenizer.chat([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)], template)
    pattern = "|".join(MARKS)
    if tuple(re.findall(pattern, text)) != marks:
        raise ValueError(f"its chat template does not say the turns of {', '.join(roles)} once each and in order")
    return re.split(pattern, text)
