"""The front door: `brewjax VERB`."""

from __future__ import annotations

import datetime
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import numpy as np
import typer

from brewjax import cli_data, cli_index, cli_models, cli_retrieve, cli_suite
from brewjax.cli_errors import run_app
from brewjax.cli_models import ModelFolder, SurfaceName
from brewjax.config import decode, read_text, suggest
from brewjax.console import plain_console, print_line, print_ranking
from brewjax.devices import cache_compilations, device_per_core, hide_useless_libtpu
from brewjax.paths import write_table

if TYPE_CHECKING:
    from brewjax.serve.config import ServeConfig

# Heavy imports (jax, transformers) are inside the verbs, so that --help answers at once.

Split = Literal["train", "validation", "test"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode="markdown")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_index.app, name="index")
app.add_typer(cli_retrieve.app, name="retrieve")
app.add_typer(cli_suite.app, name="suite")
app.add_typer(cli_models.app)
console = plain_console()


def _parse_moment(text: str) -> datetime.datetime:
    """A moment of the command line; UTC where it names no zone."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}': expected a moment such as 2025-03-07 or 2025-03-07T12:30") from None
    return moment.replace(tzinfo=moment.tzinfo or datetime.UTC)


DatasetFolder = Annotated[Path, typer.Argument(help="A folder with dataset.yaml and its Parquet files.")]
At = Annotated[
    Optional[datetime.datetime],
    typer.Option(help="As of this moment (UTC), not after the last event.", parser=_parse_moment, metavar="MOMENT"),
]
MICROSECONDS = 1_000_000
TOKEN = "BREWJAX_TOKEN"  # the environment variable with the bearer token of a server


def main() -> None:
    """Runs the command line; what a user can mend is said in one message, without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.argv[1:2] != ["compile"]:
        hide_useless_libtpu()
    cache_compilations()
    run_app(app)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. configs/recipes/demo.yaml.")],
    out: Annotated[Optional[Path], typer.Option(help="Output folder; runs/NAME by default.")] = None,
    overrides: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, e.g. train.steps=100.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: sizes, memory, time.")] = False,
    allow_code_mismatch: Annotated[
        bool, typer.Option("--allow-code-mismatch", help="Take what other versions of the code made.")
    ] = False,
) -> None:
    """Run a recipe stage by stage; what is done is skipped, what was killed goes on.

    On several hosts a launcher starts the same command on each (see launch/README.md). SIGTERM saves a checkpoint and
    exits with 75: start it again to go on.
    """
    device_per_core()
    from brewjax import distributed
    from brewjax.pipeline.check import check_run
    from brewjax.pipeline.context import Run
    from brewjax.pipeline.dry_run import plan_table, surfaces_table
    from brewjax.pipeline.recipe import Recipe
    from brewjax.pipeline.stages import run_recipe

    config = Recipe.load(recipe, overrides or ())
    folder = out or Path("runs") / config.name
    if dry_run:
        planned = Run(config, folder)
        console.print(plan_table(planned))
        check_run(planned)
        console.print(surfaces_table(planned))
        return
    with distributed.distributed_runtime():
        run_recipe(config, folder, allow_code_mismatch)


def _stage_verb(kind: str, does: str) -> None:
    """A verb that does one stage of a recipe by itself."""

    def verb(
        model: Annotated[str, typer.Argument(help="A model folder; or a model's YAML file, for random weights.")],
        out: Annotated[Path, typer.Argument(help="Output folder; the model will be in OUT/VERB/model.")],
        dataset: Annotated[Path, typer.Option(help="A dataset folder.")],
        tasks: Annotated[list[str], typer.Option("--task", help="A task file, or a pattern of several.")],
        overrides: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, as in a recipe.")] = None,
    ) -> None:
        device_per_core()
        from brewjax import distributed
        from brewjax.pipeline.context import Run
        from brewjax.pipeline.recipe import Recipe
        from brewjax.pipeline.stages import run_recipe

        of_recipe = ("prompts.", "tokenizer.")
        keys = [key if key.startswith(of_recipe) else f"stages.{kind}.{key}" for key in overrides or ()]
        values = {"name": kind, "model": model, "dataset": str(dataset), "tasks": tasks, "stages": {kind: {"do": kind}}}
        recipe = Recipe.of(values, f"brewjax {kind}", keys)
        with distributed.distributed_runtime():
            run_recipe(recipe, out, until=kind)
        print_line(Run(recipe, out).model(kind))

    app.command(kind, help=does)(verb)


for _kind, _does in {
    "pretrain": "Train a model on a dataset's items and histories told as prose, and on general text.",
    "sft": "Fine-tune a model on the answers of tasks.",
    "align": "Align a model to what members prefer (DPO over pairs or lists).",
    "distill": "Distil from a teacher, on tasks: --set teacher=FOLDER.",
    "contrastive": "Train an encoder of members and items, for retrieval (InfoNCE).",
    "prune": "Take neurons, heads, layers or experts out of a model: --set d_ff=0.5.",
}.items():
    _stage_verb(_kind, _does)


@app.command()
def evaluate(
    model: ModelFolder,
    dataset: DatasetFolder,
    tasks: Annotated[list[Path], typer.Argument(help="Task files.")],
    split: Annotated[Split, typer.Option(help="The period of time to ask about.")] = "test",
    max_examples: Annotated[Optional[int], typer.Option(help="Of each task; a random choice of them.", min=1)] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Beside popularity, the fact regression and LightGBM, trained for it, and a simulation's oracle.",
        ),
    ] = False,
    surface: SurfaceName = "",
    out: Annotated[Optional[Path], typer.Option(help="Folder for the predictions, a Parquet file per task.")] = None,
) -> None:
    """Evaluate a model on tasks, trained on or not: a task is a YAML file, no training and no code."""
    device_per_core()
    from brewjax.bundle.bundle import Bundle
    from brewjax.data.tables.dataset import Dataset
    from brewjax.data.tasks.examples import sample_examples
    from brewjax.data.tasks.task import load_tasks
    from brewjax.evaluate.baselines import predict_baselines
    from brewjax.evaluate.predict import TaskExamples, predict
    from brewjax.evaluate.report import print_results
    from brewjax.evaluate.results import compare

    tables, bundle = Dataset.load(dataset), Bundle.load(model)
    task_examples: list[TaskExamples] = []
    for task in load_tasks(tasks, tables):
        examples = sample_examples(tables, task, split, max_examples)
        if not examples:
            raise task.error(f"no question falls into the {split} period", "split")
        task_examples.append(TaskExamples(tables, task, examples, surface))
    for each, predictions in zip(task_examples, predict(bundle, task_examples), strict=True):
        task, compared = each.task, {"model": predictions.table}
        if baselines:
            compared |= predict_baselines(tables, task, each.examples)
        print_results(compare(task, compared), console)
        for name, table in compared.items() if out else ():
            assert out is not None
            out.mkdir(parents=True, exist_ok=True)
            write_table(out / f"{task.name}.{name}.parquet", table)


@app.command()
def prompt(
    dataset: DatasetFolder,
    task: Annotated[Path, typer.Argument(help="A task file.")],
    member: Annotated[Optional[str], typer.Option(help="The member's id; with --split, any by default.")] = None,
    at: At = None,
    split: Annotated[
        Optional[Split], typer.Option(help="Print the prompts that `evaluate` scores, with answers.")
    ] = None,
    examples: Annotated[int, typer.Option(help="How many prompts of the split.", min=1)] = 3,
    style: Annotated[str, typer.Option(help="A style, such as sectioned or compact.")] = "sectioned",
    questions: Annotated[
        Optional[int], typer.Option(help="How many items to ask about; 3, or all of a split's.", min=1)
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Budget; counted in bytes here, for want of a tokenizer.", min=1)
    ] = 20_000,
) -> None:
    """Print what a model would read about a member, without a model."""
    from brewjax.data.prompts.styles import STYLES
    from brewjax.data.prompts.verbalize import Verbalizer
    from brewjax.data.tables.dataset import Dataset
    from brewjax.data.tables.excerpt import load_excerpt
    from brewjax.data.tasks.examples import build_examples, example_at
    from brewjax.data.tasks.excerpts import read_candidates, training_scales
    from brewjax.data.tasks.task import load_tasks
    from brewjax.data.text.tokenizer import Tokenizer

    if style not in STYLES:
        raise typer.BadParameter(f"'{style}': {suggest(style, STYLES)}", param_hint="--style")
    if split and at:
        raise typer.BadParameter("give --at or --split, not both")
    if not split and member is None:
        raise typer.BadParameter("give --member, or --split")
    whole = split is not None or member is None
    tables = Dataset.load(dataset) if whole else load_excerpt(dataset, [str(member)], _microseconds(at))
    (checked,) = load_tasks([task], tables)
    row = None if member is None else tables.member_row(member)
    if split:
        in_split = (example for example in build_examples(tables, checked, split) if row in (None, example.member))
        printed = [example.select(slice(questions)) for example in itertools.islice(in_split, examples)]
        if not printed:
            whose = f" of member '{member}'" if member else ""
            raise checked.error(f"no question{whose} falls into the {split} period", "split")
    else:
        assert row is not None  # there is no split, so there is a member
        printed = [example_at(tables, checked, row, _microseconds(at)).select(slice(questions or 3))]
        tables, printed = read_candidates(tables, checked, printed)
    verbalizer = Verbalizer(tables, training_scales(tables, checked), Tokenizer.byte_level(), max_tokens)
    for example in printed:
        if split:
            moment = tables.describe_moment(example.cutoff_time)
            member_id = f"{tables.card.members.noun} {tables.member_id(example.member)}"
            console.print(f"({member_id} as of {moment})" if moment else f"({member_id})", style="dim")
        text = verbalizer.prompt(checked, verbalizer.fitting(checked, example, style), style)
        print_line(text.render())
        if text.num_truncated_events:
            console.print(f"({text.num_truncated_events} older events left out)", style="dim")
    verbalizer.print_overlong()


@app.command()
def score(
    model: Annotated[Optional[Path], typer.Argument(help="A model folder; none with --server.")] = None,
    server: Annotated[str, typer.Option(help="Or HOST:PORT of a `brewjax serve`.")] = "",
    prompt: Annotated[Optional[Path], typer.Option(help="A prompt as JSON; - is stdin.", allow_dash=True)] = None,
    dataset: Annotated[Optional[Path], typer.Option(help="Or: a dataset folder,")] = None,
    task: Annotated[Optional[Path], typer.Option(help="a task file,")] = None,
    member: Annotated[
        Optional[list[str]],
        typer.Option(help="and the id of a member, or of several, to rank all items new to each."),
    ] = None,
    at: At = None,
    surface: SurfaceName = "",
    items: Annotated[Optional[int], typer.Option(help="Rank only so many of them, drawn at random.", min=1)] = None,
    retrieve: Annotated[
        Optional[int], typer.Option(help="Rank only so many of them, found by the server's index.", min=1)
    ] = None,
    note: Annotated[str, typer.Option(help="A wish that the model reads with its instruction.")] = "",
    top: Annotated[int, typer.Option(help="How many items to show.", min=1)] = 10,
    out: Annotated[Optional[Path], typer.Option(help="Write whole rankings, .parquet or .json.")] = None,
) -> None:
    """Rank items for a member of a dataset, or answer the questions of a JSON prompt; here, or on a server."""
    if model is not None and server:
        raise typer.BadParameter("give a model folder or --server, not both")
    if model is None and not server:
        raise typer.BadParameter("give a model folder, or --server")
    if retrieve and (items or not server):
        raise typer.BadParameter("--retrieve: the index is a server's, and finds the items; give --server, not --items")
    if prompt is not None:
        of_members: dict[str, object] = {"dataset": dataset, "task": task, "member": member, "at": at, "items": items}
        of_members |= {"retrieve": retrieve, "note": note, "out": out, "surface": surface}
        if needless := [f"--{name}" for name, value in of_members.items() if value]:
            raise typer.BadParameter(f"{', '.join(needless)}: for members of a dataset, not with --prompt")
        _score_prompt(model, server, prompt, top)
    elif dataset and task and member:
        _score_members(model, server, dataset, task, member, surface, at, items, retrieve, note, top, out)
    else:
        raise typer.BadParameter("give --prompt, or --dataset, --task and --member")


def _score_prompt(model: Path | None, server: str, path: Path, top: int) -> None:
    """Answers the questions of a JSON prompt, by a model here or by a server."""
    from brewjax.data.text.prompt import Prompt

    source = "stdin" if str(path) == "-" else str(path)
    text = decode(sys.stdin.buffer.read(), source) if source == "stdin" else read_text(path)
    prompt = Prompt.from_json(text, source)
    if model:
        from brewjax.bundle.bundle import Bundle

        probabilities = Bundle.load(model).score(prompt)
    else:
        from brewjax.serve.client import raw, score_all

        candidates = [question.text for question in prompt.questions]
        question = raw(prompt.preamble, candidates, prompt.labels, prompt.events)
        probabilities, usage = score_all(server, question, os.environ.get(TOKEN))
        console.print(usage)
    values = np.arange(len(prompt.labels), 0, -1)
    print_ranking(console, probabilities, prompt.labels, values, [q.text.strip() for q in prompt.questions], top)


def _score_members(
    model: Path | None,
    server: str,
    dataset: Path,
    task: Path,
    members: list[str],
    surface: str,
    at: datetime.datetime | None,
    items: int | None,
    retrieve: int | None,
    note: str,
    top: int,
    out: Path | None,
) -> None:
    """Ranks items for members of a dataset, by a model here or by a server."""
    from brewjax.data.tables.excerpt import load_excerpt
    from brewjax.data.tasks.examples import example_at
    from brewjax.data.tasks.excerpts import read_candidates
    from brewjax.data.tasks.task import load_tasks
    from brewjax.evaluate.ranking import Ranking, rank, write_rankings

    tables = load_excerpt(dataset, members, _microseconds(at))
    (checked,) = load_tasks([task], tables)
    examples = [example_at(tables, checked, tables.member_row(name), _microseconds(at)) for name in members]
    if items is not None:
        examples = [
            example.select(np.sort(np.random.default_rng(0).permutation(len(example.candidates))[:items]))
            for example in examples
        ]
    tables, examples = read_candidates(tables, checked, examples)
    if model:
        from brewjax.bundle.bundle import Bundle

        bundle = Bundle.load(model)
        verbalizer = bundle.verbalizer(tables, checked, surface)
        rankings = [rank(bundle, verbalizer, checked, example, note) for example in examples]
    else:
        from brewjax.serve.client import retrieve_and_rank, score_all
        from brewjax.serve.requests import request_from_catalogue, request_from_example

        rankings = []
        for example in examples:
            if retrieve:
                member = request_from_catalogue(tables, checked, example, note, surface)
                ids, probabilities, usage = retrieve_and_rank(server, member, retrieve, os.environ.get(TOKEN))
                candidates = tables.item_rows(ids)
            else:
                question = request_from_example(tables, checked, example, note, surface)
                probabilities, usage = score_all(server, question, os.environ.get(TOKEN))
                candidates = example.candidates
            console.print(usage)
            rankings.append(Ranking(example.member, candidates, probabilities))
    for ranking in rankings:
        if len(rankings) > 1:
            console.print(f"{tables.card.members.noun} {tables.member_id(ranking.member)}")
        names = [f"{tables.item_name(row)} [{tables.item_id(row)}]" for row in ranking.items]
        print_ranking(console, ranking.probabilities, checked.words, checked.values, names, top)
    if out:
        write_rankings(out, tables, checked, rankings)


def _microseconds(at: datetime.datetime | None) -> int | None:
    """Since 1970, UTC."""
    return int(at.timestamp() * MICROSECONDS) if at else None


@app.command()
def serve(
    model: ModelFolder,
    config: Annotated[Optional[Path], typer.Option(help="A file of settings.")] = None,
    overrides: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, e.g. port=9000.")] = None,
) -> None:
    """Serve a model over gRPC (Ranker, and JetStream's Decode) and HTTP (/v1/score).

    SIGTERM sends callers elsewhere, finishes what runs and stops; SIGHUP takes up new weights, certificate and tokens.
    """
    device_per_core()
    import asyncio

    from brewjax.serve.server import log_as_json
    from brewjax.serve.server import serve as run_server

    settings = _serve_settings(config, overrides)
    log_as_json()
    sys.exit(0 if asyncio.run(run_server(model, settings)) else 1)


def _serve_settings(config: Path | None, overrides: list[str] | None) -> ServeConfig:
    from brewjax.serve.config import ServeConfig

    return ServeConfig.load(config, overrides or ()) if config else ServeConfig.of({}, "brewjax serve", overrides or ())


@app.command()
def warm(
    model: ModelFolder,
    config: Annotated[Optional[Path], typer.Option(help="The server's file of settings.")] = None,
    overrides: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, as for `serve`.")] = None,
) -> None:
    """Compile what a server with these settings needs, and keep it, so that `serve` starts in seconds.

    For the build of an image: programs are kept in the user's cache folder, and are valid on machines with the same
    kind of processor and accelerator.
    """
    device_per_core()
    import time

    from brewjax.serve.server import Server

    start_time = time.perf_counter()
    settings = _serve_settings(config, overrides).model_copy(update={"port": 0, "http_port": None, "host": "localhost"})
    Server(model, settings)
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    print_line(f"{model}: ready to serve; its programs are in {folder} ({time.perf_counter() - start_time:.0f} s)")
