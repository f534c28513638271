"""From a request to tokens. Every text is checked, and every error names the field that it is about."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from brewjax.bundle.bundle import Bundle
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import LABELS_IN_PASS
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.config import ServeConfig
from brewjax.serve.live import LiveCatalogues
from brewjax.serve.members import (
    context_attributes,
    event_attributes,
    find_surface,
    item_attributes,
    render_member,
)
from brewjax.serve.refusals import MAX_ID
from brewjax.serve.texts import Texts

SLICE = 1_000  # items that are encoded at a time
MAX_LABELS = 8 * LABELS_IN_PASS  # of a raw request
MAX_JOINT = 4_000_000  # characters of a request whose prefix is read anew with each item: a second or two


@dataclasses.dataclass(frozen=True)
class EncodedRequest:
    """A request as tokens, and what its response needs.

    Attributes:
      prompt: the tokens to score.
      labels: label words, or token ids in digits.
      values: float64 [labels], the gain of each label; items are ordered by the expected gain.
      ids: of the items, for the response.
      model: name and version of the model that scores.
      num_truncated_events: oldest events that were left out.
      num_truncated_tokens: first tokens of a raw prefix that were left out.
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
      bundle: the model.
      model: its name and version.
      tasks: for member requests, in addition to the tasks that the model was trained on, by surface.
      config: limits of requests.
      max_prefix_tokens: maximum tokens of a prefix.
      catalogues: know the members that requests name by `id`.

    Attributes:
      tasks: all that are served, by name, for each surface by name.
      catalogues: of the members that requests name by `id`.

    Raises:
      ConfigError: for a task with a label word that is not one token, with too many labels, or of no surface; for a
        delimiter that is no token of the model.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: str,
        tasks: Mapping[str, Sequence[Task]],
        config: ServeConfig,
        max_prefix_tokens: int,
        catalogues: LiveCatalogues | None = None,
    ):
        prompts = bundle.prompts.model_copy(update={"max_tokens": min(bundle.prompts.max_tokens, max_prefix_tokens)})
        self.bundle, self.model = dataclasses.replace(bundle, prompts=prompts), model
        for name in tasks:
            bundle.surface(name)  # raises where the model has none of this name
        self.tasks = {
            name: {task.name: task for task in (*surface.tasks, *tasks.get(name, ()))}
            for name, surface in bundle.surfaces.items()
        }
        self.config, self.max_prefix_tokens = config, max_prefix_tokens
        self.catalogues = catalogues or LiveCatalogues(bundle, {})
        self._texts = Texts(bundle.tokenizer, config.special_tokens)
        if config.item_delimiter is not None and config.item_delimiter >= bundle.model.vocab_size:
            raise config.error(f"the model's tokens are below {bundle.model.vocab_size:,}", "item_delimiter")
        for index, word in enumerate(config.rerank.labels if config.rerank else ()):
            try:
                bundle.tokenizer.label_token_id(word)
            except ValueError as error:
                raise config.error(str(error), "rerank", "labels", index) from None
        for task in (task for of_surface in self.tasks.values() for task in of_surface.values()):
            task.check_words(bundle.tokenizer)
            if len(task.labels) > LABELS_IN_PASS:
                raise task.error(f"{len(task.labels)} of them; at most {LABELS_IN_PASS} are served", "labels")

    def encode(self, request: pb.ScoreRequest, max_items: int, catalogue: Catalogue | None = None) -> EncodedRequest:
        """Encodes a request.

        Args:
          request: with a member, or a raw prompt.
          max_items: the most items that may be asked about.
          catalogue: that a member by id is of; by default that of the surface, as it is now.

        Returns:
          Its tokens.

        Raises:
          ValueError: it cannot be scored; names field and reason.
        """
        if len(request.request_id) > MAX_ID:
            raise ValueError(f"request_id: {len(request.request_id):,} characters; give at most {MAX_ID}")
        size = request.ByteSize()
        if size > self.config.max_request_bytes:
            raise ValueError(
                f"the request: {size:,} bytes; at most {self.config.max_request_bytes:,} are read (max_request_bytes)"
            )
        kind = request.WhichOneof("question")
        if kind is None:
            raise ValueError("question: give a member or raw")
        num_items = len(request.member.items if kind == "member" else request.raw.items)
        if not 0 < num_items <= max_items:
            raise ValueError(f"{kind}.items: {num_items:,} of them; give 1 to {max_items:,}")
        history = "history" if kind == "member" else "events"
        num_events = len(getattr(getattr(request, kind), history))
        if num_events > self.config.max_events:
            raise ValueError(
                f"{kind}.{history}: {num_events:,} of them; give at most {self.config.max_events:,} (max_events)"
            )
        encoded = self._encode_member(request, catalogue) if kind == "member" else self._encode_raw(request)
        for index, item in enumerate(encoded.prompt.questions):
            if len(item) > self.config.max_candidate_tokens:
                limit = self.config.max_candidate_tokens
                raise ValueError(
                    f"{kind}.items[{index}]: {len(item):,} tokens; at most {limit:,} are read (max_candidate_tokens)"
                )
        return encoded

    def task(self, member: pb.Member) -> Task:
        """Looks up what is asked of a member.

        Args:
          member: of the request.

        Returns:
          The task.

        Raises:
          ValueError: the member's surface has none of this name, or there is no such surface.
        """
        tasks = self.tasks[find_surface(self.bundle, member).name]
        if member.task not in tasks:
            raise ValueError(f"member.task: no task '{member.task}'; tasks: {', '.join(tasks)}")
        return tasks[member.task]

    def catalogue(self, member: pb.Member) -> Catalogue | None:
        """The catalogue that a member's id is of, if there is one. Raises ValueError if there is no such surface."""
        return self.catalogues.get(find_surface(self.bundle, member).name)

    def _encode_member(self, request: pb.ScoreRequest, catalogue: Catalogue | None) -> EncodedRequest:
        member = request.member
        task = self.task(member)
        self._bound_values(member, request.truncation != pb.ScoreRequest.REJECT)
        prompt = render_member(self.bundle, task, member, catalogue or self.catalogue(member))
        if prompt.truncated_texts and request.truncation == pb.ScoreRequest.REJECT:
            raise ValueError(f"member: {prompt.truncated_texts[0]}; set truncation to TRUNCATE or send less")
        if prompt.num_truncated_events and request.truncation == pb.ScoreRequest.REJECT:
            raise ValueError(
                f"member.history: the oldest {prompt.num_truncated_events} events do not fit; "
                "set truncation to TRUNCATE or send fewer"
            )
        ids = [item.id for item in member.items]
        return EncodedRequest(
            self.bundle.encode(prompt), task.words, task.values, ids, self.model, prompt.num_truncated_events
        )

    def _bound_values(self, member: pb.Member, truncate: bool) -> None:
        """Shortens texts of a member that are longer than a whole prefix, so that rendering them costs little.

        Raises ValueError, naming the field, unless `truncate`.
        """
        attributes = {"member.attributes": member.attributes, **event_attributes(member), **item_attributes(member)}
        attributes |= context_attributes(member)
        bound = self._texts.shorten if truncate else self._texts.check_bytes
        member.steering_note = bound(member.steering_note, self.max_prefix_tokens, "member.steering_note")
        for field, values in attributes.items():
            for value in values.values():
                if value.text:
                    value.text = bound(value.text, self.max_prefix_tokens, field)
                for index, text in enumerate(value.list.values):
                    value.list.values[index] = bound(text, self.max_prefix_tokens, field)

    def _encode_raw(self, request: pb.ScoreRequest) -> EncodedRequest:
        raw, truncate = request.raw, request.truncation == pb.ScoreRequest.TRUNCATE
        prefix, items = self._encode_jointly(raw) if raw.joint else (self._encode_prefix(raw.prefix, truncate), None)
        events = self._encode_events(raw.events, self.max_prefix_tokens - len(prefix), truncate)
        length = len(prefix) + sum(map(len, events))
        if length > self.max_prefix_tokens and not truncate:
            more = "" if len(events) == len(raw.events) else "more than "
            raise ValueError(
                f"raw: {more}{length:,} tokens before the items; at most {self.max_prefix_tokens:,} are read "
                "(max_prefix_tokens) unless truncation is TRUNCATE"
            )
        excess = max(0, len(prefix) - self.max_prefix_tokens)
        bos = self.bundle.tokenizer.bos  # stays in front of a truncated prefix
        start = len(bos) if prefix[: len(bos)] == bos else 0
        prefix = prefix[:start] + prefix[start + excess :]
        if items is None:
            items = self._encode_items(raw.items)
        if [] in items:  # is scored at the last token before it, with which every item then begins
            if raw.events or not prefix:
                raise ValueError(f"raw.items[{items.index([])}]: empty")
            items, prefix = [prefix[-1:] + item for item in items], prefix[:-1]
        pieces = [prefix, *events]
        labels = self._encode_labels(raw)
        prompt = EncodedPrompt(pieces, items, labels, [None] * len(items), self.bundle.prompts.layout)
        words = [*raw.labels, *map(str, raw.label_tokens)]
        values = np.eye(len(labels))[0]  # the first label's probability orders the items
        num_truncated = len(raw.events) - len(events)
        return EncodedRequest(prompt, words, values, [""] * len(items), self.model, num_truncated, excess)

    def _encode_jointly(self, raw: pb.Raw) -> tuple[list[int], list[list[int]]]:
        """The first tokens that the prefix and each "prefix + item" have in common, and what follows in the latter."""
        texts = [raw.prefix, *raw.items]
        if raw.events or any(text.WhichOneof("kind") == "tokens" for text in texts):
            raise ValueError("raw.joint: only for texts, without events")
        joined = [raw.prefix.text + item.text for item in raw.items]
        if (size := sum(map(len, joined))) > MAX_JOINT:
            raise ValueError(
                f"raw.joint: the prefix is read again with each item, {size:,} characters in all; give at most "
                f"{MAX_JOINT:,}, or set joint to false"
            )
        (prefix,) = self._texts.read([raw.prefix.text], self.max_prefix_tokens, ["raw.prefix"], begins=True)
        fields = [f"raw.items[{index}]" for index in range(len(joined))]
        limit = self.max_prefix_tokens + self.config.max_candidate_tokens
        with_bos = self.bundle.tokenizer.with_bos
        tokens = [with_bos(ids) for ids in self._texts.read(joined, limit, fields, begins=True)]
        columns = zip(with_bos(prefix), *tokens, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        return tokens[0][:shared], [ids[shared:] for ids in tokens]

    def _encode_prefix(self, text: pb.Text, truncate: bool) -> list[int]:
        """Tokens of a prefix; if it is a text to truncate, of an end of it that is long enough."""
        if text.WhichOneof("kind") == "tokens":
            return self._check_tokens(text.tokens.ids, "raw.prefix")
        if truncate:
            ids = self._texts.read_end(text.text, self.max_prefix_tokens, begins=True)
        else:
            (ids,) = self._texts.read([text.text], self.max_prefix_tokens, ["raw.prefix"], begins=True)
        return self.bundle.tokenizer.with_bos(ids)

    def _encode_events(self, texts: Sequence[pb.Text], room: int, truncate: bool) -> list[list[int]]:
        """Tokens of the newest events that fit into `room` tokens; unless `truncate`, of one more, which does not."""
        newest_first: list[list[int]] = []
        for index in reversed(range(len(texts))):
            if room < 0:
                break
            text, field = texts[index], f"raw.events[{index}]"
            if truncate and text.WhichOneof("kind") != "tokens":
                ids = self._texts.read_end(text.text, self.max_prefix_tokens)
            else:
                (ids,) = self._encode_texts({field: text}, self.max_prefix_tokens)
            newest_first.append(ids)
            room -= len(ids)
        if truncate and room < 0 and newest_first:
            newest_first.pop()
        return newest_first[::-1]

    def _encode_items(self, texts: Sequence[pb.Text]) -> list[list[int]]:
        items: list[list[int]] = []
        for start in range(0, len(texts), SLICE):
            sliced = {f"raw.items[{start + index}]": text for index, text in enumerate(texts[start : start + SLICE])}
            items += self._encode_texts(sliced, self.config.max_candidate_tokens)
        return items

    def _encode_labels(self, raw: pb.Raw) -> list[int]:
        if not 0 < (count := len(raw.labels) + len(raw.label_tokens)) <= MAX_LABELS:
            raise ValueError(f"raw.labels: {count:,} of them; give 1 to {MAX_LABELS}")
        labels = [self._texts.label_token_id(word, f"raw.labels[{index}]") for index, word in enumerate(raw.labels)]
        labels += self._check_tokens(raw.label_tokens, "raw.label_tokens")
        if len(set(labels)) < len(labels):
            raise ValueError("raw.labels: one is given twice")
        return labels

    def _encode_texts(self, texts: Mapping[str, pb.Text], limit: int) -> list[list[int]]:
        """Token ids of texts, which are keyed by field. Raises ValueError for a written text of more than `limit`."""
        written = {field: text.text for field, text in texts.items() if text.WhichOneof("kind") != "tokens"}
        written_ids = iter(self._texts.read(list(written.values()), limit, list(written)))
        return [
            next(written_ids) if field in written else self._check_tokens(text.tokens.ids, field)
            for field, text in texts.items()
        ]

    def _check_tokens(self, tokens: Sequence[int], field: str) -> list[int]:
        """The tokens. Raises ValueError for one that the model does not have."""
        size = self.bundle.model.vocab_size
        if tokens and max(tokens) >= size:
            raise ValueError(f"{field}: no token {max(tokens)}; the model knows {size:,}")
        return list(tokens)
