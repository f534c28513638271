"""Several processes, one run: how they find each other, wait for each other, and end together.

A launcher starts the same command everywhere and says who is who by three variables, or that JAX can find out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the coordination service has no public name yet
from jax.sharding import Mesh, NamedSharding

RESTART = 75  # EX_TEMPFAIL: what a process exits with when starting it again with the same arguments is all it needs
COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
FIND = "BREWJAX_HOSTS"  # "auto": TPU VMs, SLURM, MPI and GKE tell JAX themselves
SILENCE = 30  # seconds without a sign of life after which a process is given up
TURN = 2_000  # milliseconds that a wait takes before it looks whether the process was told to end

_turns = itertools.count()
_asked = _patient = False


class HostError(RuntimeError):
    """Another process failed, or could not be found."""


def is_first() -> bool:
    """Whether this process is the one that prepares data and writes logs, metrics and small files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within, the processes that a launcher started are one; without a launcher it is this process alone.

    Standard output is the first process's. SIGTERM ends a process with exit code RESTART, at once, or, within
    `patience`, when there is a checkpoint. Where another process was lost, this one says so and exits with RESTART.
    """
    _join()
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = str(error).splitlines()[0]
        _leave(f"what the processes compute together failed, most likely because one of them ended: {reason}")


def _join() -> None:
    names = [name for name in (COORDINATOR, PROCESSES, PROCESS) if os.environ.get(name)]
    automatic = os.environ.get(FIND)
    if automatic not in (None, "", "auto"):
        raise HostError(f"{FIND} is '{automatic}'; it may only be 'auto', or be left out")
    if not names and not automatic:
        return
    who: dict[str, Any] = {}
    if not automatic:
        if missing := {COORDINATOR, PROCESSES, PROCESS} - set(names):
            raise HostError(
                f"{', '.join(names)} is set, but not {', '.join(sorted(missing))}: a launcher sets all three, "
                f"or {FIND}=auto where JAX finds out by itself (TPU VMs, SLURM, MPI, GKE)"
            )
        try:
            count, number = int(os.environ[PROCESSES]), int(os.environ[PROCESS])
        except ValueError:
            raise HostError(
                f"{PROCESSES} is '{os.environ[PROCESSES]}' and {PROCESS} '{os.environ[PROCESS]}'; both must be numbers"
            ) from None
        if not 0 <= number < count:
            raise HostError(f"{PROCESS} is {number}; of {count} processes ({PROCESSES}) it is one of 0 to {count - 1}")
        who = {"coordinator_address": os.environ[COORDINATOR], "num_processes": count, "process_id": number}
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours
    try:
        jax.distributed.initialize(**who, heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE // 3)
    except (ValueError, RuntimeError) as error:
        where = os.environ.get(COORDINATOR, "the coordinator that JAX looks for")
        _leave(
            f"cannot join the other processes by {where}: {error}. Is the first process running, is its port free "
            "and open between the hosts, and does every process have its own number?"
        )
    jax.devices()  # all take part in finding out who has which


def on_first(work: Callable[[], Any]) -> Any:
    """What `work` returns (JSON) on the first process, which alone does it while the others wait, or its failure."""
    if jax.process_count() == 1:
        return work()
    client, key = distributed.global_state.client, f"brewjax/{next(_turns)}"
    assert client is not None
    if is_first():
        try:
            result = work()
        except BaseException as error:
            client.key_value_set(key, json.dumps({"error": str(error) or type(error).__name__}))
            raise
        client.key_value_set(key, json.dumps({"result": result}))
        return result
    while True:
        try:
            said = json.loads(client.blocking_key_value_get(key, TURN))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    if "error" in said:
        raise HostError(f"process 0 failed: {said['error']}")
    return said["result"]


# --- SIGTERM: the machine is wanted back


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Within, SIGTERM is noted for `Ending` to find; at the end it is obeyed."""
    global _patient
    _patient = True
    try:
        yield
    finally:
        _patient = False
    if _asked:
        _leave("told to end (SIGTERM): what is done is kept")


class Ending:
    """Whether any process was told to end, the same answer in each.

    Asked once a step; the answer is that of the step before, so that nobody waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, jax.P(mesh.axis_names))
        self._any = jax.jit(jnp.any)
        self._pending: jax.Array | None = None

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return _asked
        before = self._pending
        mine = np.array([_asked])
        flags = jax.make_array_from_callback((self._sharding.num_devices,), self._sharding, lambda _: mine)
        self._pending = self._any(flags)
        return before is not None and bool(before)


def preempted(what: str) -> NoReturn:
    """Ends this process, as all others do at the same step."""
    print(f"told to end (SIGTERM): {what}; start the same command again to go on", file=sys.stderr, flush=True)
    sys.exit(RESTART)


def _on_sigterm(*_: object) -> None:
    global _asked
    _asked = True
    if not _patient:
        _leave("told to end (SIGTERM): what is done is kept")


def _leave(why: str) -> NoReturn:
    """Ends this process without waiting for others, which may be gone."""
    number = f"process {distributed.global_state.process_id}: " if distributed.global_state.num_processes > 1 else ""
    print(f"{number}{why}\nStart the same command again to go on; exit code {RESTART}.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(RESTART)
