"""A server under load: open-loop Poisson arrivals of members, some of them again and again, with 50 to 500 items each.

    brewjax data fetch movielens-100k && brewjax run configs/recipes/demo.yaml
    python -m benchmarks.serve_load runs/demo/turbo/model data/movielens-100k configs/tasks/movielens/liked.yaml

Starts the server, measures its sustained rate in a closed loop (callers who wait for their answers), then sends
requests at multiples of that rate in an open loop, the last at ten times it. Every answer is compared with the
scorer's own. Latency counts from when a request was due. Loopback only; it ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import example_at
from brewjax.data.tasks.task import Task
from brewjax.serve import Client, ranker_pb2_grpc
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.requests import request_from_example
from pallas_kernels.platform import product_dtype

PORT, HTTP_PORT = 9100, 9101
MEMBERS, ZIPF = 200, 1.1  # number of members, and the exponent of their popularity
TOLERANCE = 0.01 if product_dtype(jnp.float32) == jnp.bfloat16 else 1e-4  # of float32 products; other order of sums


@dataclasses.dataclass
class Outcome:
    """Outcomes of the requests of one run."""

    offered: int = 0
    shed: int = 0
    late: int = 0
    wrong: int = 0
    items: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each answer


def make_requests(model: Path, folder: Path, task: str) -> list[tuple[pb.ScoreRequest, np.ndarray]]:
    """A request for each member, with the expected probabilities."""
    dataset, bundle, random = Dataset.load(folder), Bundle.load(model), np.random.default_rng(0)
    loaded_task = Task.load(task)
    verbalizer = bundle.verbalizer(dataset, loaded_task)
    requests, prompts = [], []
    for member in random.permutation(len(dataset.members))[:MEMBERS]:
        example = example_at(dataset, loaded_task, int(member))
        example = example.select(random.permutation(len(example.candidates))[: random.integers(50, 501)])
        requests.append(pb.ScoreRequest(member=request_from_example(dataset, loaded_task, example)))
        prompts.append(bundle.encode(verbalizer.prompt(loaded_task, example, bundle.prompts.score_style)))
    return list(zip(requests, bundle.scorer(prompts).score_encoded(prompts), strict=True))


async def ask(
    ranker: ranker_pb2_grpc.RankerStub, case: tuple[pb.ScoreRequest, np.ndarray], due: float, outcome: Outcome
) -> None:
    request, expected = case
    outcome.offered += 1
    try:
        response = await ranker.Score(request, timeout=30)
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
            outcome.shed += 1  # by the queue; or by HTTP/2, for too many streams
        elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            outcome.late += 1
        else:
            raise
        return
    outcome.seconds.append(time.monotonic() - due)
    outcome.items += len(response.scores)
    probabilities = np.empty_like(expected)
    for item in response.scores:
        probabilities[item.index] = item.probabilities
    outcome.wrong += not np.allclose(probabilities, expected, atol=TOLERANCE)


def draw(requests: list, random: np.random.Generator) -> tuple[pb.ScoreRequest, np.ndarray]:
    weights = np.arange(1, len(requests) + 1) ** -ZIPF
    return requests[random.choice(len(requests), p=weights / weights.sum())]


async def closed_loop(requests: list, seconds: float, callers: int = 8) -> tuple[Outcome, float]:
    """Callers who wait for each answer before the next request. Returns outcomes and answered requests per second."""
    outcome, start_time = Outcome(), time.monotonic()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{PORT}") as channel:
        ranker = ranker_pb2_grpc.RankerStub(channel)

        async def caller(seed: int) -> None:
            random = np.random.default_rng(seed)
            while (now := time.monotonic()) < start_time + seconds:
                await ask(ranker, draw(requests, random), now, outcome)

        await asyncio.gather(*(caller(seed) for seed in range(callers)))
    return outcome, len(outcome.seconds) / (time.monotonic() - start_time)


async def open_loop(requests: list, rate: float, seconds: float) -> Outcome:
    """Poisson arrivals at `rate` requests per second."""
    random, outcome = np.random.default_rng(1), Outcome()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{PORT}") as channel, asyncio.TaskGroup() as group:
        ranker = ranker_pb2_grpc.RankerStub(channel)
        due = time.monotonic()
        end = due + seconds
        while (due := due + random.exponential(1 / rate)) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(ask(ranker, draw(requests, random), due, outcome))
    return outcome


def metrics() -> dict[str, float]:
    """The server's metrics, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{HTTP_PORT}/metrics") as page:
        lines = [line for line in page.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def row(name: str, outcome: Outcome, seconds: float, before: dict[str, float], after: dict[str, float]) -> list[str]:
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    computed, padding = change["brewjax_pass_tokens_sum"], change["brewjax_padding_tokens_total"]
    cached, fresh = (
        change.get(f'brewjax_prefix_tokens_total{{source="{source}"}}', 0.0) for source in ("cached", "computed")
    )
    latencies = np.quantile(outcome.seconds, [0.5, 0.95, 0.99]) if outcome.seconds else np.full(3, np.nan)
    return [
        name,
        f"{outcome.offered / seconds:.1f}",
        f"{outcome.items / seconds:,.0f}",
        *(f"{latency * 1000:,.0f}" for latency in latencies),
        f"{outcome.shed / outcome.offered:.0%}",
        f"{outcome.late / outcome.offered:.0%}",
        str(outcome.wrong),
        f"{padding / (computed + padding):.0%}",
        f"{cached / (cached + fresh):.0%}",
        f"{change['brewjax_pass_items_sum'] / change['brewjax_pass_items_count']:.0f}",
    ]


def memory(process: subprocess.Popen) -> float:
    """Peak memory of the process so far, in gigabytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak
    return int(peak[1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("task")
    parser.add_argument("--seconds", type=float, default=60, help="of each run")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8, 10], help="of the sustained rate")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="of the server, KEY=VALUE")
    arguments = parser.parse_args()
    console = Console(width=150)
    requests = make_requests(arguments.model, arguments.dataset, arguments.task)
    settings = [f"port={PORT}", f"http_port={HTTP_PORT}", f"tasks=[{arguments.task}]", *arguments.settings]
    command = [sys.executable, "-m", "brewjax", "serve", str(arguments.model)]
    start_time = time.monotonic()
    with open(os.devnull, "w") as devnull:
        server = subprocess.Popen([*command, *(f"--set={setting}" for setting in settings)], stderr=devnull)
    try:
        with Client(f"127.0.0.1:{PORT}", timeout=300) as client:
            described = client.describe()
        table = Table(title=f"{described.model}, {described.parameters:,} parameters")
        console.print(f"ready after {time.monotonic() - start_time:.1f} s, {described.compilations} programs compiled")
        columns = "requests/s|items/s|p50 ms|p95 ms|p99 ms|shed|late|wrong|padding|prefix cached|items a pass"
        for column in ["arrivals", *columns.split("|")]:
            table.add_column(column, justify="left" if column == "arrivals" else "right")
        before = metrics()
        sustained, rate = asyncio.run(closed_loop(requests, arguments.seconds))
        after = metrics()
        table.add_row(*row("8 callers in a closed loop", sustained, arguments.seconds, before, after))
        at_rest = memory(server)
        for share in arguments.shares:
            before = metrics()
            outcome = asyncio.run(open_loop(requests, share * rate, arguments.seconds))
            after = metrics()
            table.add_row(*row(f"Poisson, {share:g} x", outcome, arguments.seconds, before, after))
        console.print(table)
        console.print(
            f"memory at most {at_rest:.2f} GB before the Poisson arrivals, {memory(server):.2f} GB after; "
            f"{after['brewjax_compilations']:.0f} programs compiled"
        )
    finally:
        server.terminate()
        console.print(f"the server stopped with code {server.wait(60)}")


if __name__ == "__main__":
    main()
