"""`brewjax data`: datasets are fetched, guessed at, checked, and given facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table

from brewjax.config import suggest
from brewjax.console import plain_console, print_line

# Heavy imports are inside the verbs, so that --help answers at once.

app = typer.Typer(no_args_is_help=True, help="Fetch, describe and check datasets.")
console = plain_console()
Folder = Annotated[Path, typer.Argument(help="A folder with dataset.yaml and its tables.")]


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A public dataset, e.g. movielens-100k or nemig.")],
    out: Annotated[Optional[Path], typer.Option(help="Folder to write; data/NAME by default.")] = None,
    source: Annotated[Optional[Path], typer.Option("--from", help="A copy that you have, in its place.")] = None,
) -> None:
    """Fetch a public dataset as a dataset folder (its licence is printed)."""
    from brewjax.data.public.fetch import fetch

    fetch(name, out or Path("data") / name, source)


@app.command()
def simulate(
    name: Annotated[str, typer.Argument(help="network")],
    out: Annotated[Path, typer.Argument(help="Folder to write: the datasets jobs, posts and people.")],
    members: Annotated[int, typer.Option(help="How many members there are.")] = 10_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.", min=0)] = 0,
    months: Annotated[int, typer.Option(help="How long it goes on, from January 2025.")] = 8,
) -> None:
    """Simulate a professional network with a known truth: three datasets of the same members, and their union."""
    from brewjax.data.simulate.network import simulate_network

    if name != "network":
        raise typer.BadParameter(f"'{name}': {suggest(name, ['network'])}", param_hint="NAME")
    try:
        simulate_network(out, members, seed, months)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for folder in (*sorted(path for path in out.iterdir() if path.is_dir()), out):
        console.print(f"{folder}: `brewjax data check {folder}`")


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="A folder with three tables, Parquet or CSV.")]) -> None:
    """Guess the card of a folder of tables, write it as dataset.yaml, and say what was guessed and why."""
    from brewjax.data.tables.card import CARD
    from brewjax.data.tables.guess import write_card

    table = Table("key", "guess", "because", box=None)
    for guess in write_card(folder):
        table.add_row(guess.key, guess.value, guess.reason)
    console.print(table)
    console.print(f"{folder / CARD}: read it, mend the words for the actions, then `brewjax data check {folder}`")


@app.command()
def check(
    folder: Folder,
    tasks: Annotated[
        Optional[list[Path]], typer.Option("--task", help="A task file: what it would ask, and what is suspicious.")
    ] = None,
) -> None:
    """Check a dataset folder: every problem is listed, with file, column and row."""
    from brewjax.data.tables.dataset import Dataset
    from brewjax.data.tasks.excerpts import store_scales
    from brewjax.data.tasks.task import load_tasks
    from brewjax.evaluate.task_check import summarize_splits, suspicions

    dataset = Dataset.load(folder)
    counts = f"{len(dataset.members):,} members, {len(dataset.items):,} items, {len(dataset.events):,} events"
    console.print(f"{dataset.card.name}: {counts}; no problem found")
    for task in load_tasks(tasks or [], dataset):
        summaries = summarize_splits(dataset, task)
        table = Table(title=task.name, title_justify="left", box=None)
        for heading in ("split", "questions", *task.words, "in a prompt", "past events", "gap, days", "new items"):
            table.add_column(heading, justify="right")
        for summary in summaries:
            table.add_row(
                summary.split,
                f"{summary.questions:,}",
                *(f"{share:.1%}" for share in summary.label_shares),
                f"{summary.candidates_per_prompt:.1f}",
                f"{summary.past_events:.0f}",
                f"{summary.gap_days:.2g}",
                f"{summary.new_items:.1%}",
            )
        console.print(table)
        for line in suspicions(dataset, task, summaries):
            console.print(f"suspicious: {line}")
        store_scales(dataset, task)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def prepare(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. configs/recipes/demo.yaml.")],
    out: Annotated[Optional[Path], typer.Option(help="Output folder of the run; runs/NAME by default.")] = None,
    overrides: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, e.g. train.seq_len=2048.")] = None,
    runner: Annotated[
        Optional[str], typer.Option(help="A runner of Apache Beam, e.g. DataflowRunner; its options follow.")
    ] = None,
) -> None:
    """Write a recipe's tokenizer and training data, which `brewjax run` then finds: on all cores of all hosts, or on
    Beam.

    What is written is kept: a run that was killed goes on with the shards that are missing.
    """
    from brewjax import distributed
    from brewjax.pipeline.recipe import Recipe
    from brewjax.pipeline.stages import prepare_recipe

    config = Recipe.load(recipe, overrides or ())
    folder = out or Path("runs") / config.name
    if runner:
        from brewjax.pipeline.beam import write_on_beam

        prepare_recipe(config, folder, write_on_beam([f"--runner={runner}", *context.args]))
        return
    if context.args:
        raise typer.BadParameter(f"{' '.join(context.args)}: options of Beam need --runner")
    with distributed.distributed_runtime():
        prepare_recipe(config, folder)


@app.command()
def facts(
    folder: Folder,
    task: Annotated[Path, typer.Argument(help="A task file: facts are judged by what they add to its answers.")],
    max_facts: Annotated[int, typer.Option(help="At most so many are proposed.", min=1)] = 12,
    write: Annotated[bool, typer.Option("--write", help="Put them into dataset.yaml, in place of its facts.")] = False,
) -> None:
    """Propose facts for the card, by what each adds on the validation period beyond those before it."""
    from brewjax.data.tables.dataset import Dataset
    from brewjax.data.tasks.task import load_tasks
    from brewjax.evaluate.fact_search import facts_yaml, propose_facts, write_facts

    dataset = Dataset.load(folder)
    (loaded,) = load_tasks([task], dataset)
    gains = propose_facts(dataset, loaded, max_facts)
    table = Table("fact", "of", "AUC in list", "AUC", "log loss", box=None)
    for gain in gains:
        table.add_row(gain.fact.name, gain.group, f"{gain.gauc:+.4f}", f"{gain.auc:+.4f}", f"{gain.log_loss:+.4f}")
    console.print(table)
    if write:
        write_facts(folder, gains)
    print_line(facts_yaml(gains))
