"""From a request to tokens: every text checked, and every error naming the field it is about."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from brewjax.data.task import Task
from brewjax.data.tokens import EncodedPrompt
from brewjax.scoring.bundle import Bundle
from brewjax.scoring.passes import LABELS_IN_PASS
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.config import ServeConfig
from brewjax.serve.members import say

MOST_ID = 200  # characters of a request's id


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A request as tokens, and what its answer needs.

    Attributes:
      values: float64 [labels]; items are ordered by the expected one.
      ids: of the items.
      model: name and version of who is to answer.
    """

    prompt: EncodedPrompt
    labels: Sequence[str]
    values: np.ndarray
    ids: Sequence[str]
    model: str
    events_cut: int = 0
    tokens_cut: int = 0


class Encoder:
    """Encodes requests for one model.

    Args:
      model: its name and version.
      tasks: what may be asked of members, beside what the model was trained on.
      context: most tokens of a prefix.
    """

    def __init__(self, bundle: Bundle, model: str, tasks: Sequence[Task], config: ServeConfig, context: int):
        prompts = bundle.prompts.model_copy(update={"max_tokens": min(bundle.prompts.max_tokens, context)})
        self.bundle, self.model = dataclasses.replace(bundle, prompts=prompts), model
        self.tasks = {task.name: task for task in [*bundle.tasks, *tasks]}
        self.config, self.context = config, context
        for task in self.tasks.values():
            task.check_words(bundle.tokenizer)
            if len(task.labels) > LABELS_IN_PASS:
                raise task.error(f"{len(task.labels)} of them; at most {LABELS_IN_PASS} are served", "labels")

    def encode(self, request: pb.ScoreRequest, most_items: int) -> Encoded:
        """Raises ValueError naming the field that cannot be scored, and why."""
        if len(request.request_id) > MOST_ID:
            raise ValueError(f"request_id: {len(request.request_id):,} characters; give at most {MOST_ID}")
        size = request.ByteSize()
        if size > self.config.request_bytes:
            raise ValueError(f"the request: {size:,} bytes; at most {self.config.request_bytes:,} are read")
        asked = request.WhichOneof("question")
        if asked is None:
            raise ValueError("question: give a member or raw")
        items = len(request.member.items if asked == "member" else request.raw.items)
        if not 0 < items <= most_items:
            raise ValueError(f"{asked}.items: {items:,} of them; give 1 to {most_items:,}")
        history = "history" if asked == "member" else "events"
        events = len(getattr(getattr(request, asked), history))
        if events > self.config.events:
            raise ValueError(f"{asked}.{history}: {events:,} of them; give at most {self.config.events:,}")
        encoded = self._member(request) if asked == "member" else self._raw(request)
        for place, item in enumerate(encoded.prompt.questions):
            if len(item) > self.config.item_tokens:
                limit = self.config.item_tokens
                raise ValueError(f"{asked}.items[{place}]: {len(item):,} tokens; at most {limit:,} are read")
        return encoded

    def _member(self, request: pb.ScoreRequest) -> Encoded:
        member = request.member
        task = self.tasks.get(member.task)
        if task is None:
            raise ValueError(f"member.task: no task '{member.task}'; tasks: {', '.join(self.tasks)}")
        prompt = say(self.bundle, task, member)
        if prompt.dropped and request.too_long == pb.ScoreRequest.REFUSE:
            raise ValueError(
                f"member.history: the oldest {prompt.dropped} events do not fit; ask for CUT or send fewer"
            )
        ids = [item.id for item in member.items]
        return Encoded(self.bundle.encode(prompt), task.words, task.values, ids, self.model, prompt.dropped)

    def _raw(self, request: pb.ScoreRequest) -> Encoded:
        raw, tokenizer = request.raw, self.bundle.tokenizer
        [prefix] = self._tokens({"raw.prefix": raw.prefix}, begins=True)
        events = self._tokens(_places("raw.events", raw.events))
        items = self._tokens(_places("raw.items", raw.items))
        if raw.prefix.WhichOneof("kind") != "tokens":
            prefix = tokenizer.begin(prefix)
        for place, item in enumerate(items):
            if not item:
                raise ValueError(f"raw.items[{place}]: empty")
        length = len(prefix) + sum(map(len, events))
        if length > self.context and request.too_long != pb.ScoreRequest.CUT:
            raise ValueError(
                f"raw: {length:,} tokens before the items; at most {self.context:,} are read, unless too_long is CUT"
            )
        newest_first = np.cumsum([len(event) for event in reversed(events)])
        cut = len(events) - int(np.searchsorted(newest_first, self.context - len(prefix), side="right"))
        excess = max(0, len(prefix) - self.context)
        start = len(tokenizer.bos) if tokenizer.begin(prefix) is prefix else 0
        pieces = [prefix[:start] + prefix[start + excess :], *events[cut:]]
        labels = self._labels(raw)
        prompt = EncodedPrompt(pieces, items, labels, [None] * len(items), self.bundle.prompts.layout)
        words = [*raw.labels, *map(str, raw.label_tokens)]
        return Encoded(prompt, words, np.eye(len(labels))[0], [""] * len(items), self.model, cut, excess)

    def _labels(self, raw: pb.Raw) -> list[int]:
        labels = []
        for place, word in enumerate(raw.labels):
            try:
                labels.append(self.bundle.tokenizer.word(word))
            except ValueError as error:
                raise ValueError(f"raw.labels[{place}]: {error}") from None
        labels += self._known(raw.label_tokens, "raw.label_tokens")
        if not 0 < len(labels) <= LABELS_IN_PASS:
            raise ValueError(f"raw.labels: {len(labels)} of them; give 1 to {LABELS_IN_PASS}")
        if len(set(labels)) < len(labels):
            raise ValueError("raw.labels: one is given twice")
        return labels

    def _tokens(self, texts: Mapping[str, pb.Text], begins: bool = False) -> list[list[int]]:
        """Token ids of texts that are named by where they stand in the request."""
        spelled = [x.text for x in texts.values() if x.WhichOneof("kind") != "tokens"]
        written = iter(self.bundle.tokenizer.encode(spelled, begins))
        return [
            self._known(text.tokens.ids, place) if text.WhichOneof("kind") == "tokens" else next(written)
            for place, text in texts.items()
        ]

    def _known(self, tokens: Sequence[int], place: str) -> list[int]:
        size = self.bundle.model.vocab_size
        if tokens and max(tokens) >= size:
            raise ValueError(f"{place}: no token {max(tokens)}; the model knows {size:,}")
        return list(tokens)


def _places(name: str, texts: Sequence[pb.Text]) -> dict[str, pb.Text]:
    return {f"{name}[{place}]": text for place, text in enumerate(texts)}
