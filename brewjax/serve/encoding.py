"""From a request to tokens: every text checked, and every error naming the field it is about."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from brewjax.bundle.bundle import Bundle
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import LABELS_IN_PASS
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.config import ServeConfig
from brewjax.serve.members import render_member
from brewjax.serve.refusals import MAX_ID
from brewjax.serve.texts import Texts

SLICE = 1_000  # items that are read at a time


@dataclasses.dataclass(frozen=True)
class EncodedRequest:
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
    num_truncated_events: int = 0
    num_truncated_tokens: int = 0


class RequestEncoder:
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
        self._texts = Texts(bundle.tokenizer, config.special_tokens)
        for task in self.tasks.values():
            task.check_words(bundle.tokenizer)
            if len(task.labels) > LABELS_IN_PASS:
                raise task.error(f"{len(task.labels)} of them; at most {LABELS_IN_PASS} are served", "labels")

    def encode(self, request: pb.ScoreRequest, most_items: int) -> EncodedRequest:
        """Raises ValueError naming the field that cannot be scored, and why."""
        if len(request.request_id) > MAX_ID:
            raise ValueError(f"request_id: {len(request.request_id):,} characters; give at most {MAX_ID}")
        size = request.ByteSize()
        if size > self.config.max_request_bytes:
            raise ValueError(f"the request: {size:,} bytes; at most {self.config.max_request_bytes:,} are read")
        asked = request.WhichOneof("question")
        if asked is None:
            raise ValueError("question: give a member or raw")
        items = len(request.member.items if asked == "member" else request.raw.items)
        if not 0 < items <= most_items:
            raise ValueError(f"{asked}.items: {items:,} of them; give 1 to {most_items:,}")
        history = "history" if asked == "member" else "events"
        events = len(getattr(getattr(request, asked), history))
        if events > self.config.max_events:
            raise ValueError(f"{asked}.{history}: {events:,} of them; give at most {self.config.max_events:,}")
        encoded = self._member(request) if asked == "member" else self._raw(request)
        for place, item in enumerate(encoded.prompt.questions):
            if len(item) > self.config.max_candidate_tokens:
                limit = self.config.max_candidate_tokens
                raise ValueError(f"{asked}.items[{place}]: {len(item):,} tokens; at most {limit:,} are read")
        return encoded

    def _member(self, request: pb.ScoreRequest) -> EncodedRequest:
        member = request.member
        task = self.tasks.get(member.task)
        if task is None:
            raise ValueError(f"member.task: no task '{member.task}'; tasks: {', '.join(self.tasks)}")
        self._bound_values(member, request.truncation != pb.ScoreRequest.REJECT)
        prompt = render_member(self.bundle, task, member)
        if prompt.truncated_texts and request.truncation == pb.ScoreRequest.REJECT:
            raise ValueError(f"member: {prompt.truncated_texts[0]}; set truncation to TRUNCATE or send less")
        if prompt.num_truncated_events and request.truncation == pb.ScoreRequest.REJECT:
            raise ValueError(
                f"member.history: the oldest {prompt.num_truncated_events} events do not fit; set truncation to TRUNCATE or send fewer"
            )
        ids = [item.id for item in member.items]
        return EncodedRequest(
            self.bundle.encode(prompt), task.words, task.values, ids, self.model, prompt.num_truncated_events
        )

    def _bound_values(self, member: pb.Member, cut: bool) -> None:
        """Before they are put into words, cuts texts that are longer than all that is read, or refuses them.

        Raises ValueError, naming the field.
        """
        attributes = {"member.attributes": member.attributes}
        attributes |= {
            f"member.history[{row}].attributes": event.attributes for row, event in enumerate(member.history)
        }
        attributes |= {f"member.history[{row}].item": event.item for row, event in enumerate(member.history)}
        attributes |= {f"member.items[{row}].attributes": item.attributes for row, item in enumerate(member.items)}
        bound = self._texts.shorten if cut else self._texts.check_bytes
        member.steering_note = bound(member.steering_note, self.context, "member.steering_note")
        for field, values in attributes.items():
            for value in values.values():
                if value.text:
                    value.text = bound(value.text, self.context, field)
                for index, text in enumerate(value.list.values):
                    value.list.values[index] = bound(text, self.context, field)

    def _raw(self, request: pb.ScoreRequest) -> EncodedRequest:
        raw, cut = request.raw, request.truncation == pb.ScoreRequest.TRUNCATE
        prefix = self._prefix(raw.prefix, cut)
        events = self._events(raw.events, self.context - len(prefix), cut)
        length = len(prefix) + sum(map(len, events))
        if length > self.context and not cut:
            more = "" if len(events) == len(raw.events) else "more than "
            raise ValueError(
                f"raw: {more}{length:,} tokens before the items; at most {self.context:,} are read, "
                "unless truncation is TRUNCATE"
            )
        excess = max(0, len(prefix) - self.context)
        begin = self.bundle.tokenizer.bos
        start = len(begin) if prefix[: len(begin)] == begin else 0
        pieces = [prefix[:start] + prefix[start + excess :], *events]
        items = self._items(raw.items)
        labels = self._labels(raw)
        prompt = EncodedPrompt(pieces, items, labels, [None] * len(items), self.bundle.prompts.layout)
        words = [*raw.labels, *map(str, raw.label_tokens)]
        num_cut = len(raw.events) - len(events)
        return EncodedRequest(prompt, words, np.eye(len(labels))[0], [""] * len(items), self.model, num_cut, excess)

    def _prefix(self, text: pb.Text, cut: bool) -> list[int]:
        """Its tokens; of a text that is cut, an end that is long enough."""
        if text.WhichOneof("kind") == "tokens":
            return self._known(text.tokens.ids, "raw.prefix")
        if cut:
            ids = self._texts.read_end(text.text, self.context, begins=True)
        else:
            (ids,) = self._texts.read([text.text], self.context, ["raw.prefix"], begins=True)
        return self.bundle.tokenizer.with_bos(ids)

    def _events(self, texts: Sequence[pb.Text], room: int, cut: bool) -> list[list[int]]:
        """Tokens of the newest events that fit; where nothing is cut, of one more that does not."""
        newest_first: list[list[int]] = []
        for index in reversed(range(len(texts))):
            if room < 0:
                break
            text, field = texts[index], f"raw.events[{index}]"
            if cut and text.WhichOneof("kind") != "tokens":
                ids = self._texts.read_end(text.text, self.context)
            else:
                (ids,) = self._tokens({field: text}, self.context)
            newest_first.append(ids)
            room -= len(ids)
        if cut and room < 0 and newest_first:
            newest_first.pop()
        return newest_first[::-1]

    def _items(self, texts: Sequence[pb.Text]) -> list[list[int]]:
        items: list[list[int]] = []
        for start in range(0, len(texts), SLICE):
            sliced = {f"raw.items[{start + index}]": text for index, text in enumerate(texts[start : start + SLICE])}
            for field, item in zip(sliced, self._tokens(sliced, self.config.max_candidate_tokens), strict=True):
                if not item:
                    raise ValueError(f"{field}: empty")
                items.append(item)
        return items

    def _labels(self, raw: pb.Raw) -> list[int]:
        if not 0 < (count := len(raw.labels) + len(raw.label_tokens)) <= LABELS_IN_PASS:
            raise ValueError(f"raw.labels: {count:,} of them; give 1 to {LABELS_IN_PASS}")
        labels = [self._texts.word(word, f"raw.labels[{index}]") for index, word in enumerate(raw.labels)]
        labels += self._known(raw.label_tokens, "raw.label_tokens")
        if len(set(labels)) < len(labels):
            raise ValueError("raw.labels: one is given twice")
        return labels

    def _tokens(self, texts: Mapping[str, pb.Text], limit: int) -> list[list[int]]:
        """Token ids of texts by their fields in the request; ValueError where a written one has more than `limit`."""
        written = {field: text.text for field, text in texts.items() if text.WhichOneof("kind") != "tokens"}
        read = iter(self._texts.read(list(written.values()), limit, list(written)))
        return [
            next(read) if field in written else self._known(text.tokens.ids, field) for field, text in texts.items()
        ]

    def _known(self, tokens: Sequence[int], place: str) -> list[int]:
        size = self.bundle.model.vocab_size
        if tokens and max(tokens) >= size:
            raise ValueError(f"{place}: no token {max(tokens)}; the model knows {size:,}")
        return list(tokens)
