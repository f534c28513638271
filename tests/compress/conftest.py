import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.bundle.bundle import Bundle, PromptConfig
from brewjax.data.text.encode import EncodedPrompt
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.model.params import Params, bind
from pallas_kernels.token_labels import TokenLabels
from tests.tiny import MODEL, pack, params, prompt

DEEPER = MODEL.model_copy(update={"layers": 3})


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Nurse", "Teacher", "Berlin"], ["Yes", "No"], vocab_size=300)


@pytest.fixture(scope="session")
def prompts() -> list[EncodedPrompt]:
    """Of different lengths, too many for one row of calibration."""
    random = np.random.default_rng(0)
    return [prompt(random, events=random.integers(1, 9, 4), questions=random.integers(1, 6, 3)) for _ in range(60)]


@pytest.fixture(scope="session")
def bundle(tokenizer) -> Bundle:
    return Bundle(DEEPER, params(DEEPER), tokenizer, PromptConfig())


def hidden(model: ModelConfig, weights: Params, prompts: list[EncodedPrompt]) -> np.ndarray:
    """States behind the last norm, of prompts in rows of 64; what padding says is left out."""
    rows = [pack([encoded], 64) for encoded in prompts]
    tokens, positions = (jnp.asarray(np.stack(part)) for part in list(zip(*rows, strict=True))[:2])
    token_labels = TokenLabels(*(jnp.asarray(np.stack(part)) for part in zip(*(row[2] for row in rows), strict=True)))
    weights = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), weights)
    states = run(model, weights, tokens, positions, token_labels)
    return np.concatenate([np.asarray(state)[: len(encoded)] for state, encoded in zip(states, prompts, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def run(model: ModelConfig, weights: Params, *batch: Any) -> jax.Array:
    return bind(model, weights)(*batch)
