"""LoRA: the base never changes, the adapters alone are trained and saved, and merged they are the same model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.model.config import ExpertsConfig
from brewjax.model.params import abstract_params
from brewjax.model.sharding import MeshConfig
from brewjax.train.align import Align
from brewjax.train.loop import train
from brewjax.train.lora import AXES, LoraConfig
from brewjax.train.objectives import supervised
from tests.tiny import MODEL, params
from tests.train.test_loop import CONFIG, losses, newest_checkpoint, shards

__all__ = ["shards"]  # a fixture
EXPERTS = MODEL.model_copy(update={"experts": ExpertsConfig(count=4)})
LORA = LoraConfig(rank=3, alpha=6.0)


def random_adapters(lora: LoraConfig, model) -> dict:
    random = np.random.default_rng(5)
    shapes = lora.abstract(abstract_params(model, MeshConfig().build()))
    return jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("model", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_merged_weights_are_the_definition(model):
    """W + (alpha / rank) A B of each layer, and of each of its experts, as plain matrices."""
    base, adapters = params(model), random_adapters(LORA, model)
    merged = jax.jit(LORA.merge)(base, adapters)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    below = (lambda tree: tree["layers"]["experts"]) if model is EXPERTS else (lambda tree: tree["layers"])
    for name, (inputs, outputs) in AXES.items():
        at = below if name in below(base) else (lambda tree: tree["layers"])
        before, after, pair = (at(tree)[name] for tree in (base, merged, adapters))
        stack = before.ndim - inputs - outputs
        for index in np.ndindex(before.shape[:stack]):
            rows = int(np.prod(before.shape[stack : stack + inputs]))
            matrix, a, b = (np.float64(x[index]) for x in (before, pair["a"], pair["b"]))
            expected = matrix.reshape(rows, -1) + 2.0 * a.reshape(rows, 3) @ b.reshape(3, -1)
            np.testing.assert_allclose(after[index].reshape(rows, -1), expected, rtol=1e-5, atol=1e-5)
    for name in ("embedding", "norm"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], base[name])


def test_new_adapters_change_nothing():
    adapters = LORA.init(abstract_params(MODEL, MeshConfig().build()), seed=0)
    merged = LORA.merge(params(), adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, params())
    a = adapters["layers"]["output"]["a"]
    assert a.shape == (MODEL.layers, MODEL.heads, MODEL.head_dim, 3)
    np.testing.assert_allclose(jnp.std(a), (MODEL.heads * MODEL.head_dim) ** -0.5, rtol=0.2)


def test_only_what_is_named_is_adapted():
    adapters = random_adapters(LoraConfig(targets=("query", "down")), MODEL)
    assert {name: set(pair) for name, pair in adapters["layers"].items()} == {"query": {"a", "b"}, "down": {"a", "b"}}


def test_training_leaves_the_base_alone_and_saves_the_adapters_only(shards, tmp_path):
    base, before = params(), jax.tree.map(np.asarray, params())
    config = CONFIG.model_copy(update={"lora": LORA})
    trained = train(MODEL, config, shards, tmp_path, supervised, init=base)
    jax.tree.map(np.testing.assert_array_equal, base, before)
    found = losses(tmp_path)
    assert np.mean([found[step] for step in range(31, 41)]) < 0.9 * found[1]
    _, adapters = newest_checkpoint(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, trained, jax.jit(LORA.merge)(base, adapters))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained, before)
    assert {name for name, is_so in changed["layers"].items() if is_so is True} == set(AXES)
    assert not changed["embedding"]
    again = train(MODEL, config, shards, tmp_path, supervised, init=base)  # from its last checkpoint
    jax.tree.map(np.testing.assert_array_equal, again, trained)


def test_what_cannot_be_adapted_is_refused(shards, tmp_path):
    config = CONFIG.model_copy(update={"lora": LORA})
    with pytest.raises(ValueError, match=r"train\.lora adapts the weights of a model: there is none to start from"):
        train(MODEL, config, shards, tmp_path, Align())
    wide = params(MODEL.model_copy(update={"head_dim": 10}))
    with pytest.raises(ValueError, match=r"do not fit model 'tiny': .*key.* is \(2, 16, 2, 10, .* not \(2, 16, 2, 8, "):
        train(MODEL, config, shards, tmp_path, Align(), init=wide)
