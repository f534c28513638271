"""An encoder of a union finds items of its task's dataset, of which alone there are vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.cli_retrieve import app
from brewjax.data.records.contrastive import ContrastiveConfig, MinedNegatives
from brewjax.data.records.example_table import ExampleTable
from brewjax.data.records.provenance import training_examples
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.partition import WHOLE
from brewjax.data.tasks.task import Task
from brewjax.retrieve.encoder import Encoder, EncoderConfig
from brewjax.retrieve.evaluation import search_catalogue
from brewjax.retrieve.mining import mine_negatives
from brewjax.retrieve.queries import select_queries
from tests.data.test_union import make_task, write_network
from tests.retrieve.conftest import PROMPTS
from tests.tiny import MODEL, params


@pytest.fixture(scope="module")
def union(tmp_path_factory) -> Dataset:
    return Dataset.load(write_network(tmp_path_factory.mktemp("network")) / "union")


@pytest.fixture(scope="module")
def task(union) -> Task:
    task = make_task("jobs.", history="jobs.viewed, jobs.applied, posts.viewed, posts.liked")
    return task.model_copy(update={"split": type(task.split)(validation="60%", test="80%")})


@pytest.fixture(scope="module")
def encoder(union, task, tokenizer) -> Encoder:
    model = MODEL.model_copy(update={"vocab_size": 512})
    surfaces = {"network": Surface.fit("network", union, [task])}
    return Encoder(Bundle(model, params(model), tokenizer, PROMPTS, surfaces), EncoderConfig(dimensions=(4, 8)))


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save(folder)
    return folder


def retrieve(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_vectors_are_of_the_items_of_the_task_and_of_all_members(union, folder, tmp_path):
    retrieve("embed", folder, union.path, tmp_path / "items.parquet")
    retrieve("embed", folder, union.path, tmp_path / "members.parquet", "--side", "members")
    assert pq.read_table(tmp_path / "items.parquet")["id"].to_pylist() == [f"jobs.{100 + row}" for row in range(40)]
    assert pq.read_table(tmp_path / "members.parquet")["id"].to_pylist() == [f"m{row}" for row in range(10)]


def test_recall_is_over_the_items_of_the_task(union, task, encoder, folder):
    queries = select_queries(union, task)
    for items in search_catalogue(encoder, union, queries, len(union.items)):
        assert union.items_of("jobs.viewed")[items].all()
    printed = retrieve("evaluate", folder, union.path, "--k", len(union.items))
    for method in ("encoder", "popularity"):  # all that is asked about is found among as many
        (line,) = (line for line in printed.splitlines() if "│ all " in line and f" {method} " in line)
        assert "1.000" in line


def test_mined_negatives_are_items_of_the_task(union, task, encoder, tmp_path):
    mined = MinedNegatives(encoder="of the test", count=3, depth=50)
    config = ContrastiveConfig(max_examples=12, mined_negatives=mined)
    mine_negatives(encoder, union, task, config, mined, tmp_path)
    table = ExampleTable(tmp_path)
    examples = training_examples(union, task, config, WHOLE, config.repeats)
    items = np.concatenate([table.look_up(example) for example in examples])
    assert len(items)
    assert union.items_of("jobs.viewed")[items].all()
