"""Training on a toy: every question is answered by its own first token. Run as a script, this file trains on it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from orbax.checkpoint import v1 as ocp

from brewjax.data.loader import TokenBatch, write_shards
from brewjax.data.tokens import EncodedPrompt
from brewjax.model.sharding import MeshConfig
from brewjax.train.loop import NonFiniteError, TrainConfig, train
from brewjax.train.metrics import METRICS, MetricsWriter, read_metrics
from brewjax.train.objectives import supervised
from brewjax.train.optimizer import OptimizerConfig
from tests.tiny import MODEL, prompt

ROOT = Path(__file__).parents[2]
POISON = 60  # a token that only one prompt has
ADAM = OptimizerConfig(learning_rate=0.01, warmup=5)
CONFIG = TrainConfig(steps=60, rows=4, row_tokens=64, optimizer=ADAM, checkpoint_every=5)


def toy(number: int) -> EncodedPrompt:
    random = np.random.default_rng(number)
    one = prompt(random, questions=random.integers(1, 4, 3), layout=("dense", "star")[number % 2])
    questions = [[3 + answer, *rest] for (_, *rest), answer in zip(one.questions, one.answers, strict=True)]
    return dataclasses.replace(one, questions=questions)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prompts = [toy(number) for number in range(200)]
    write_shards(folder, [(one, {"prompt": number}) for number, one in enumerate(prompts)], CONFIG.row_tokens)
    return folder


def losses(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder / METRICS)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # each step once, in order
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    train(MODEL, CONFIG, shards, folder, supervised)
    return folder


def test_loss_falls(finished):
    found = losses(finished)
    assert len(found) == CONFIG.steps
    assert found[1] > 2
    assert np.mean([found[step] for step in range(51, 61)]) < 0.3


if __name__ == "__main__":
    shards, folder, fsdp = sys.argv[1:]
    config = CONFIG.model_copy(update={"mesh": MeshConfig(fsdp=int(fsdp))})
    train(MODEL, config, Path(shards), Path(folder), supervised)
