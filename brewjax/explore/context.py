"""`Context`: one member, as of a moment, with a task and candidates. It is ranked, read, changed and taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from brewjax.bundle.bundle import Bundle
from brewjax.config import ConfigError, suggest
from brewjax.data.prompts.styles import STYLES
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.data.text.prompt import Prompt
from brewjax.explore.layers import Layers, read_layers
from brewjax.explore.profile import edit_profile
from brewjax.explore.reasons import Reasons, explain, log_odds
from brewjax.explore.views import PromptView, TokensView

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, repr=False)
class Context:
    """A member as of a moment, what is asked, and the candidates; `change` makes another of it.

        >>> import brewjax
        >>> context = brewjax.open(folder, dataset).context("m7", task="apply")
        >>> "Near home" in str(context.change(note="Near home, please.").prompt())
        True

    Attributes:
      bundle: the model.
      verbalizer: renders prompts of the dataset.
      task: the task, with its instruction and steering note as changed.
      example: the member, the cutoff time, every event that the task's history holds, and the candidates.
      style: of the prompt, a key of STYLES.
      left_out: rows of events that are switched off. No older event takes their place.
      edited_profile: attributes of the member that were changed, by column.
      typed_events: what the member did, as it was typed; None for a member of the tables.
    """

    bundle: Bundle
    verbalizer: Verbalizer
    task: Task
    example: RankingExample
    style: str
    left_out: frozenset[int] = frozenset()
    edited_profile: Mapping[str, str] = dataclasses.field(default_factory=dict)
    typed_events: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        counts = f"{len(self.in_budget)} events, {len(self.example.candidates)} candidates"
        return f"Context({self.dataset.card.members.noun} {self.member}, task {self.task.name}: {counts})"

    @property
    def dataset(self) -> Dataset:
        """The tables."""
        return self.verbalizer.dataset

    @property
    def member(self) -> str:
        """The member's id; for a typed one, an id that no other member has."""
        return self.dataset.member_id(self.example.member)

    def change(
        self,
        *,
        instruction: str | None = None,
        note: str | None = None,
        style: str | None = None,
        left_out: Sequence[int] | None = None,
        history: Sequence[int] | None = None,
        items: Sequence[str] | None = None,
        profile: Mapping[str, str] | None = None,
        bundle: Bundle | None = None,
    ) -> Context:
        """The context with something else in it; what is None stays.

        Args:
          instruction: in place of the task's.
          note: the steering note.
          style: of the prompt.
          left_out: rows of the events to switch off.
          history: rows of the events in another order, or fewer.
          items: ids of the candidates.
          profile: attributes of the member as texts, by column: "" for unknown, commas in a list. Facts, which are
            counted from events, stay.
          bundle: another model, which renders the prompt in the same words, within its own budget.

        Raises:
          ValueError: no such style, event, item or attribute, or a text is no value of it.
        """
        edits = {"instruction": instruction, "steering_note": note}
        task = self.task.model_copy(update={key: text for key, text in edits.items() if text is not None})
        style = check_style(self.style if style is None else style)
        example = self.example
        if history is not None:
            _check_rows(history, self.example.history)
            example = dataclasses.replace(example, history=np.array(history, np.int64))
        if items is not None:
            rows = find_items(self.dataset, task, items)
            unknown = np.full(len(rows), -1, np.int32)
            exposures = unknown.astype(np.int64)
            example = dataclasses.replace(example, candidates=rows, labels=unknown, exposures=exposures)
        switched_off = self.left_out if left_out is None else frozenset(left_out)
        _check_rows(switched_off, self.example.history)
        verbalizer, edited = self.verbalizer, {**self.edited_profile, **(profile or {})}
        if bundle is not None:
            verbalizer = bundle.verbalizer(self.dataset, task)
        if profile:
            verbalizer = verbalizer.with_members(edit_profile(self.dataset, example.member, profile))
        return dataclasses.replace(
            self,
            bundle=bundle or self.bundle,
            verbalizer=verbalizer,
            task=task,
            example=example,
            style=style,
            left_out=switched_off,
            edited_profile=edited,
        )

    @cached_property
    def in_budget(self) -> np.ndarray:
        """int64 [events]: rows of the events that fit into the token budget, switched off or not, oldest first; none in
        a style that renders no history."""
        if not STYLES[self.style].history:
            return self.example.history[:0]
        full = self.verbalizer.prompt(self.task, self.example, self.style)
        return self.example.history[full.num_truncated_events :]

    @property
    def dropped(self) -> np.ndarray:
        """int64 [events]: rows of the oldest events, which the token budget leaves out."""
        read = len(self.in_budget) if STYLES[self.style].history else len(self.example.history)
        return self.example.history[: len(self.example.history) - read]

    @cached_property
    def shown(self) -> np.ndarray:
        """int64 [events]: rows of the events in the prompt: those that fit and are not switched off."""
        return self.in_budget[~np.isin(self.in_budget, list(self.left_out))]

    def render(self, example: RankingExample | None = None, task: Task | None = None) -> Prompt:
        """The prompt; or that of another example or task in its place, in the same style."""
        if example is None:
            example = dataclasses.replace(self.example, history=self.shown)
        return self.verbalizer.prompt(task or self.task, example, self.style)

    @cached_property
    def text(self) -> Prompt:
        """The prompt as text."""
        return self.render()

    @cached_property
    def probabilities(self) -> Float[np.ndarray, "Q L"]:
        """float32 probability of each label for each candidate."""
        return self.bundle.score(self.text)

    @property
    def log_odds(self) -> Float[np.ndarray, " Q"]:
        """Log-odds of the label of the highest value, of each candidate."""
        return log_odds(self.probabilities, self.top_label)

    @property
    def top_label(self) -> int:
        """Index of the label of the highest value: the answer that a ranking hopes for."""
        return int(np.argmax(self.task.values))

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [candidates]: indices of the candidates, the highest expected value first; ties keep their order."""
        return np.argsort(-(self.probabilities @ self.task.values), kind="stable")

    @property
    def item_ids(self) -> list[str]:
        """The id of each candidate."""
        return [self.dataset.item_id(row) for row in self.example.candidates]

    @property
    def titles(self) -> list[str]:
        """A name of each candidate, for people to read."""
        return self.verbalizer.names(self.example.candidates)

    def find(self, item: str | int) -> int:
        """Finds a candidate by its id.

        Args:
          item: the id.

        Returns:
          Its index among the candidates.

        Raises:
          ValueError: it is no candidate; with a guess at what was meant.
        """
        ids = self.item_ids
        if str(item) not in ids:
            noun = self.task.side_of(self.dataset.card).items.noun
            raise ValueError(f"{noun} '{item}' is not among the {len(ids)} candidates; {suggest(str(item), ids[:20])}")
        return ids.index(str(item))

    def rank(self) -> pd.DataFrame:
        """The candidates as a table, the best first: id, title, the probability of each label, log-odds."""
        import pandas as pd

        columns: dict[str, Any] = {"item": self.item_ids, "title": self.titles}
        columns |= {f"P({word})": self.probabilities[:, index] for index, word in enumerate(self.task.words)}
        columns["log_odds"] = self.log_odds
        table = pd.DataFrame(columns).iloc[self.order]
        return table.set_index(pd.RangeIndex(1, len(table) + 1, name="rank"))

    def prompt(self) -> PromptView:
        """The prompt, its pieces coloured, and which piece attends to which."""
        return PromptView(self.text, self.bundle.encode(self.text), self.describe_events(self.dropped))

    def tokens(self) -> TokensView:
        """The prompt as tokens."""
        return TokensView(self.text, self.bundle.encode(self.text), self.bundle.tokenizer)

    def why(self, item: str | int) -> Reasons:
        """What moved the score of a candidate, by its id: see `brewjax.explore.reasons.explain`."""
        return explain(self, item)

    def layers(self, item: str | int) -> Layers:
        """The score of a candidate layer by layer, and attention: see `brewjax.explore.layers.read_layers`."""
        return read_layers(self, item)

    def describe_events(self, rows: np.ndarray) -> list[str]:
        """A line for each event, for people to read: what the member did, on which item, on which day."""
        events = self.dataset.card.events
        lines = []
        for row, name in zip(rows, self.verbalizer.names(self.dataset.event_item[rows]), strict=True):
            day = np.datetime64(int(self.dataset.event_time[row]), "us").astype("M8[D]")
            past = events.actions[self.dataset.action_name(row)].past
            lines.append(f"{past}: {name}" + (f" ({day})" if events.time else ""))
        return lines


def check_style(name: str) -> str:
    """Checks the name of a style.

    Args:
      name: to check.

    Returns:
      `name`.

    Raises:
      ConfigError: no style has it.
    """
    if name not in STYLES:
        raise ConfigError(f"no style '{name}'; {suggest(name, STYLES, listing='styles')}")
    return name


def find_items(dataset: Dataset, task: Task, ids: Sequence[str]) -> np.ndarray:
    """Finds items by their ids.

    Args:
      dataset: the tables.
      task: which asks about them; in a union, about those of one dataset.
      ids: written as text; at least one.

    Returns:
      int32 [items]: their rows.

    Raises:
      ValueError: an id is unknown or of another dataset of the union, or there is none.
    """
    is_asked, every_id = dataset.items_of(task.questions.actions[0]), dataset.items[dataset.card.items.id].to_pylist()
    known = {str(item_id): row for row, item_id in enumerate(every_id) if is_asked[row]}
    for item_id in ids:
        if str(item_id) not in known:
            example = ", ".join(f"'{known_id}'" for known_id in [*known][:3])
            noun = task.side_of(dataset.card).items.noun
            raise ValueError(f"{dataset.path}: no {noun} '{item_id}'; ids look like {example}")
    if not len(ids):
        raise ValueError("no candidates; give at least one item")
    return np.array([known[str(item_id)] for item_id in ids], np.int32)


def _check_rows(rows: Sequence[int] | frozenset[int], history: np.ndarray) -> None:
    """Raises ValueError unless every row is an event of the history, and none is there twice."""
    for row in rows:
        if row not in history:
            raise ValueError(f"event {row} is not in the history, whose rows are {history.tolist()[:5]} ..")
    if len(set(rows)) < len(rows):
        raise ValueError("an event is in the history twice")
