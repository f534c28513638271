"""Several real processes that are one run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(module: str, *arguments: object, folder: Path, processes: int, devices: int = 1) -> list[subprocess.Popen]:
    """`python -m module arguments` as so many processes of so many devices, each with a log in the folder."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    started = []
    for number in range(processes):
        with open(folder / f"log-{number}.txt", "w") as log:
            command = [sys.executable, "-m", module, *map(str, arguments)]
            alone = environment | {"JAX_PROCESS_ID": str(number)}
            started.append(subprocess.Popen(command, cwd=ROOT, env=alone, stdout=log, stderr=log))
    return started


def log(folder: Path, number: int) -> str:
    return (folder / f"log-{number}.txt").read_text()


def finish(folder: Path, processes: list[subprocess.Popen]) -> None:
    for number, process in enumerate(processes):
        assert process.wait() == 0, log(folder, number)
