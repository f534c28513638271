"""Who sends requests: how much of the queue a caller may take, and whose requests are scored first."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple


class Caller(NamedTuple):
    """A caller that the server tells from others by its token.

    Attributes:
      name: in metrics and refusals; empty for everybody without a token of their own.
      share: of `max_queued_tokens` and of `max_concurrent_requests` that its requests may take at a time.
      priority: requests of a higher one are scored first.
    """

    name: str = ""
    share: float = 1.0
    priority: int = 0


UNNAMED = Caller()
# Of the request in progress. Set where its token is checked, on either port; threads do not inherit it.
current_caller: ContextVar[Caller] = ContextVar("current_caller", default=UNNAMED)
