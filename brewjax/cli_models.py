"""Verbs of the command line about one model (import, export, generate, quantise, count, compile) and about settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.table import Table

from brewjax.config import suggest
from brewjax.console import bold, plain_console, print_line

# Heavy imports (jax, transformers) are inside the verbs, so that --help answers at once.

app = typer.Typer()
console = plain_console()

ModelFolder = Annotated[Path, typer.Argument(help="A model folder, e.g. runs/demo/turbo/model.")]
SurfaceName = Annotated[
    str, typer.Option("--surface", help="The model's surface that the dataset is of; by default by the dataset's card.")
]


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
    print_line(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 1e6:,.1f} MB")


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
    print_line(f"{out}: {bundle.model.name}, {num_parameters(bundle.params):,} parameters, {bundle.model.param_dtype}")


@app.command()
def export(
    model: ModelFolder, out: Annotated[Path, typer.Argument(help="The folder to write, for transformers to open.")]
) -> None:
    """Give a model back as a Hugging Face folder: config, safetensors, tokenizer and chat template."""
    from brewjax.bundle.bundle import check_folder
    from brewjax.bundle.exchange import export_model

    check_folder(model)
    export_model(model, out)
    print_line(f"{out}: open it with AutoModelForCausalLM.from_pretrained")


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
    print_line(tokenizer.hf.decode(answer))


@app.command()
def explore(
    model: ModelFolder,
    dataset: Annotated[Path, typer.Option(help="A dataset folder.")],
    tasks: Annotated[
        Optional[list[Path]], typer.Option("--task", help="Task files, beside the model's own tasks.")
    ] = None,
    compare: Annotated[Optional[Path], typer.Option(help="Another model's folder, to compare with.")] = None,
    surface: SurfaceName = "",
    cases: Annotated[
        Optional[Path], typer.Option(help="A file of cases to choose from, as the page saves them.")
    ] = None,
    suite: Annotated[Optional[Path], typer.Option(help="A suite's file: its questions can be chosen.")] = None,
    port: Annotated[int, typer.Option(help="Of this machine; 0 takes a free one.", min=0, max=65535)] = 8000,
) -> None:
    """Open a page that changes instruction, note and history, shows how the ranking moves, and says why."""
    from brewjax.explore import explorer, page
    from brewjax.explore.cases import case_entries, load_cases, suite_entries
    from brewjax.suite.suite import Suite

    first = explorer.open(model, dataset, surface)
    explorers = [first, *([explorer.open(compare, first.dataset, surface)] if compare else [])]
    for task in tasks or ():
        for each in explorers:
            each.add_task(task)
    entries = case_entries(load_cases(cases)) if cases else []
    entries += suite_entries(Suite.load(suite), first.tables()) if suite else []
    page.serve(explorers, port, entries)


@app.command("check-cases")
def check_cases(
    model: ModelFolder,
    cases: Annotated[Path, typer.Argument(help="A file of cases, as the page of `brewjax explore` saves them.")],
    dataset: Annotated[Path, typer.Option(help="A dataset folder.")],
    tasks: Annotated[
        Optional[list[Path]], typer.Option("--task", help="Task files, beside the model's own tasks.")
    ] = None,
    surface: SurfaceName = "",
) -> None:
    """Rank cases by a model, and end with 1 if an expected order is not that of the ranking."""
    from brewjax.explore import explorer
    from brewjax.explore.cases import load_cases, print_cases

    opened = explorer.open(model, dataset, surface)
    for task in tasks or ():
        opened.add_task(task)
    if not print_cases(opened, load_cases(cases)):
        raise typer.Exit(1)


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
    print_line(f"{out}: {bundle.model.name}, {num_parameters(bundle.params):,} parameters")


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
def schema_(file: Annotated[str, typer.Argument(help="dataset, task, model, suite, recipe, plan or serve")]) -> None:
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
