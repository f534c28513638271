"""The front door: `brewjax VERB`."""

from __future__ import annotations

import datetime
import itertools
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
import typer
from rich.table import Table

from brewjax import cli_index
from brewjax.cli_errors import parse_moment, run_app
from brewjax.config import decode, read_text, suggest
from brewjax.console import bold, plain_console, print_ranking
from brewjax.devices import cache_compilations, device_per_core, hide_useless_libtpu

# Heavy imports (jax, transformers) are inside the verbs, so that --help answers at once.

Split = Literal["train", "validation", "test"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode="markdown")
data = typer.Typer(no_args_is_help=True, help="Fetch and check datasets.")
app.add_typer(data, name="data")
app.add_typer(cli_index.app, name="index")
console = plain_console()

ModelFolder = Annotated[Path, typer.Argument(help="A model folder, e.g. runs/demo/turbo/model.")]
DatasetFolder = Annotated[Path, typer.Argument(help="A folder with dataset.yaml and its Parquet files.")]
At = Annotated[
    Optional[datetime.datetime],
    typer.Option(help="As of this moment (UTC), not after the last event.", parser=parse_moment, metavar="MOMENT"),
]
MICROSECONDS = 1_000_000
TOKEN = "BREWJAX_TOKEN"  # the environment variable with the bearer token of a server


def _print(text: object) -> None:
    """On as many columns as it takes."""
    console.print(text, soft_wrap=True)


def main() -> None:
    """Runs the command line; what a user can mend is said in one message, without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.argv[1:2] != ["compile"]:
        hide_useless_libtpu()
    cache_compilations()
    run_app(app)


@data.command()
def fetch(
    name: Annotated[str, typer.Argument(help="movielens-100k")],
    out: Annotated[Optional[Path], typer.Option(help="Folder to write; data/NAME by default.")] = None,
    source: Annotated[Optional[Path], typer.Option("--from", help="A copy that you have, in its place.")] = None,
) -> None:
    """Fetch a public dataset as a dataset folder (its licence is printed)."""
    from brewjax.data.tables.movielens import fetch

    fetch(name, out or Path("data") / name, source)


@data.command()
def check(folder: DatasetFolder) -> None:
    """Check a dataset folder: every problem is listed, with file, column and row."""
    from brewjax.data.tables.dataset import Dataset

    dataset = Dataset.load(folder)
    counts = f"{len(dataset.members):,} members, {len(dataset.items):,} items, {len(dataset.events):,} events"
    console.print(f"{dataset.card.name}: {counts}; no problem found")


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
    from brewjax import distributed as hosts
    from brewjax.pipeline.check import check_run
    from brewjax.pipeline.context import Run
    from brewjax.pipeline.dry_run import plan_table
    from brewjax.pipeline.recipe import Recipe
    from brewjax.pipeline.stages import run_recipe

    config = Recipe.load(recipe, overrides or ())
    folder = out or Path("runs") / config.name
    if dry_run:
        planned = Run(config, folder)
        console.print(plan_table(planned))
        check_run(planned)
        return
    with hosts.distributed_runtime():
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
        from brewjax import distributed as hosts
        from brewjax.pipeline.context import Run
        from brewjax.pipeline.recipe import Recipe
        from brewjax.pipeline.stages import run_recipe

        of_recipe = ("prompts.", "tokenizer.")
        keys = [key if key.startswith(of_recipe) else f"stages.{kind}.{key}" for key in overrides or ()]
        values = {"name": kind, "model": model, "dataset": str(dataset), "tasks": tasks, "stages": {kind: {"do": kind}}}
        recipe = Recipe.of(values, f"brewjax {kind}", keys)
        with hosts.distributed_runtime():
            run_recipe(recipe, out, until=kind)
        _print(Run(recipe, out).model(kind))

    app.command(kind, help=does)(verb)


for _kind, _does in {
    "pretrain": "Train a model on a dataset's items and histories told as prose, and on general text.",
    "sft": "Fine-tune a model on the answers of tasks.",
    "align": "Align a model to what members prefer (DPO over pairs or lists).",
    "distill": "Distil from a teacher, on tasks: --set teacher=FOLDER.",
    "prune": "Take neurons, heads, layers or experts out of a model: --set d_ff=0.5.",
}.items():
    _stage_verb(_kind, _does)


@app.command("quantize")
def quantize_(
    model: ModelFolder,
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    overrides: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, e.g. dtype=int8.")] = None,
) -> None:
    """Quantise a model's weights to 8 bits, a tensor at a time."""
    from brewjax.bundle.bundle import check_folder
    from brewjax.compress.quantize import QuantizeConfig, quantize
    from brewjax.paths import atomic_folder

    check_folder(model)
    config = QuantizeConfig.of({}, "brewjax quantize", overrides or ())
    with atomic_folder(out) as folder:
        quantize(model, config).save(folder)
    _print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 1e6:,.1f} MB")


@app.command()
def evaluate(
    model: ModelFolder,
    dataset: DatasetFolder,
    tasks: Annotated[list[Path], typer.Argument(help="Task files.")],
    split: Annotated[Split, typer.Option(help="The period of time to ask about.")] = "test",
    max_examples: Annotated[Optional[int], typer.Option(help="Of each task; a random choice of them.", min=1)] = None,
) -> None:
    """Evaluate a model on tasks, trained on or not: a task is a YAML file, no training and no code."""
    device_per_core()
    from brewjax.bundle.bundle import Bundle
    from brewjax.data.tables.dataset import Dataset
    from brewjax.data.tasks.examples import sample_examples
    from brewjax.data.tasks.task import load_tasks
    from brewjax.evaluate.predict import predict
    from brewjax.evaluate.report import print_results
    from brewjax.evaluate.results import compare

    tables, bundle = Dataset.load(dataset), Bundle.load(model)
    examples_by_task = []
    for task in load_tasks(tasks, tables):
        examples = sample_examples(tables, task, split, max_examples)
        if not examples:
            raise task.error(f"no question falls into the {split} period", "split")
        examples_by_task.append((task, examples))
    for (task, _), predictions in zip(examples_by_task, predict(bundle, tables, examples_by_task), strict=True):
        print_results(compare(task, {"model": predictions.table}), console)


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
    style: Annotated[str, typer.Option(help="sectioned, chat, compact or key-value")] = "sectioned",
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
    from brewjax.data.tables.statistics import Percentiles
    from brewjax.data.tasks.examples import build_examples, example_at
    from brewjax.data.tasks.task import load_tasks
    from brewjax.data.text.tokenizer import Tokenizer

    if style not in STYLES:
        raise typer.BadParameter(f"'{style}': {suggest(style, STYLES)}", param_hint="--style")
    if split and at:
        raise typer.BadParameter("give --at or --split, not both")
    if not split and member is None:
        raise typer.BadParameter("give --member, or --split")
    tables = Dataset.load(dataset)
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
    percentiles = Percentiles.fit(tables, checked.boundaries(tables)[0])
    verbalizer = Verbalizer(tables, percentiles, Tokenizer.byte_level(), max_tokens)
    for example in printed:
        if split:
            moment = datetime.datetime.fromtimestamp(example.cutoff_time / MICROSECONDS, datetime.UTC)
            console.print(
                f"(member {tables.member_id(example.member)} as of {moment:%Y-%m-%d %H:%M:%S} UTC)", style="dim"
            )
        text = verbalizer.prompt(checked, verbalizer.fitting(checked, example, style), style)
        _print(text.render())
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
    member: Annotated[str, typer.Option(help="and the id of a member, to rank all items new to the member.")] = "",
    at: At = None,
    items: Annotated[Optional[int], typer.Option(help="Rank only so many of them, drawn at random.", min=1)] = None,
    note: Annotated[str, typer.Option(help="A wish that the model reads with its instruction.")] = "",
    top: Annotated[int, typer.Option(help="How many items to show.", min=1)] = 10,
) -> None:
    """Rank items for a member of a dataset, or answer the questions of a JSON prompt; here, or on a server."""
    if model is not None and server:
        raise typer.BadParameter("give a model folder or --server, not both")
    if model is None and not server:
        raise typer.BadParameter("give a model folder, or --server")
    if prompt is not None:
        from brewjax.data.text.prompt import Prompt

        stdin = str(prompt) == "-"
        text = decode(sys.stdin.buffer.read(), "stdin") if stdin else read_text(prompt)
        request = Prompt.from_json(text, "stdin" if stdin else str(prompt))
        if model:
            from brewjax.bundle.bundle import Bundle

            bundle = Bundle.load(model)
            probabilities = bundle.score(request)
        else:
            from brewjax.serve.client import raw, score_all

            candidates = [question.text for question in request.questions]
            question = raw(request.preamble, candidates, request.labels, request.events)
            probabilities, how = score_all(server, question, os.environ.get(TOKEN))
            console.print(how)
        values = np.arange(len(request.labels), 0, -1)
        names = [question.text.strip() for question in request.questions]
        print_ranking(console, probabilities, request.labels, values, names, top)
    elif dataset and task and member:
        from brewjax.data.tables.dataset import Dataset
        from brewjax.data.tasks.examples import example_at
        from brewjax.data.tasks.task import load_tasks

        tables = Dataset.load(dataset)
        (checked,) = load_tasks([task], tables)
        example = example_at(tables, checked, tables.member_row(member), _microseconds(at))
        if items is not None:
            example = example.select(np.sort(np.random.default_rng(0).permutation(len(example.candidates))[:items]))
        if model:
            from brewjax.bundle.bundle import Bundle

            bundle = Bundle.load(model)
            verbalizer, style = bundle.verbalizer(tables, checked), bundle.prompts.score_style
            example = verbalizer.fitting(checked, example, style)
            request = verbalizer.prompt(checked, example, style, note)
            verbalizer.print_overlong()
            probabilities = bundle.score(request)
        else:
            from brewjax.serve.client import score_all
            from brewjax.serve.requests import request_from_example

            question = request_from_example(tables, checked, example, note)
            probabilities, how = score_all(server, question, os.environ.get(TOKEN))
            console.print(how)
        names = [tables.item_name(row) for row in example.candidates]
        print_ranking(console, probabilities, checked.words, checked.values, names, top)
    else:
        raise typer.BadParameter("give --prompt, or --dataset, --task and --member")


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

    from brewjax.serve.config import ServeConfig
    from brewjax.serve.server import log_as_json
    from brewjax.serve.server import serve as run_server

    settings = (
        ServeConfig.load(config, overrides or ()) if config else ServeConfig.of({}, "brewjax serve", overrides or ())
    )
    log_as_json()
    sys.exit(0 if asyncio.run(run_server(model, settings)) else 1)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A folder of Hugging Face safetensors, a .gguf file, or smollm2-135m.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    name: Annotated[Optional[str], typer.Option(help="What to call the model; after its source by default.")] = None,
    dtype: Annotated[
        Optional[Literal["float32", "bfloat16"]], typer.Option(help="Of its weights; as they are by default.")
    ] = None,
    overrides: Annotated[
        Optional[list[str]], typer.Option("--set", help="KEY=VALUE of its prompts, e.g. chat.date=2026-01-01.")
    ] = None,
) -> None:
    """Make a model folder of an open model, which then scores, evaluates and trains as any other."""
    from brewjax.bundle.exchange import import_model
    from brewjax.model.params import num_parameters

    bundle = import_model(source, out, name, dtype, overrides or ())
    _print(f"{out}: {bundle.model.name}, {num_parameters(bundle.params):,} parameters, {bundle.model.param_dtype}")


@app.command()
def export(
    model: ModelFolder, out: Annotated[Path, typer.Argument(help="The folder to write, for transformers to open.")]
) -> None:
    """Give a model back as a Hugging Face folder: config, safetensors, tokenizer and chat template."""
    from brewjax.bundle.bundle import check_folder
    from brewjax.bundle.exchange import export_model

    check_folder(model)
    export_model(model, out)
    _print(f"{out}: open it with AutoModelForCausalLM.from_pretrained")


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="The user's text.")],
    max_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many; 0: all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Go on from the prompt, without the chat template.")] = False,
) -> None:
    """Generate text: the answer to a prompt in the chat template, or its continuation where there is none."""
    from brewjax.bundle.bundle import Bundle
    from brewjax.model.generate import Generator, SamplingParams

    bundle = Bundle.load(model)
    tokenizer = bundle.tokenizer
    chat = bool(tokenizer.hf.chat_template) and not plain
    turn = {"role": "user", "content": tokenizer.clean(prompt)}
    text = tokenizer.chat([turn], bundle.prompts.chat) if chat else prompt
    ids = tokenizer.with_bos(tokenizer.encode([text], begins=True)[0])
    context = len(ids) + max_tokens
    bundle.model.check_length(context, "--prompt with --max-tokens")
    sampling = SamplingParams(temperature=temperature, top_k=top_k)
    generator = Generator(bundle.model, bundle.params, 1, context, sampling, seed)
    stop = [] if tokenizer.hf.eos_token_id is None else [tokenizer.hf.eos_token_id]
    (answer,) = generator.generate([ids], max_tokens, stop)
    _print(tokenizer.hf.decode(answer))


@app.command()
def upcycle(
    model: ModelFolder,
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    experts: Annotated[int, typer.Option(help="Experts of each layer.", min=2)] = 8,
    per_token: Annotated[int, typer.Option(help="How many of them each token goes through.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of the router's weights.")] = 0,
) -> None:
    """Make a mixture of experts of a dense model: it says the same until it is trained."""
    from brewjax.bundle.bundle import check_folder
    from brewjax.bundle.exchange import upcycle_model
    from brewjax.model.config import ExpertsConfig
    from brewjax.model.params import num_parameters

    check_folder(model)
    bundle = upcycle_model(model, out, ExpertsConfig(num_experts=experts, num_experts_per_tok=per_token), seed)
    _print(f"{out}: {bundle.model.name}, {num_parameters(bundle.params):,} parameters")


@app.command()
def describe(
    model: Annotated[Path, typer.Argument(help="A model's YAML file, its folder, or a Hugging Face folder.")],
    overrides: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, e.g. vocab_size=32000.")] = None,
) -> None:
    """Count a model's parameters, those that one token uses, and their bytes."""
    from brewjax.model.config import ModelConfig
    from brewjax.model.huggingface import CONFIG, read_config
    from brewjax.model.params import MODEL, model_size

    if (model / CONFIG).is_file():
        config = read_config(model, model.resolve().name)
    else:
        config = ModelConfig.load(model / MODEL if model.is_dir() else model, overrides or ())
    size = model_size(config)
    table = Table(show_header=False)
    for name, value in {
        "parameters": f"{size.parameters:,}",
        "used by a token": f"{size.active:,}",
        f"weights at rest, {config.param_dtype}": f"{size.weight_bytes / 1e9:,.2f} GB",
        "weights in bfloat16": f"{2 * size.parameters / 1e9:,.2f} GB",
        f"keys and values of a token, {config.compute_dtype}": f"{size.cache_bytes:,} bytes",
    }.items():
        table.add_row(name, value)
    console.print(bold(config.name), table)


@app.command("help")
def help_(
    key: Annotated[Optional[str], typer.Argument(help="A key of a YAML file, e.g. train.batch_size.")] = None,
) -> None:
    """Explain a setting: what it does, its type and default. Without a key, list the files that have settings."""
    from brewjax.schemas import FILES, find, settings

    table = Table(box=None, pad_edge=False)
    if key is None:
        for heading in ("file", "keys", "what it is"):
            table.add_column(heading, overflow="fold")
        for file, config in FILES.items():
            table.add_row(file, str(len(settings(file))), (config.__doc__ or "").split("\n")[0])
        console.print(table)
        return
    matches = find(key)
    if not matches:
        keys = dict.fromkeys(
            part.partition("[")[0] for file in FILES for s in settings(file) for part in s.key.split(".")
        )
        raise typer.BadParameter(f"'{key}' is no setting; {suggest(key.split('.')[-1], keys)}", param_hint="KEY")
    for heading in ("file", "key", "type", "default", ""):
        table.add_column(heading, overflow="fold")
    for file, name, type_, default, description in matches:
        table.add_row(file, name, type_, default or "required", description)
    console.print(table)


@app.command("schema")
def schema_(file: Annotated[str, typer.Argument(help="dataset, task, model, recipe, plan or serve")]) -> None:
    """Print the JSON schema of a kind of YAML file, for an editor's completion and checks."""
    import json

    from brewjax.schemas import FILES, schema

    if file not in FILES:
        raise typer.BadParameter(f"'{file}': {suggest(file, FILES)}", param_hint="FILE")
    typer.echo(json.dumps(schema(file), indent=2))


@app.command("compile")
def compile_(
    recipe: Annotated[Path, typer.Argument(help="A recipe; its name, model and train are enough.")],
    topology: Annotated[str, typer.Option(help="CHIP-SHAPE, e.g. v5p-8x8x8, v5e-1x1, or slices of it: 2xv5p-8x8x8.")],
    score: Annotated[
        Optional[str], typer.Option(help="TOKENS or TOKENS,PAST: a scoring pass, behind PAST cached pages.")
    ] = None,
    overrides: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, e.g. train.mesh.fsdp=64.")] = None,
    of_model: Annotated[
        Optional[list[str]], typer.Option("--set-model", help="KEY=VALUE, e.g. param_dtype=bfloat16.")
    ] = None,
) -> None:
    """Compile a training step or a scoring pass for a TPU topology, without TPUs: does it fit, how fast can it be?"""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run; a chip that is here is left alone
    import jax

    from brewjax.aot import program, report
    from brewjax.aot.topology import topology as find
    from brewjax.model.config import ModelConfig
    from brewjax.model.params import model_size
    from brewjax.pipeline.recipe import load_plan
    from brewjax.scoring.passes import Bucket

    plan = load_plan(recipe, overrides or ())
    model = ModelConfig.load(plan.model, of_model or ())
    parameters = model_size(model).parameters
    target = find(topology)
    mesh = plan.train.mesh.build(target.devices)
    used = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    console.print(bold(model.name, f", {parameters:,} parameters, on {target.name}: {used or 'one device'}"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if score is None:
            works = [program.training_step(model, plan.train, mesh)]
        else:
            try:
                bucket = Bucket(*(int(number) for number in score.split(",")))
            except (TypeError, ValueError):
                raise typer.BadParameter(f"'{score}' is not TOKENS or TOKENS,PAST", param_hint="--score") from None
            works = program.scoring_pass(model, bucket, mesh)
        for work in works:
            compiled = report.compile_work(work)
            if score is None:
                suggestion = report.advice(model, plan.train, mesh, compiled.memory, target.chip.hbm)
            else:
                suggestion = "--set-model param_dtype=bfloat16, fewer tokens, or more devices along train.mesh.tensor"
            report.show(compiled, target, suggestion, console)
            if not compiled.program:
                raise typer.Exit(1)


if __name__ == "__main__":
    main()
