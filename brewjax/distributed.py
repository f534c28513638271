"""One run over several processes: joining a cluster, work of process zero, messages of it, and preemption.

A launcher starts the same command on every host. It sets three environment variables (coordinator, number of processes,
number of this process), or one that lets JAX detect them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the coordination service has no public name yet
from jax.sharding import Mesh, NamedSharding

EXIT_RESTART = 75  # EX_TEMPFAIL: exit code of a process that only needs to be started again with the same arguments
COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
AUTO_DETECT_ENV = "BREWJAX_DISTRIBUTED"  # "auto": TPU VMs, SLURM, MPI and GKE tell JAX themselves
HEARTBEAT_TIMEOUT_S = 30  # seconds without a heartbeat after which a process counts as lost
POLL_MS = 2_000  # milliseconds of a wait before it checks for SIGTERM

_call_indices = itertools.count()
_preemption_requested = _deferring = False


class DistributedError(RuntimeError):
    """Another process failed or could not be reached, or the environment variables are wrong."""


def is_process_zero() -> bool:
    """Whether this process writes logs, metrics and small files."""
    return jax.process_index() == 0


def process_index_and_count() -> tuple[int, int]:
    """Says where in a run this process is.

    Returns:
      Which of the processes this is, from 0 on, and how many there are.
    """
    return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def distributed_runtime() -> Iterator[None]:
    """Context manager: initialises `jax.distributed` if a launcher set its variables; otherwise runs one process.

    Only process zero keeps stdout. On SIGTERM the process exits with `EXIT_RESTART`, immediately or, inside
    `defer_preemption`, after a checkpoint. If another process dies, this one prints why and exits with `EXIT_RESTART`.

    Raises:
      DistributedError: if the environment variables are incomplete or wrong.
    """
    _join()
    if not is_process_zero():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = str(error).splitlines()[0]
        _exit_now(f"what the processes compute together failed, most likely because one of them ended: {reason}")


def _join() -> None:
    names = [name for name in (COORDINATOR, PROCESSES, PROCESS) if os.environ.get(name)]
    automatic = os.environ.get(AUTO_DETECT_ENV)
    if automatic not in (None, "", "auto"):
        raise DistributedError(f"{AUTO_DETECT_ENV} is '{automatic}'; it may only be 'auto', or be left out")
    if not names and not automatic:
        return
    init_kwargs: dict[str, Any] = {}
    if not automatic:
        if missing := {COORDINATOR, PROCESSES, PROCESS} - set(names):
            raise DistributedError(
                f"{', '.join(names)} is set, but not {', '.join(sorted(missing))}: a launcher sets all three, "
                f"or {AUTO_DETECT_ENV}=auto where JAX finds out by itself (TPU VMs, SLURM, MPI, GKE)"
            )
        try:
            num_processes, process_id = int(os.environ[PROCESSES]), int(os.environ[PROCESS])
        except ValueError:
            raise DistributedError(
                f"{PROCESSES} is '{os.environ[PROCESSES]}' and {PROCESS} '{os.environ[PROCESS]}'; both must be numbers"
            ) from None
        if not 0 <= process_id < num_processes:
            raise DistributedError(
                f"{PROCESS} is {process_id}; of {num_processes} processes ({PROCESSES}) it is one of 0 to "
                f"{num_processes - 1}"
            )
        init_kwargs = {
            "coordinator_address": os.environ[COORDINATOR],
            "num_processes": num_processes,
            "process_id": process_id,
        }
    jax.config.update("jax_enable_preemption_service", False)  # this module handles SIGTERM
    try:
        jax.distributed.initialize(
            **init_kwargs,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_S // 3,
        )
    except (ValueError, RuntimeError) as error:
        coordinator = os.environ.get(COORDINATOR, "the coordinator that JAX looks for")
        _exit_now(
            f"cannot join the other processes by {coordinator}: {error}. Is process 0 running, is its port free and "
            "open between the hosts, and does every process have its own number?"
        )
    jax.devices()  # every process must take part in the exchange of their devices


def run_on_process_zero(work: Callable[[], Any]) -> Any:
    """Runs `work` on process zero while the others wait.

    Args:
      work: returns something that JSON can hold.

    Returns:
      Its result, on every process.

    Raises:
      DistributedError: on other processes if `work` failed; process zero raises the error itself.
    """
    if jax.process_count() == 1:
        return work()
    key = f"brewjax/{next(_call_indices)}"
    return _publish(key, work) if is_process_zero() else _wait_for(key, 0)


def run_on_every_process(work: Callable[[], Any]) -> list[Any]:
    """Runs `work` on every process, and waits until all are done.

    Args:
      work: returns something that JSON can hold.

    Returns:
      The results of all processes, in their order, on every process.

    Raises:
      DistributedError: `work` failed on another process; that one raises the error itself.
    """
    if jax.process_count() == 1:
        return [work()]
    key, this = f"brewjax/{next(_call_indices)}", jax.process_index()
    result = _publish(f"{key}/{this}", work)
    return [
        result if process == this else _wait_for(f"{key}/{process}", process) for process in range(jax.process_count())
    ]


def _publish(key: str, work: Callable[[], Any]) -> Any:
    """Runs `work`, and leaves its result or error for the other processes."""
    client = distributed.global_state.client
    assert client is not None
    try:
        result = work()
    except BaseException as error:
        client.key_value_set(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    client.key_value_set(key, json.dumps({"result": result}))
    return result


def _wait_for(key: str, process: int) -> Any:
    """The result that another process left."""
    client = distributed.global_state.client
    assert client is not None
    while True:
        try:
            outcome = json.loads(client.blocking_key_value_get(key, POLL_MS))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    if "error" in outcome:
        raise DistributedError(f"process {process} failed: {outcome['error']}")
    return outcome["result"]


# --- Messages of process zero to all others, in one order


class Leader:
    """Process zero's connections to the other processes, each of which reads `messages`. To be used in a `with`.

    They are sockets, not collectives: a process can wait for a message for any time while its devices do nothing, and
    messages may be large. When one of the processes ends before the leader is done, all exit with `EXIT_RESTART`. Not
    thread-safe.

    Raises:
      DistributedError: a process did not connect in time.
    """

    def __init__(self) -> None:
        self._connections: dict[int, socket.socket] = {}
        self._is_done = False
        secret = secrets.token_hex()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
            server.settimeout(HEARTBEAT_TIMEOUT_S)
            port = server.getsockname()[1]
            run_on_process_zero(lambda: (port, secret))
            while missing := {*range(1, jax.process_count())} - {*self._connections}:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    which = ", ".join(map(str, sorted(missing)))
                    raise DistributedError(
                        f"process {which} did not connect to port {port} of process 0: is it open between the hosts?"
                    ) from None
                connection.settimeout(HEARTBEAT_TIMEOUT_S)
                with contextlib.suppress(OSError), connection.makefile("rb") as greeting:
                    sent, _, process = greeting.readline(100).partition(b" ")
                    if secrets.compare_digest(sent, secret.encode()):  # whoever else connects is not answered
                        connection.settimeout(None)
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small messages go at once
                        self._connections[int(process)] = connection
        for number in self._connections:
            threading.Thread(target=self._watch, args=(number,), daemon=True).start()

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        """Ends `messages`, with the error if there is one that is not about the devices of all."""
        self._is_done = True
        if not isinstance(error, jax.errors.JaxRuntimeError):
            self.send(error and DistributedError(f"process 0 failed: {str(error) or type(error).__name__}"))
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # closed at the other end
                connection.shutdown(socket.SHUT_RDWR)  # which `close` would leave to the end of `_watch`
            connection.close()

    def send(self, message: Any) -> None:
        """Sends a message to all other processes.

        Args:
          message: what pickle takes; no error, and not None.
        """
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for process, connection in self._connections.items():
            try:
                connection.sendall(data)
            except OSError:
                _exit_now(f"process {process} ended")

    def _watch(self, process: int) -> None:
        """Waits until another process ends; it sends nothing."""
        with contextlib.suppress(OSError):
            self._connections[process].recv(1)
        if not self._is_done:
            _exit_now(f"process {process} ended")


def messages() -> Iterator[Any]:
    """What process zero's `Leader` sends, until it is done. When process zero ends before, so does this one.

    Yields:
      Messages, in the order in which they were sent.

    Raises:
      DistributedError: process zero cannot be reached, or failed.
    """
    port, secret = run_on_process_zero(lambda: None)
    address = distributed.global_state.coordinator_address  # JAX runs the coordinator in process zero
    assert address is not None
    host = address.rpartition(":")[0].strip("[]")
    try:
        connection = socket.create_connection((host, port), HEARTBEAT_TIMEOUT_S)
    except OSError as error:
        raise DistributedError(
            f"cannot connect to port {port} of process 0, {host} ({error}): ports must be open between the hosts"
        ) from None
    connection.settimeout(None)
    with connection, connection.makefile("rb") as file:
        connection.sendall(f"{secret} {jax.process_index()}\n".encode())
        while True:
            try:
                message = pickle.load(file)
            except (OSError, EOFError, pickle.UnpicklingError):
                _exit_now("process 0 ended")
            if message is None:
                return
            if isinstance(message, DistributedError):
                raise message
            yield message


# --- Preemption: SIGTERM says that the machine is needed elsewhere


@contextlib.contextmanager
def defer_preemption() -> Iterator[None]:
    """Context manager: within it SIGTERM only sets a flag, for `PreemptionSync`; at its end the process exits.

    Yields:
      Nothing.
    """
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    if _preemption_requested:
        _exit_now("SIGTERM received: completed work is kept")


class PreemptionSync:
    """Whether any process has received SIGTERM; all processes get the same answer.

    Call it once per step: it returns True on every process if any had received SIGTERM by the previous step. The lag of
    one step hides the all-reduce.

    Args:
      mesh: over all devices of the run.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, jax.P(mesh.axis_names))
        self._any = jax.jit(jnp.any)
        self._pending: jax.Array | None = None

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return _preemption_requested
        previous = self._pending
        local_flag = np.array([_preemption_requested])
        flags = jax.make_array_from_callback((self._sharding.num_devices,), self._sharding, lambda _: local_flag)
        self._pending = self._any(flags)
        return previous is not None and bool(previous)


def exit_for_restart(progress: str) -> NoReturn:
    """Exits with `EXIT_RESTART`; every process calls this at the same step.

    Args:
      progress: what is saved, for the line on stderr: "step 300 is saved".
    """
    print(f"SIGTERM received: {progress}; run the same command to resume", file=sys.stderr, flush=True)
    sys.exit(EXIT_RESTART)


def _on_sigterm(*_: object) -> None:
    global _preemption_requested
    _preemption_requested = True
    if not _deferring:
        _exit_now("SIGTERM received: completed work is kept")


def _exit_now(reason: str) -> NoReturn:
    """Exits without waiting for other processes, which may be gone."""
    process = f"process {distributed.global_state.process_id}: " if distributed.global_state.num_processes > 1 else ""
    print(f"{process}{reason}\nRun the same command to resume; exit code {EXIT_RESTART}.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_RESTART)
