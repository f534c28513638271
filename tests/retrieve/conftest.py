"""What the tests of retrieval share: the jobs dataset, a task on it, and a tiny encoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.data.prompts.styles import PromptConfig
from brewjax.model.config import ModelConfig
from brewjax.model.sharding import MeshConfig
from brewjax.retrieve.encoder import Encoder, EncoderConfig
from tests.data.conftest import jobs, jobs_with, tokenizer  # noqa: F401 (fixtures)
from tests.evaluate.conftest import task  # noqa: F401 (a fixture)
from tests.tiny import MODEL, params

PROMPTS = PromptConfig(max_tokens=256)


@pytest.fixture(scope="session")
def make_encoder(jobs, tokenizer, task) -> Callable[..., Encoder]:  # noqa: F811
    """Makes an encoder of random weights."""
    surfaces = {"jobs": Surface.fit("jobs", jobs, [task])}

    def make(model: ModelConfig = MODEL, mesh: MeshConfig | None = None, **settings: object) -> Encoder:
        model = model.model_copy(update={"vocab_size": 512})
        bundle = Bundle(model, params(model), tokenizer, PROMPTS, surfaces, mesh=mesh or MeshConfig())
        return Encoder(bundle, EncoderConfig(**{"dimensions": (4, 8), **settings}))

    return make
