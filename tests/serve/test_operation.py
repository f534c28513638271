"""The server as a process: how it starts, takes signals and ends; and what it says when it cannot start."""

import concurrent.futures
import dataclasses
import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from brewjax import cli
from brewjax.config import ConfigError
from brewjax.data.tasks.task import Task
from brewjax.serve import Client
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.config import ServeConfig
from brewjax.serve.encoding import RequestEncoder
from tests.serve.serving import CONFIG, TOKEN, ask, eventually, expected, probabilities, refusal
from tests.tiny import params

Code = grpc.StatusCode
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    """A folder with a certificate of localhost, its key, and a token."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "token").write_text(f"{TOKEN}\n")
    certify(folder)
    return folder


def certify(folder: Path) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*command.split(), "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True, stderr=-3)


def command(verb: str, folder: Path, settings: dict[str, object]) -> list[str]:
    """A command line of `brewjax VERB`, with settings for a small server."""
    settings = {
        "host": "localhost",
        "token_buckets": "[256]",
        "max_prefix_tokens": 256,
        "max_candidate_tokens": 256,
        "prefix_cache_gb": 0.01,
        "lame_duck_seconds": 0.3,
    } | settings
    overrides = [f"--set={key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "brewjax", verb, str(folder), *overrides]


class Process:
    """`brewjax serve`, and what it logged; `ready` waits until it answers."""

    def __init__(self, folder: Path, log: Path, **settings: object):
        self._log = log
        with log.open("ab") as file:
            self._child = subprocess.Popen(command("serve", folder, settings), cwd=ROOT, stderr=file)

    def ready(self) -> dict:
        while True:
            if started := [line for line in self.logged() if line["message"] == "ready"]:
                return started[-1]
            assert self._child.poll() is None, self._log.read_text()
            try:
                self._child.wait(0.1)
            except subprocess.TimeoutExpired:
                continue

    def logged(self) -> list[dict]:
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def signal(self, number: int) -> None:
        self._child.send_signal(number)

    def end(self) -> int:
        return self._child.wait(60)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    bundle.save(folder)
    return folder


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


@pytest.mark.long
def test_a_server_compiles_nothing_that_warm_has_compiled(folder, log, processes, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    port = free_port()
    with socket.create_server(("localhost", port)):  # whose port may be taken by a server that runs already
        warm = command("warm", folder, {"port": port, "decode": "false"})
        warmed = subprocess.run(warm, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"{folder}: ready to serve; its programs are in {cache}" in warmed.stdout, warmed.stderr
    programs = {path.name for path in cache.glob("*-cache")}
    assert programs
    processes.append(Process(folder, log, port=port, http_port="null", decode="false"))
    processes[-1].ready()
    assert {path.name for path in cache.glob("*-cache")} == programs


@pytest.mark.long
def test_a_server_from_its_start_to_its_end(folder, secrets, log, processes, bundle, alone):
    """With TLS and a token: what answers without it, reload by SIGHUP, death and restart, and a drain by SIGTERM."""
    cert, port = str(secrets / "cert.pem"), free_port()
    settings = {
        "port": port, "http_port": 0, "tls_cert": cert, "tls_key": secrets / "key.pem", "token_file": secrets / "token",
    }  # fmt: skip
    processes.append(Process(folder, log, **settings))
    ready = processes[-1].ready()
    assert ready["port"] == port
    channel = grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(Path(cert).read_bytes()))
    check_openness(channel, cert, ready["http_port"])
    question = ask(1, 20)
    client = Client(f"localhost:{port}", TOKEN, ca=cert)
    np.testing.assert_allclose(
        probabilities(client.score(question, request_id="request-1")), expected(alone, question), atol=1e-5
    )
    (logged,) = (line for line in processes[-1].logged() if line.get("request_id") == "request-1")
    assert (logged["method"], logged["code"], logged["level"]) == ("Score", "OK", "INFO")
    for token in (None, "open", ""):
        with Client(f"localhost:{port}", token, ca=cert) as stranger:
            assert refusal(stranger.score, question)[0] is Code.UNAUTHENTICATED
            assert refusal(lambda stranger=stranger: list(stranger.stream(question)))[0] is Code.UNAUTHENTICATED

    before = client.describe().model
    dataclasses.replace(bundle, params=params(bundle.model, 1)).save(folder)
    processes[-1].signal(signal.SIGHUP)
    while client.describe().model == before:
        pass
    new = probabilities(client.score(question))
    assert abs(new - expected(alone, question)).max() > 1e-3
    check_new_secrets(processes[-1], secrets, ready, question)

    processes[-1].kill()
    assert refusal(lambda: client.score(question, timeout=2))[0] in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
    processes.append(Process(folder, log, **settings))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        describing = pool.submit(client.describe)  # waits for the server
        assert describing.result().model != before
        np.testing.assert_allclose(probabilities(client.score(question)), new, atol=1e-5)
        check_drain(processes[-1], client, pool, port, cert)
    client.close()
    channel.close()


def check_new_secrets(process: Process, secrets: Path, ready: dict, question: pb.Raw) -> None:
    """SIGHUP takes up another token and another certificate, and refuses what is of no use; then the old ones again."""
    old = {name: (secrets / name).read_bytes() for name in ("token", "cert.pem", "key.pem")}
    (secrets / "token").write_text("another token")
    certify(secrets)
    process.signal(signal.SIGHUP)
    eventually(lambda: any(line["message"] == "tokens and certificate loaded" for line in process.logged()))
    with Client(f"localhost:{ready['port']}", "another token", ca=str(secrets / "cert.pem")) as client:
        assert client.score(question).scores
    trusting = ssl.create_default_context(cafile=str(secrets / "cert.pem"))
    url = f"https://localhost:{ready['http_port']}/metrics"
    for token, status in (("another token", 200), (TOKEN, 401)):
        response = httpx.get(url, verify=trusting, headers={"authorization": f"Bearer {token}"})
        assert response.status_code == status
    (secrets / "token").write_text("")
    process.signal(signal.SIGHUP)
    eventually(lambda: any("tokens and certificate refused" in line["message"] for line in process.logged()))
    assert httpx.get(url, verify=trusting, headers={"authorization": "Bearer another token"}).status_code == 200
    for name, content in old.items():
        (secrets / name).write_bytes(content)
    process.signal(signal.SIGHUP)
    eventually(lambda: httpx.get(url, verify=False, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200)


def check_openness(channel: grpc.Channel, cert: str, http_port: int) -> None:
    """What may be asked without the token, and what may not."""
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    assert refusal(lambda: list(reflection.ServerReflectionInfo(iter([listing]))))[0] is Code.UNAUTHENTICATED
    bearer = [("authorization", f"Bearer {TOKEN}")]
    (answer,) = reflection.ServerReflectionInfo(iter([listing]), metadata=bearer)
    names = {service.name for service in answer.list_services_response.service}
    assert {"brewjax.ranker.v1.Ranker", "grpc.health.v1.Health"} <= names
    with httpx.Client(
        base_url=f"https://localhost:{http_port}", verify=ssl.create_default_context(cafile=cert)
    ) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 401
        body = {"query": [7], "items": [[8]], "label_token_ids": [5]}
        assert http.post("/v1/score", json=body).status_code == 401
        allowed = {"authorization": f"Bearer {TOKEN}"}
        assert http.post("/v1/score", json=body, headers=allowed).status_code == 200


def check_drain(process: Process, client: Client, pool: concurrent.futures.Executor, port: int, cert: str) -> None:
    """What runs is finished, nothing new is taken, and the process ends well."""
    stream = client.stream(ask(1, 6_000))
    first = next(stream)
    rest = pool.submit(list, stream)
    process.signal(signal.SIGTERM)
    with Client(f"localhost:{port}", TOKEN, ca=cert) as late:
        refused = None
        while refused is None:
            try:
                late.score(ask(2, 1), timeout=5)
            except grpc.RpcError as error:
                refused = error.code()
        assert refused in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
    assert probabilities(first, *rest.result()).shape == (6_000, 3)
    assert process.end() == 0
    assert process.logged()[-1]["message"] == "stopped"


# --- what cannot start


@pytest.fixture(scope="module")
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_what_cannot_start_says_why_in_one_message(model_folder, secrets, busy_port, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bad.pem").write_text("no certificate")
    key = f"tls_key={secrets / 'key.pem'}"
    cases = {
        ("portt=1",): "portt: unknown key",
        ("port=-1",): "port: expected at least 0, found -1",
        ("port=70000",): "port: expected less than 65536, found 70000",
        ("token_buckets=[100]",): "token_buckets (100,): lengths are multiples of 128",
        ("token_buckets=[256]",): "max_candidate_tokens 1024 is over the longest of token_buckets (256,)",
        (
            "host=0.0.0.0",
        ): "host 0.0.0.0 can be reached from other machines: give tls_cert and tls_key (or plaintext: true), ",
        ("host=0.0.0.0", f"token_file={secrets / 'token'}"): "host 0.0.0.0 can be reached from other machines",
        (key,): "give both tls_cert and tls_key, or neither",
        (key, f"tls_cert={tmp_path / 'no.pem'}"): "tls_cert: [Errno 2] No such file",
        (key, f"tls_cert={tmp_path / 'bad.pem'}"): "tls_cert: [SSL]",
        (f"token_file={tmp_path / 'empty'}",): "empty holds no token: write one line of ASCII there",
        (f"token_file={tmp_path / 'none'}",): "token_file: [Errno 2] No such file",
        (f"port={busy_port}",): f"port: cannot listen at localhost:{busy_port}: Address already in use",
        (f"http_port={busy_port}",): f"http_port: cannot listen at localhost:{busy_port}: Address already in use",
        ("port=0", "http_port=0", "tasks=[nowhere.yaml]"): "nowhere.yaml: no such file",
        ("port=0", "http_port=0", "prefix_cache_gb=0.0001"): "prefix_cache_gb: 0.0001 GB hold",
    }
    monkeypatch.setattr("brewjax.serve.server.log_as_json", lambda: None)
    monkeypatch.setattr(cli, "device_per_core", lambda: None)  # of the environment of later tests,
    monkeypatch.setattr(cli, "hide_useless_libtpu", lambda: None)  # and of their imports
    for overrides, message in cases.items():
        settings = [word for override in overrides for word in ("--set", override)]
        monkeypatch.setattr(sys, "argv", ["brewjax", "serve", str(model_folder), *settings])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        stderr = capsys.readouterr().err
        assert exit.value.code == 2, stderr
        assert stderr.startswith("error: ")
        assert message in stderr
        assert len(stderr.splitlines()) == 1


def test_a_task_that_cannot_be_asked_is_refused_at_the_start(bundle, tasks, tmp_path):
    path = tmp_path / "odd.yaml"
    tasks[0].model_copy(update={"name": "odd"}).save(path)
    path.write_text(path.read_text().replace("word: 'Yes'", "word: several_words"))
    assert "several_words" in path.read_text()
    with pytest.raises(ValueError, match=r"odd.yaml:\d+: labels.0.word: label word 'several_words' is"):
        RequestEncoder(bundle, "tiny@1", {"jobs": [Task.load(path)]}, CONFIG, 600)


def test_settings_that_are_not_tokens_of_the_model_are_named(bundle):
    for settings, message in (
        ("item_delimiter: 99999", r"serve.yaml:1: item_delimiter: the model's tokens are below"),
        ("rerank: {labels: ['Yes', several words]}", r"serve.yaml:1: rerank.labels.1: label word 'several words' is"),
    ):
        with pytest.raises(ConfigError, match=message):
            RequestEncoder(bundle, "tiny@1", {}, ServeConfig.parse(settings, "serve.yaml"), 600)
