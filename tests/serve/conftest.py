"""A model folder that answers two tasks on the jobs dataset, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import example_at
from brewjax.data.tasks.task import Task, load_tasks
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer
from brewjax.serve import Client
from brewjax.serve.config import RerankConfig
from brewjax.serve.server import Server
from tests.serve.serving import ADMIN_TOKEN, CONFIG, TOKEN, eventually, pages_held, running, waiting
from tests.tables import write_dataset
from tests.tiny import MODEL, params

APPLY = """
name: apply
instruction: Predict whether the member applies to the job in the "Question".
history: {actions: [viewed, applied], max_events: 30}
questions: {question: Will the member apply to the following job, actions: [viewed, applied], candidates_per_prompt: 8}
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - {word: "No", value: 0, match: {action: viewed}}
split: {validation: 60%, test: 80%}
"""
VIEW = APPLY.replace("name: apply", "name: view").replace(
    "history: {actions: [viewed, applied]", "history: {actions: [viewed]"
)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    return Dataset.load(write_dataset(tmp_path_factory.mktemp("jobs")))


@pytest.fixture(scope="session")
def tasks(dataset, tmp_path_factory) -> tuple[Task, ...]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in {"apply": APPLY, "view": VIEW}.items():
        (folder / f"{name}.yaml").write_text(text)
    return tuple(load_tasks(sorted(folder.iterdir()), dataset))


@pytest.fixture(scope="session")
def bundle(dataset, tasks) -> Bundle:
    return make_bundle(dataset, tasks)


def make_bundle(dataset: Dataset, tasks: tuple[Task, ...], seed: int = 0, max_tokens: int = 600) -> Bundle:
    surface = Surface.fit("jobs", dataset, tasks)
    by_bytes = Verbalizer(dataset, surface.scales, Tokenizer.byte_level(), 1_000_000)
    texts = [by_bytes.prompt(tasks[0], example_at(dataset, tasks[0], row), "compact").render() for row in range(8)]
    tokenizer = Tokenizer.train(texts, ["Yes", "No"], vocab_size=600)
    model = MODEL.model_copy(update={"vocab_size": tokenizer.vocab_size})
    prompts = PromptConfig(max_tokens=max_tokens)
    return Bundle(model, params(model, seed), tokenizer, prompts, {"jobs": surface})


@pytest.fixture(scope="session")
def model_folder(bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    bundle.save(folder)
    return folder


@pytest.fixture(scope="session")
def server(model_folder, tmp_path_factory) -> Iterator[Server]:
    """One server for all tests: a test that changes it changes it back."""
    base = tmp_path_factory.getbasetemp()
    (base / "admin token").write_text(ADMIN_TOKEN)
    rerank = RerankConfig(labels=("Yes", "No"))
    update = {"admin_token_file": str(base / "admin token"), "reload_below": str(base), "rerank": rerank}
    with running(model_folder, CONFIG.model_copy(update=update)) as server:
        yield server


@pytest.fixture(scope="session")
def client(server) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}", ADMIN_TOKEN) as client:
        yield client


@pytest.fixture(scope="session")
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.http_port}", timeout=60) as http:
        yield http


@pytest.fixture(scope="session")
def strict(model_folder, tmp_path_factory) -> Iterator[Server]:
    """A server that needs a token, with few connections and short time limits."""
    tokens = tmp_path_factory.mktemp("tokens")
    (tokens / "token").write_text(TOKEN)
    (tokens / "admin").write_text(ADMIN_TOKEN)
    update = {
        "token_file": str(tokens / "token"),
        "admin_token_file": str(tokens / "admin"),
        "token_buckets": (256,),
        "max_candidate_tokens": 256,
        "max_prefix_tokens": 256,
        "connections": 8,
        "header_seconds": 0.5,
        "body_seconds": 0.5,
        "keep_alive_seconds": 1.5,
    }
    with running(model_folder, CONFIG.model_copy(update=update)) as server:
        yield server


@pytest.fixture
def strict_http(strict) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{strict.http_port}", timeout=60) as http:
        yield http


@pytest.fixture(scope="session")
def alone(bundle) -> Scorer:
    """The scorer of evaluation, for expected scores."""
    return Scorer(bundle.model, bundle.params, bundle.tokenizer, "dense", [Bucket(256), Bucket(4096)])


@pytest.fixture
def scoring_loop(server):
    """The server's scoring loop, which must be idle after the test."""
    scoring_loop = server.service.scoring_loop
    yield scoring_loop
    eventually(lambda: waiting(scoring_loop) == 0 and pages_held(scoring_loop) == 0)
    eventually(lambda: server.service._num_requests.total() == 0)
