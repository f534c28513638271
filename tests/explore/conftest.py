"""The jobs dataset with one zookeeper in it, and a model that looks for one thing only: the word in a past event."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.task import Task
from brewjax.explore.explorer import Explorer
from brewjax.model.params import Params
from tests.serve.conftest import APPLY, make_bundle
from tests.tables import put, write_dataset

ZOOKEEPER = 137  # the id of the job, which member m5 has in the history


@pytest.fixture(scope="session")
def jobs(tmp_path_factory) -> Dataset:
    title = put("title", ZOOKEEPER - 100, "Zookeeper")
    return Dataset.load(write_dataset(tmp_path_factory.mktemp("zoo"), items=title))


@pytest.fixture(scope="session")
def task() -> Task:
    return Task.parse(APPLY.replace("job in the", "job. They know what they like. Mind the"))


@pytest.fixture(scope="session")
def bundle(jobs, task, tmp_path_factory) -> Bundle:
    """Random weights, on a mesh as those of every folder."""
    folder = tmp_path_factory.mktemp("model")
    make_bundle(jobs, (task,), max_tokens=1000).save(folder)
    return Bundle.load(folder)


@pytest.fixture(scope="session")
def explorer(bundle, jobs) -> Explorer:
    return Explorer(bundle, jobs)


@pytest.fixture(scope="session")
def planted(bundle, jobs) -> Explorer:
    """Its log-odds of Yes count the Z's that the question can see, and nothing else."""
    cause = {token for token in range(bundle.model.vocab_size) if "Z" in bundle.tokenizer.hf.decode([token])}
    yes, no = (bundle.tokenizer.label_token_id(word) for word in ("Yes", "No"))
    return Explorer(dataclasses.replace(bundle, params=counting(bundle.params, cause, yes, no)), jobs)


def counting(params: Params, cause: set[int], yes: int, no: int) -> Params:
    """Weights by hand: attention is uniform, and carries how many of the tokens are `cause` to the label words."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    params["embedding"][:, 1] = 1
    params["embedding"][list(cause), 0] = 3
    params["embedding"][[yes, no], 2] = 5, -5
    params["norm"]["scale"][:] = 1
    params["layers"]["attention_norm"]["scale"][:] = 1
    params["layers"]["mlp_norm"]["scale"][:] = 1
    params["layers"]["value"][0, 0, :, 0] = 1
    params["layers"]["output"][0, :, 0, 2] = 1
    return jax.tree.map(jnp.asarray, params)


Compiled = Callable[[], int]


@pytest.fixture
def compilations(bundle) -> Compiled:
    """How many programs the bundle's scorer has compiled."""
    return lambda: bundle._own_scorer.compilations()
