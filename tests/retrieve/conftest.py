"""What the tests of retrieval share: the jobs dataset, a task on it, a tiny encoder, and an empty index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.data.prompts.styles import PromptConfig
from brewjax.model.config import ModelConfig
from brewjax.model.sharding import MeshConfig
from brewjax.retrieve import index as index_module
from brewjax.retrieve.encoder import Encoder, EncoderConfig
from brewjax.retrieve.index import Index, IndexConfig
from tests.data.conftest import jobs, jobs_with, tokenizer  # noqa: F401 (fixtures)
from tests.evaluate.conftest import task  # noqa: F401 (a fixture)
from tests.tiny import MODEL, params

PROMPTS = PromptConfig(max_tokens=256)
D = 8  # of an index's vectors


@pytest.fixture(scope="session")
def make_encoder(jobs, tokenizer, task) -> Callable[..., Encoder]:  # noqa: F811
    """Makes an encoder of random weights."""
    surfaces = {"jobs": Surface.fit("jobs", jobs, [task])}

    def make(model: ModelConfig = MODEL, mesh: MeshConfig | None = None, **settings: object) -> Encoder:
        model = model.model_copy(update={"vocab_size": 512})
        bundle = Bundle(model, params(model), tokenizer, PROMPTS, surfaces, mesh=mesh or MeshConfig())
        return Encoder(bundle, EncoderConfig(**{"dimensions": (4, 8), **settings}))

    return make


if jax.local_device_count() > 1:  # what an index does on accelerators, on several devices of a CPU
    index_module._devices = jax.local_devices


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index.create(tmp_path / "index", IndexConfig(dimensions=D))
    yield index
    index.close()


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
