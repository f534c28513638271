"""`open`: a model to hold in the hand, in a notebook."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from brewjax.bundle.bundle import Bundle
from brewjax.config import suggest
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample, example_at
from brewjax.data.tasks.task import Task, load_tasks
from brewjax.data.text.prompt import Prompt
from brewjax.explore.calibration import Calibration, measure_calibration
from brewjax.explore.comparison import RankingChange
from brewjax.explore.comparison import compare as compare_rankings
from brewjax.explore.context import Context, check_style, find_items
from brewjax.explore.embeddings import Embeddings
from brewjax.explore.reasons import Reasons
from brewjax.explore.typed_member import add_member
from brewjax.explore.views import PromptView, TokensView, facts_html
from brewjax.model.generate import Generator, SamplingParams
from brewjax.model.params import bind, num_parameters
from brewjax.retrieve.encoder import ENCODER, Encoder

if TYPE_CHECKING:
    import pandas as pd

MICROSECONDS = 1_000_000
Side = Literal["members", "items"]


def open(model: str | Path | Bundle, dataset: str | Path | Dataset | None = None, surface: str = "") -> Explorer:
    """Opens a model, to rank, to read its prompts, and to ask why.

        >>> import brewjax
        >>> model = brewjax.open(folder, dataset)  # such as "runs/demo/turbo/model", "data/movielens-100k"
        >>> ranking = model.rank("m7", task="apply")  # the best first
        >>> ranking["log_odds"].is_monotonic_decreasing
        True

    Args:
      model: a model's folder, an encoder's, or a bundle that is loaded.
      dataset: a dataset's folder, or one that is loaded; only `score` and `generate` do without.
      surface: the model's surface that the dataset is of, by name; by default the one with the dataset's card.

    Returns:
      The model and the tables, to ask questions of.

    Raises:
      ConfigError: a folder cannot be read (names the file); the model has no such surface, or several have this card.
      DatasetError: the tables do not fit their card.
    """
    tables = dataset if dataset is None or isinstance(dataset, Dataset) else Dataset.load(dataset)
    if isinstance(model, Bundle):
        return Explorer(model, tables, surface)
    encoder = Encoder.load(model) if (Path(model) / ENCODER).is_file() else None
    return Explorer(encoder.bundle if encoder else Bundle.load(model), tables, surface, encoder)


class Explorer:
    """A model, and the tables of members and items that it is asked about.

    Attributes:
      bundle: the model.
      dataset: the tables, or None.
      tasks: by name, those of the dataset's surface that the model was trained on, and those that were added.
      encoder: what `embed` uses; None for a model that was not trained to embed.
    """

    def __init__(
        self, bundle: Bundle, dataset: Dataset | None = None, surface: str = "", encoder: Encoder | None = None
    ):
        self.bundle, self.dataset, self._surface, self.encoder = bundle, dataset, surface, encoder
        trained = bundle.surface_of(dataset, surface) if dataset else None
        self.tasks = {task.name: task for task in trained.tasks} if trained else {}
        self._verbalizers: dict[str, Verbalizer] = {}
        self._typed: tuple[object, Explorer] | None = None  # the last member that was typed, and the tables with it

    def __repr__(self) -> str:
        tables = f"{self.dataset.card.name} ({len(self.dataset.items):,} items)" if self.dataset else "none"
        return f"Explorer({self.bundle!r}, dataset: {tables})"

    def _repr_html_(self) -> str:
        import treescope

        model = self.bundle.model
        decoder = bind(model, self.bundle.params)
        with treescope.active_autovisualizer.set_scoped(None):
            weights = treescope.render_to_html(decoder, compressed=True)
        return facts_html(model.name, self.facts().items(), weights)

    def facts(self) -> dict[str, str]:
        """What the model is, by name: size, tokens, layout of prompts, tasks, dataset."""
        model, prompts = self.bundle.model, self.bundle.prompts
        facts = {
            "parameters": f"{num_parameters(self.bundle.params):,} in {model.param_dtype}",
            "layers": f"{model.layers} of width {model.d_model}, {model.heads} heads",
            "vocabulary": f"{self.bundle.tokenizer.vocab_size:,} tokens",
            "prompt": f"{prompts.max_tokens:,} tokens, {prompts.layout} history, style {prompts.score_style}",
            "tasks": ", ".join(self.tasks if self.dataset else self.bundle.task_names) or "none",
        }
        if self.dataset:
            counts = (len(self.dataset.members), len(self.dataset.items), len(self.dataset.events))
            facts["dataset"] = "{}: {:,} members, {:,} items, {:,} events".format(self.dataset.card.name, *counts)
        return facts

    def add_task(self, task: str | Path | Task) -> Task:
        """Adds a task, or a task's file, and returns it. Raises ConfigError if it does not fit the dataset."""
        if not isinstance(task, Task):
            (task,) = load_tasks([task], self.tables())
        self.tasks[task.name] = task
        return task

    def context(
        self,
        member: str | int | None = None,
        *,
        typed_events: Sequence[str] | None = None,
        task: str | Path | Task | None = None,
        at: str | datetime.datetime | None = None,
        items: Sequence[str] | int | None = None,
        instruction: str | None = None,
        note: str | None = None,
        style: str | None = None,
    ) -> Context:
        """A member as of a moment, with a task and candidates.

        Args:
          member: the member's id; None with `typed_events`.
          typed_events: what a member who is not in the tables did, an event a line, the oldest first, as
            "rated: Alien (1979) | stars=5": see `brewjax.explore.typed_member.add_member`. `Context.change` gives it a
            profile.
          task: a task, its name, or its file; the model's first task by default.
          at: a moment, UTC where it names no zone; just after the last event by default.
          items: ids of the candidates, or how many to draw; by default every item that is new to the member.
          instruction: in place of the task's.
          note: the steering note, in place of the task's.
          style: of the prompt; that of the model's evaluation by default.

        Raises:
          ValueError: no such member, item, task or style, or no dataset; both a member and typed events, or neither.
        """
        if (member is None) == (typed_events is None):
            raise ValueError("give either a member's id or typed events")
        if typed_events is not None:
            typed, lines = self._with_typed(tuple(typed_events), at), tuple(typed_events)
            context = typed.context(
                typed.tables().member_id(-1),
                task=self._task(task), at=at, items=items, instruction=instruction, note=note, style=style,
            )  # fmt: skip
            return dataclasses.replace(context, typed_events=lines)
        tables, chosen = self.tables(), self._task(task)
        row = tables.member_row(str(member))
        example = example_at(tables, chosen, row, _microseconds(at))
        if isinstance(items, int):
            indices = np.random.default_rng(0).permutation(len(example.candidates))[:items]
            example = example.select(np.sort(indices))
        style = check_style(style or self.bundle.prompts.score_style)
        verbalizer = self._verbalizer(chosen)
        ids = None if items is None or isinstance(items, int) else [str(item) for item in items]
        context = Context(self.bundle, verbalizer, chosen, example, style)
        context = context.change(instruction=instruction, note=note, items=ids)
        fitting = verbalizer.fitting(context.task, context.example, style)
        return (
            context
            if fitting is context.example
            else context.change(items=[tables.item_id(i) for i in fitting.candidates])
        )

    def _with_typed(self, events: tuple[str, ...], at: str | datetime.datetime | None) -> Explorer:
        """The model and the tables with a typed member in the last row."""
        if self._typed is None or self._typed[0] != (events, at):
            tables, time = self.tables(), _microseconds(at)
            extended = add_member(tables, events, tables.last_event_time + 1 if time is None else time)
            self._typed = (events, at), Explorer(self.bundle, extended, self._surface, self.encoder)
        return self._typed[1]

    def context_of(self, example: RankingExample, task: Task) -> Context:
        """The context of an example of the dataset, as evaluation asks it."""
        return Context(self.bundle, self._verbalizer(task), task, example, self.bundle.prompts.score_style)

    def score(self, prompt: Prompt) -> Float[np.ndarray, "Q L"]:
        """float32 probability of each label for each question of a prompt of your own."""
        return self.bundle.score(prompt)

    def rank(self, member: str | int, **settings: Any) -> pd.DataFrame:
        """The candidates of a member, the best first; settings as of `context`."""
        return self.context(member, **settings).rank()

    def prompt(self, member: str | int, **settings: Any) -> PromptView:
        """The prompt of a member, in colours; settings as of `context`."""
        return self.context(member, **settings).prompt()

    def tokens(self, member: str | int, **settings: Any) -> TokensView:
        """The tokens of the prompt of a member; settings as of `context`."""
        return self.context(member, **settings).tokens()

    def why(self, member: str | int, item: str | int, **settings: Any) -> Reasons:
        """What moved the score of an item for a member; settings as of `context`."""
        return self.context(member, **settings).why(item)

    def compare(self, before: Context, after: Context) -> RankingChange:
        """What moved between two rankings."""
        return compare_rankings(before, after)

    def embed(
        self,
        side: Side = "items",
        ids: Sequence[str | int] | None = None,
        *,
        at: str | datetime.datetime | None = None,
        dimensions: int | None = None,
    ) -> Embeddings:
        """The vectors of members or of items, by a model that was trained to embed.

        Args:
          side: "members" or "items".
          ids: of which; by default all of the table.
          at: a moment, as of which histories and facts are; just after the last event by default.
          dimensions: what vectors are truncated to; by default the width of the model.

        Raises:
          ValueError: the model is no encoder, there is no such id, or vectors have no such size.
        """
        tables, encoder = self.tables(), self.encoder
        if encoder is None:
            raise ValueError(f"no {ENCODER} in the model's folder; a stage 'do: contrastive' trains a model to embed")
        table = tables.members if side == "members" else tables.items
        id_column = tables.card.members.id if side == "members" else tables.card.items.id
        chosen = [str(each) for each in (table[id_column].to_pylist() if ids is None else ids)]
        if ids is None and side == "items":  # in a union, of the dataset that the encoder is of
            is_alike = tables.items_of(encoder.task.questions.actions[0])
            chosen = [each for each, alike in zip(chosen, is_alike, strict=True) if alike]
        time = _microseconds(at)
        time = tables.last_event_time + 1 if time is None else time
        if side == "members":
            rows = np.array([tables.member_row(each) for each in chosen], np.int64)
            examples = [example_at(tables, encoder.task, row, time) for row in rows.tolist()]
            names, vectors = chosen, encoder.embed_members(tables, examples, dimensions)
        else:
            rows = find_items(tables, encoder.task, chosen)
            names = [self.bundle.tokenizer.clean(tables.item_name(row)) for row in rows]
            vectors = encoder.embed_items(tables, rows, time, dimensions)
        return Embeddings(tuple(chosen), tuple(names), vectors, table.take(pa.array(rows)))

    def calibration(self, task: str | Path | Task | None = None, max_examples: int = 200) -> Calibration:
        """Whether the probabilities are right, on the test period of a task: a table of ten bins, and a plot.

        Args:
          task: a task, its name, or its file; the model's first task by default.
          max_examples: the most prompts, chosen at random where there are more.

        Raises:
          ValueError: there is no such task, or no dataset.
          ConfigError: the test period has no question, or all of them are too long.
        """
        return measure_calibration(self.bundle, self.tables(), self._task(task), max_examples, self._surface)

    def generate(self, text: str, max_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """Goes on from a text, as it is: without a chat template.

        Args:
          max_tokens: the longest answer.
          temperature: 0 takes the likeliest token.
          seed: of what is drawn.
        """
        tokenizer = self.bundle.tokenizer
        ids = tokenizer.with_bos(tokenizer.encode([text], begins=True)[0])
        self.bundle.model.check_length(len(ids) + max_tokens, "the text with max_tokens")
        sampling = SamplingParams(temperature=temperature)
        generator = Generator(self.bundle.model, self.bundle.params, 1, len(ids) + max_tokens, sampling, seed)
        stop = [] if tokenizer.hf.eos_token_id is None else [tokenizer.hf.eos_token_id]
        (answer,) = generator.generate([ids], max_tokens, stop)
        return str(tokenizer.hf.decode(answer))

    def tables(self) -> Dataset:
        """The tables.

        Returns:
          The dataset that the model was opened with.

        Raises:
          ValueError: the model was opened without one.
        """
        if self.dataset is None:
            raise ValueError("no dataset: open the model with one, brewjax.open(model, dataset)")
        return self.dataset

    def _task(self, task: str | Path | Task | None) -> Task:
        if isinstance(task, Task):
            return task
        if task is None:
            if not self.tasks:
                raise ValueError("the model was trained on no task of this dataset; give one, or its file")
            return next(iter(self.tasks.values()))
        if str(task) in self.tasks:
            return self.tasks[str(task)]
        if Path(task).suffix in (".yaml", ".yml"):
            return self.add_task(task)
        raise ValueError(f"no task '{task}'; {suggest(str(task), self.tasks, listing='tasks')}, or give a task's file")

    def _verbalizer(self, task: Task) -> Verbalizer:
        """Kept by the task's name: scales and statistics of large tables take seconds."""
        if task.name not in self._verbalizers:
            self._verbalizers[task.name] = self.bundle.verbalizer(self.tables(), task, self._surface)
        return self._verbalizers[task.name]


def _microseconds(at: str | datetime.datetime | None) -> int | None:
    """Since 1970. Raises ValueError for a text that is no moment."""
    if at is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(at) if isinstance(at, str) else at
    except ValueError:
        raise ValueError(f"at: '{at}': expected a moment such as 2025-03-07 or 2025-03-07T12:30") from None
    return int(moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp() * MICROSECONDS)
