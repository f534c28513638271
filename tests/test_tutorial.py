"""docs/tutorial.md works as written."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs/tutorial.md"
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def files(text: str) -> Iterator[tuple[str, str]]:
    """Names and contents of the files to write: a name in the first comment, or the last that is quoted before."""
    for block in BLOCK.finditer(text):
        language, content = block.groups()
        if language == "python":
            yield content.split("\n")[0].removeprefix("# "), content
        elif language == "yaml":
            yield re.findall(r"`([\w/.]+\.yaml)`", text[: block.start()])[-1], content


def commands(text: str) -> list[str]:
    return [line for block in BLOCK.finditer(text) if not block[1] for line in block[2].splitlines()]


@pytest.mark.long
def test_the_commands_of_the_tutorial_work_as_written(tmp_path):
    text = TUTORIAL.read_text()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(TUTORIAL.parents[1]),
    }
    for name, content in files(text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        if name.endswith(".py"):
            subprocess.run([sys.executable, name], cwd=tmp_path, env=environment, check=True)
    server = None
    try:
        for command in ["brewjax data check jobs", *commands(text)]:
            if command.endswith("&"):
                server = subprocess.Popen(command.rstrip("& ").split(), cwd=tmp_path, env=environment)
                wait_for_port(9000, server)
                continue
            result = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert not result.returncode, f"{command}\n{result.stdout}{result.stderr}"
    finally:
        if server:
            server.terminate()
            server.wait()
    assert (tmp_path / "runs/jobs/report/report.html").exists()


def wait_for_port(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as connection:
            if not connection.connect_ex(("localhost", port)):
                return
        time.sleep(0.5)
    raise AssertionError(f"no server at port {port}")
