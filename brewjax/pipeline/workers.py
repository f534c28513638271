"""Prepares data on all cores of all hosts of a run."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from brewjax import distributed
from brewjax.console import track
from brewjax.data.prompts.overlong import OverlongLog
from brewjax.pipeline.context import Run
from brewjax.pipeline.preparation import Preparation, Source, Unit

FEW_EVENTS = 50_000  # of all datasets: starting other processes would take longer than preparing it


def write_on_this_host(preparation: Preparation, run: Run) -> dict[str, int]:
    """Writes this host's part of the units that are missing: of small datasets in this process, else on all cores."""
    process, processes = distributed.process_index_and_count()
    events = sum(len(surface.dataset.events) for surface in run.surfaces.values())
    write = write_here if events < FEW_EVENTS else write_on_all_cores
    return write(preparation, run, process, processes)


def write_here(preparation: Preparation, run: Run, process: int = 0, processes: int = 1) -> dict[str, int]:
    """Writes every `processes`-th unit that is missing, from number `process` on, one after another."""
    sources = preparation.sources(run)
    for unit in track(preparation.missing(sources)[process::processes], "records"):
        preparation.write(sources[unit.source], unit)
    run.overlong.print()
    return preparation.num_shards(sources)


def write_on_all_cores(preparation: Preparation, run: Run, process: int = 0, processes: int = 1) -> dict[str, int]:
    """As `write_here`, by a worker for each core.

    One process reads the tables and forks the workers, which share them. It is a process of its own: JAX has threads
    here, and a process with threads cannot be forked safely.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_fork_workers, args=(preparation, process, processes, sender))
    worker.start()
    sender.close()  # so that the end of the process is the end of the pipe
    overlong = OverlongLog()
    try:
        num_shards, num_units = _receive(receiver, worker)
        for _ in track(range(num_units), "records"):
            overlong.merge(_receive(receiver, worker))
    finally:
        receiver.close()
        worker.join()
    overlong.print()
    return num_shards


def _receive(receiver: Connection, worker: Any) -> Any:
    """The next message of the process; raises what it raised."""
    try:
        message = receiver.recv()
    except EOFError:
        worker.join()
        raise RuntimeError(
            f"a process that prepares data ended with exit code {worker.exitcode}, for want of memory most likely; run "
            "the same command again: what is written is kept"
        ) from None
    if isinstance(message, BaseException):
        raise message
    return message


def _fork_workers(preparation: Preparation, process: int, processes: int, sender: Connection) -> None:
    """The process that reads the tables and forks a worker for each core; tells of each unit that is written."""
    _end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    try:
        run = Run(preparation.recipe, preparation.run_folder)
        sources = preparation.sources(run)
        units = preparation.missing(sources)[process::processes]
        sender.send((preparation.num_shards(sources), len(units)))
        for name, of_source in itertools.groupby(units, key=lambda unit: unit.source):
            next(sources[name].records(next(of_source).partition), None)  # computes what all workers then share
        write = functools.partial(_write_in_worker, preparation, sources, run)
        gc.collect()
        gc.freeze()  # a collection would touch, and so copy, what is shared
        for overlong in _map_on_cores(write, units):
            sender.send(overlong)
    except concurrent.futures.BrokenExecutor:
        os._exit(os.EX_SOFTWARE)  # a worker was killed
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except Exception as error:
        sender.send(error)


def _write_in_worker(preparation: Preparation, sources: Mapping[str, Source], run: Run, unit: Unit) -> OverlongLog:
    """Writes a unit; the texts of it that were too long."""
    preparation.write(sources[unit.source], unit)
    return run.overlong.take()


_inherited: Callable[[Unit], OverlongLog]  # set before workers are forked: what they share is not sent to them


def _map_on_cores(write: Callable[[Unit], OverlongLog], units: Sequence[Unit]) -> Iterator[OverlongLog]:
    """Yields `write` of each unit as it is done by one of this process's forks."""
    global _inherited
    _inherited = write
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with concurrent.futures.ProcessPoolExecutor(
        min(cores, len(units)) or 1, multiprocessing.get_context("fork"), _end_with_parent
    ) as pool:
        for done in concurrent.futures.as_completed([pool.submit(_call_inherited, unit) for unit in units]):
            yield done.result()


def _call_inherited(unit: Unit) -> OverlongLog:
    return _inherited(unit)


def _end_with_parent() -> None:
    """Ends this process when its parent ends, however that ends; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(os.EX_TEMPFAIL)

    threading.Thread(target=watch, daemon=True).start()
