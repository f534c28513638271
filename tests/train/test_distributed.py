"""Two real processes are one run: same numbers, one log, an end together, exact restarts. As a script, it trains."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import jax
import numpy as np
import pytest

from brewjax import distributed
from brewjax.train.batches import ShardedBatches
from brewjax.train.loop import train
from brewjax.train.metrics_writer import METRICS, read_metrics
from brewjax.train.objectives import supervised
from tests import processes
from tests.processes import finish, log
from tests.tiny import MODEL
from tests.train.test_loop import CONFIG, assert_same_numbers, newest_checkpoint, shards, without_speed

__all__ = ["shards"]  # a fixture
CONFIG = CONFIG.model_copy(update={"num_data_shards": 2, "gradient_accumulation_steps": 2})
LIMIT = 60  # seconds in which a process must notice that another is gone


def start(shards: Path, folder: Path, count: int) -> list[subprocess.Popen]:
    return processes.start("tests.train.test_distributed", shards, folder, folder=folder, processes=count)


def wait_for(step: int, folder: Path, started: list[subprocess.Popen]) -> None:
    while len(read_metrics(folder / METRICS)) < step:
        assert all(process.poll() is None for process in started), log(folder, 0)
        time.sleep(0.003)


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(MODEL, CONFIG, shards, folder, supervised)
    return folder


@pytest.fixture(scope="module")
def together(shards, tmp_path_factory) -> Path:
    """The folder of a run of two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("together")
    finish(folder, start(shards, folder, 2))
    return folder


def assert_same_parameters(folder: Path, other: Path) -> None:
    (step, actual), (last, expected) = newest_checkpoint(folder), newest_checkpoint(other)
    assert step == last == CONFIG.steps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


@pytest.mark.long
def test_two_processes_match_one(together, alone):
    assert_same_numbers(together, alone, range(1, CONFIG.steps + 1))
    assert_same_parameters(together, alone)
    for number in (0, 1):
        assert f"process {number} reads [{number}]\n" in log(together, number)
    assert "step 40/40" in log(together, 0)
    assert "step" not in log(together, 1)
    data = together / "checkpoints" / str(CONFIG.steps) / "data"
    assert sorted(path.name for path in data.glob("shard-*")) == ["shard-0-of-2.json", "shard-1-of-2.json"]


@pytest.mark.long
def test_one_killed_ends_the_other_and_a_restart_goes_on(shards, together, tmp_path):
    for killed, step in ((1, 8), (0, 20)):  # the second holds the run together
        started = start(shards, tmp_path, 2)
        wait_for(step, tmp_path, started)
        started[killed].kill()
        code = started[1 - killed].wait(LIMIT)
        output = log(tmp_path, 1 - killed)
        assert code in (distributed.EXIT_RESTART, -signal.SIGABRT), output
        assert "one of them ended" in output or "another task died" in output, output
        assert len(read_metrics(tmp_path / METRICS)) < CONFIG.steps
    finish(tmp_path, start(shards, tmp_path, 2))
    assert without_speed(tmp_path) == without_speed(together)  # to the bit


@pytest.mark.long
def test_sigterm_to_one_saves_and_one_process_goes_on_from_two(shards, alone, tmp_path):
    started = start(shards, tmp_path, 2)
    wait_for(12, tmp_path, started)
    started[1].terminate()
    assert [process.wait(LIMIT) for process in started] == [distributed.EXIT_RESTART] * 2, log(tmp_path, 0)
    step, _ = newest_checkpoint(tmp_path)
    assert len(read_metrics(tmp_path / METRICS)) == step < CONFIG.steps
    assert f"checkpoint of step {step} of 40 is saved" in log(tmp_path, 0)
    finish(tmp_path, start(shards, tmp_path, 1))
    assert_same_numbers(tmp_path, alone, range(1, CONFIG.steps + 1))
    assert_same_parameters(tmp_path, alone)


def test_a_failure_of_the_first_ends_the_others(tmp_path):
    started = start(tmp_path / "nowhere", tmp_path, 2)
    assert [process.wait(LIMIT) for process in started] == [1, 1]
    assert "no training shards there" in log(tmp_path, 0)
    assert "process 0 failed: " in log(tmp_path, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "is set, but not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2; of 2 processes .* one of 0 to 1"),
        ({"JAX_PROCESS_ID": "x"}, "both must be numbers"),
        ({"BREWJAX_DISTRIBUTED": "yes"}, "BREWJAX_DISTRIBUTED is 'yes'; it may only be 'auto'"),
    ],
)
def test_wrong_variables_are_named(monkeypatch, variables, message):
    if "JAX_PROCESS_ID" in variables:
        variables = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"} | variables
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.DistributedError, match=message), distributed.distributed_runtime():
        pass


@pytest.fixture
def received(monkeypatch) -> Iterator[tuple[list[Any], Future[None]]]:
    """The messages of a leader to a process, which is a thread here; and its end. The port is known to others too."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed.distributed.global_state, "coordinator_address", "localhost:1")
    monkeypatch.setattr(distributed, "_exit_now", sys.exit)  # of the thread
    address: Future[tuple[int, str]] = Future()

    def run_on_process_zero(work: Callable[[], Any]) -> tuple[int, str]:
        if result := work():
            with socket.create_connection(("localhost", result[0])) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n")
            address.set_result(result)
        return address.result(LIMIT)

    monkeypatch.setattr(distributed, "run_on_process_zero", run_on_process_zero)
    arrived: list[Any] = []

    def receive() -> None:
        arrived.extend(distributed.messages())

    with ThreadPoolExecutor() as executor:
        yield arrived, executor.submit(receive)


def test_messages_arrive_in_order_until_the_leader_is_done(received):
    arrived, end = received
    sent = [("a", 1), np.arange(3_000_000), "c"]
    with distributed.Leader() as leader:
        for message in sent:
            leader.send(message)
    end.result(LIMIT)
    jax.tree.map(np.testing.assert_array_equal, arrived, sent)


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (ValueError("no such table"), distributed.DistributedError, "process 0 failed: no such table"),
        (jax.errors.JaxRuntimeError("Gloo"), SystemExit, "process 0 ended"),  # for want of another process, most likely
    ],
)
def test_an_error_of_the_leader_ends_the_others(received, error, raised, words):
    _, end = received
    with contextlib.suppress(type(error)), distributed.Leader():
        raise error
    with pytest.raises(raised, match=words):
        end.result(LIMIT)


def test_a_leader_ends_when_another_process_does(received, monkeypatch):
    """While it has nothing to send, too."""
    reasons: Queue[str] = Queue()
    monkeypatch.setattr(distributed, "_exit_now", reasons.put)
    monkeypatch.setattr("pickle.load", lambda _: None)  # the process takes its first message for the end, and leaves
    with distributed.Leader() as leader:
        leader.send(0)
        received[1].result(LIMIT)
        assert reasons.get(timeout=LIMIT) == "process 1 ended"
        while reasons.empty():
            leader.send(np.zeros(1_000_000))
        assert reasons.get() == "process 1 ended"


def test_rows_must_divide_into_data_shards():
    expected = r"batch_size \(4\) / gradient_accumulation_steps \(2\) must be a multiple of num_data_shards \(3\)"
    with pytest.raises(ValueError, match=expected):
        type(CONFIG)(**CONFIG.model_dump() | {"num_data_shards": 3})


if __name__ == "__main__":
    shards_folder, run = map(Path, sys.argv[1:])
    with distributed.distributed_runtime():

        def check() -> None:
            if not list(shards_folder.glob("part-*")):
                raise ValueError(f"{shards_folder}: no training shards there")

        distributed.run_on_process_zero(check)
        sizes = (
            CONFIG.gradient_accumulation_steps,
            CONFIG.batch_size,
            CONFIG.seq_len,
            CONFIG.num_data_shards,
            CONFIG.seed,
        )
        reads = ShardedBatches(shards_folder, CONFIG.mesh.build(), *sizes).reads
        print(f"process {jax.process_index()} reads {reads}", file=sys.stderr)
        train(MODEL, CONFIG, shards_folder, run, supervised)
