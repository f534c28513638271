"""The page of `brewjax explore`: change an instruction, a note or a history, and see the ranking move, and why.

It serves itself: no request leaves the machine, and its content security policy forbids it to the browser too.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import pyarrow.compute as pc
import pydantic
import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.base import RequestResponseEndpoint

from brewjax.config import ConfigError
from brewjax.console import print_line
from brewjax.data.prompts.styles import STYLES
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import TEXT
from brewjax.explore.cases import Preset, check_order, make_case
from brewjax.explore.context import Context
from brewjax.explore.explorer import Explorer
from brewjax.explore.profile import read_profile
from brewjax.model.params import num_parameters

STATIC = Path(__file__).parent / "static"
TEMPLATE = Path(__file__).parent / "page.html.j2"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
HOST, LOCAL_NAMES = "127.0.0.1", ("localhost", "127.0.0.1", "::1")
SUGGESTIONS = 20  # members that the page suggests
MAX_CANDIDATES = 2000
MAX_TYPED = 1000  # events
REMEMBERED = 32  # contexts whose scores are kept, so that "why" does not rank again
T = TypeVar("T")


class Edit(pydantic.BaseModel):
    """What the page asks for: a member, a task, and what is changed. What is None is as the task has it.

    Attributes:
      model: index of the model, where two are compared.
      history: rows of the events in their order; the token budget leaves out the first ones.
      left_out: rows of the events that are switched off.
      typed_events: what a member who is not in the tables did, in place of `member`.
      profile: column and text of each attribute of the member that is changed.
      candidates: how many items to draw, of those whose name has `like` in it.
      case: index of a case or a question of a suite, in place of member, task, `candidates` and `like`.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    model: int = pydantic.Field(0, ge=0)
    task: str
    member: str | None = None
    typed_events: tuple[str, ...] | None = pydantic.Field(None, max_length=MAX_TYPED)
    instruction: str | None = pydantic.Field(None, max_length=20_000)
    note: str | None = pydantic.Field(None, max_length=20_000)
    style: str | None = None
    history: tuple[int, ...] | None = None
    left_out: tuple[int, ...] | None = None
    profile: tuple[tuple[str, str], ...] = ()
    candidates: int = pydantic.Field(50, ge=1, le=MAX_CANDIDATES)
    like: str = pydantic.Field("", max_length=200)
    case: int | None = pydantic.Field(None, ge=0)


class WhyEdit(pydantic.BaseModel):
    """A question why: of an item, in the ranking of an edit."""

    model_config = pydantic.ConfigDict(extra="forbid")
    edit: Edit
    item: str


class NewCase(pydantic.BaseModel):
    """A ranking to be saved as a case, with the order that is expected and a comment."""

    model_config = pydantic.ConfigDict(extra="forbid")
    edit: Edit
    expected: tuple[str, ...] = ()
    comment: str = pydantic.Field("", max_length=2000)


def make_page(explorers: Sequence[Explorer], presets: Sequence[Preset] = ()) -> FastAPI:
    """The application.

    Args:
      explorers: a model with a dataset and at least one task; a second one is compared with it.
      presets: cases and questions of suites, to choose from.
    """
    app = FastAPI(title="brewjax explore", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=STATIC))
    device = threading.Lock()  # one computation at a time: the endpoints run in threads
    page = _render_page(explorers, presets)

    @functools.lru_cache(maxsize=REMEMBERED)
    def find_context(edit: Edit) -> Context:
        return make_context(explorers, presets, edit)

    @functools.lru_cache(maxsize=REMEMBERED)
    def find_ranking(edit: Edit) -> dict[str, Any]:
        preset = None if edit.case is None or edit.case >= len(presets) else presets[edit.case]
        return describe_ranking(find_context(edit), preset)

    def answer(compute: Callable[[], T]) -> T | JSONResponse:
        """The result, or an error of one line: a member that does not exist, a text that does not fit."""
        try:
            with device:
                return compute()
        except ValueError as error:
            return JSONResponse({"message": str(error)}, 400)

    @app.middleware("http")
    async def protect(request: Request, call_next: RequestResponseEndpoint) -> Response:
        # A page of another site must not read the tables through a name that it points at this machine.
        if request.url.hostname not in LOCAL_NAMES:
            return JSONResponse({"message": f"host '{request.url.hostname}': not this server"}, 421)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RequestValidationError)
    async def describe_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"message": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 400)

    @app.get("/")
    def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/members")
    def suggest_members(like: str = "") -> list[str]:
        dataset = explorers[0].dataset
        assert dataset is not None
        ids = dataset.members[dataset.card.members.id].cast(TEXT)
        return ids.filter(pc.starts_with(ids, like)).slice(0, SUGGESTIONS).to_pylist()

    @app.post("/rank")
    def rank(edit: Edit) -> Any:
        return answer(lambda: find_ranking(edit))

    @app.post("/why")
    def why(question: WhyEdit) -> Any:
        return answer(lambda: describe_reasons(find_context(question.edit), question.item))

    @app.post("/task")
    def task_file(edit: Edit) -> Any:
        def render() -> PlainTextResponse:
            task = find_context(edit).task.model_dump(mode="json")
            return PlainTextResponse(yaml.safe_dump(task, sort_keys=False, allow_unicode=True))

        return answer(render)

    @app.post("/prompt")
    def prompt_file(edit: Edit) -> Any:
        def render() -> dict[str, Any]:
            prompt = find_context(edit).text
            questions = [question.heading + question.text for question in prompt.questions]
            return {
                "preamble": prompt.preamble, "events": prompt.events, "questions": questions, "labels": prompt.labels
            }  # fmt: skip

        return answer(render)

    @app.post("/case")
    def case_line(new: NewCase) -> Any:
        def render() -> PlainTextResponse:
            case = make_case(find_context(new.edit), new.expected, new.comment)
            return PlainTextResponse(case.model_dump_json(exclude_defaults=True) + "\n")

        return answer(render)

    return app


def make_context(explorers: Sequence[Explorer], presets: Sequence[Preset], edit: Edit) -> Context:
    """The context that an edit describes.

    Args:
      explorers: of the models that are shown.
      presets: cases and questions of suites, to choose from.
      edit: what was set on the page.

    Returns:
      The context.

    Raises:
      ValueError: something in the edit does not exist.
    """
    if edit.model >= len(explorers):
        raise ValueError(f"model {edit.model}: there are {len(explorers)}")
    explorer = explorers[edit.model]
    if edit.case is not None:
        if edit.case >= len(presets):
            raise ValueError(f"case {edit.case}: there are {len(presets)}")
        context = presets[edit.case].context(explorer)
        edits = edit.model_dump(include={"instruction", "note", "style", "history", "left_out"})
        return context.change(**edits, profile=dict(edit.profile))
    context = explorer.context(
        edit.member,
        typed_events=edit.typed_events,
        task=edit.task,
        instruction=edit.instruction,
        note=edit.note,
        style=edit.style,
    )
    candidates = context.example.candidates
    if edit.like:
        mask = [edit.like.lower() in title.lower() for title in context.titles]
        candidates = candidates[mask]
        if not len(candidates):
            raise ValueError(f"no candidate's name has '{edit.like}' in it")
    chosen = np.sort(np.random.default_rng(0).permutation(len(candidates))[: edit.candidates])
    items = [context.dataset.item_id(row) for row in candidates[chosen]]
    return context.change(items=items, history=edit.history, left_out=edit.left_out, profile=dict(edit.profile))


def describe_ranking(context: Context, preset: Preset | None = None) -> dict[str, Any]:
    """The ranking, the events, and the prompt as the model reads it, for the page; with what is known of it if it is
    that of an `preset`."""
    start = time.perf_counter()
    odds, probabilities = context.log_odds, context.probabilities
    milliseconds = 1000 * (time.perf_counter() - start)
    view = context.prompt()
    ids, titles = context.item_ids, context.titles
    events = zip(context.in_budget.tolist(), context.describe_events(context.in_budget), strict=True)
    dropped = zip(context.dropped.tolist(), context.describe_events(context.dropped), strict=True)
    pieces = view.pieces()
    shown = [*pieces[: 1 + len(context.text.events)], pieces[-len(ids) + int(context.order[0])]]
    expected, answers = (preset.expected, preset.answers) if preset else ((), {})
    return {
        "member": context.member if context.typed_events is None else "",
        "task": context.task.name,
        "expected": expected,
        "out_of_order": check_order(context, expected).wrong,
        "label": context.task.words[context.top_label],
        "instruction": context.task.instruction,
        "note": context.task.steering_note,
        "style": context.style,
        "profile": [
            {"column": column, "text": text}
            for column, text in read_profile(context.dataset, context.example.member).items()
        ],
        "events": [{"row": row, "text": text, "on": row not in context.left_out} for row, text in events],
        "dropped": [{"row": row, "text": text} for row, text in dropped],
        "ranking": [
            {
                "item": ids[index],
                "title": titles[index],
                "probability": float(probabilities[index, context.top_label]),
                "log_odds": float(odds[index]),
                "answer": answers.get(ids[index], ""),
            }
            for index in context.order
        ],
        "pieces": [{"kind": p.kind, "text": p.text, "tokens": p.tokens, "attends": p.attends} for p in shown],
        "truncated": list(context.text.truncated_texts),
        "prefix_tokens": view.encoded.prefix_length,
        "tokens": len(view.encoded),
        "milliseconds": milliseconds,
    }


def describe_reasons(context: Context, item: str) -> dict[str, Any]:
    """Why an item ranks where it does, for the page; an effect within noise is null."""
    reasons = context.why(item)
    return {
        "summary": reasons.summary(),
        "effects": [
            {
                "kind": reasons.parts[index].kind,
                "text": reasons.parts[index].text,
                "effect": None if reasons.is_noise(index) else float(reasons.effects[index]),
            }
            for index in reasons.order.tolist()
        ],
    }


def _render_page(explorers: Sequence[Explorer], presets: Sequence[Preset]) -> str:
    """The page, with what does not change: models, tasks, styles, the words for members and items."""
    first = explorers[0]
    if first.dataset is None or not first.tasks:
        raise ValueError("the page needs a dataset and a task: --dataset and --task")
    template = jinja2.Template(TEMPLATE.read_text(), autoescape=True)
    return template.render(
        models=[
            f"{explorer.bundle.model.name}, {num_parameters(explorer.bundle.params):,} parameters"
            for explorer in explorers
        ],
        facts=first.facts(),
        tasks=[*first.tasks],
        presets=[preset.title for preset in presets],
        styles=[*STYLES],
        style=first.bundle.prompts.score_style,
        member=first.dataset.member_id(int(np.argmax(np.diff(first.dataset.member_offsets)))),
        card=first.dataset.card,
        typed_example=_typed_example(first.dataset),
        max_candidates=MAX_CANDIDATES,
    )


def _typed_example(dataset: Dataset) -> str:
    """The last event of the tables, as a reader would type it."""
    events, row = dataset.card.events, len(dataset.events) - 1
    values = [(each.column, dataset.events[each.column][row].as_py()) for each in events.attributes]
    settings = [f" | {column}={value}" for column, value in values if value is not None]
    return f"{dataset.action_name(row)}: {dataset.item_name(dataset.event_item[row])}" + "".join(settings)


def serve(explorers: Sequence[Explorer], port: int, presets: Sequence[Preset] = ()) -> None:
    """Serves the page to this machine until it is interrupted.

    Args:
      explorers: models, each with its tables.
      presets: cases and questions of suites, to choose from.
      port: on localhost.

    Raises:
      ConfigError: the port is taken.
    """
    page = make_page(explorers, presets)
    try:
        with socket.create_server((HOST, port)) as listening:
            print_line(f"http://localhost:{listening.getsockname()[1]} (Ctrl-C ends it)")
            uvicorn.Server(uvicorn.Config(page, log_level="warning")).run([listening])
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"cannot listen at {HOST}:{port}: {reason}; give another --port") from None
