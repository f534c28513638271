"""LoRA: the base never changes, the adapters alone are trained and saved, and merged they are the same model."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr, jaxprs_in_params

from brewjax.aot.program import training_step
from brewjax.model.config import ExpertsConfig
from brewjax.model.params import abstract_params, bind
from brewjax.model.sharding import MeshConfig
from brewjax.model.weights import MATRIX_AXES
from brewjax.train.align import Align
from brewjax.train.loop import TrainConfig, train
from brewjax.train.lora import LoraConfig
from brewjax.train.objectives import supervised
from tests.tiny import MODEL, adapters, batch_of, params, prompt
from tests.train.test_loop import CONFIG, losses, newest_checkpoint, shards

__all__ = ["shards"]  # a fixture
EXPERTS = MODEL.model_copy(update={"experts": ExpertsConfig(num_experts=4)})
REMAT = MODEL.model_copy(update={"remat": True})
LORA = LoraConfig(rank=3, alpha=6.0)


def shapes(tree) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def outputs(jaxpr: Jaxpr) -> Iterator[tuple[int, ...]]:
    """The shapes of all that a program computes, loops and functions within it included."""
    for equation in jaxpr.eqns:
        yield from (getattr(out.aval, "shape", ()) for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from outputs(inner)


@pytest.mark.parametrize("model", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_merged_weights_are_the_definition(model):
    """W + (alpha / rank) A B of each layer, and of each of its experts, as plain matrices."""
    base, learnt = params(model), adapters(LORA, model)
    merged = jax.jit(LORA.merge)(base, learnt)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    below = (lambda tree: tree["layers"]["experts"]) if model is EXPERTS else (lambda tree: tree["layers"])
    for name, (inputs, outputs) in MATRIX_AXES.items():
        at = below if name in below(base) else (lambda tree: tree["layers"])
        before, after, pair = (at(tree)[name] for tree in (base, merged, learnt))
        stack = before.ndim - inputs - outputs
        for index in np.ndindex(before.shape[:stack]):
            rows = int(np.prod(before.shape[stack : stack + inputs]))
            matrix, a, b = (np.float64(x[index]) for x in (before, pair["a"], pair["b"]))
            expected = matrix.reshape(rows, -1) + 2.0 * a.reshape(rows, 3) @ b.reshape(3, -1)
            np.testing.assert_allclose(after[index].reshape(rows, -1), expected, rtol=1e-5, atol=1e-5)
    for name in ("embedding", "norm"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], base[name])


@pytest.mark.parametrize("model", [MODEL, REMAT, EXPERTS], ids=["dense", "remat", "experts"])
def test_loss_and_gradients_are_those_through_merged_weights(model):
    random = np.random.default_rng(0)
    batch = batch_of([[prompt(random), prompt(random, layout="star")] for _ in range(2)], 64)
    base, learnt = params(model), adapters(LORA, model)

    def loss_and_gradients(decoder):
        with jax.set_mesh(MeshConfig().build()):
            return jax.jit(jax.value_and_grad(lambda learnt: supervised(decoder(learnt), batch, {})[0].total))(learnt)

    loss, actual = loss_and_gradients(lambda learnt: LORA.bind(model, base, learnt))
    expected_loss, expected = loss_and_gradients(lambda learnt: bind(model, LORA.merge(base, learnt)))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert shapes(actual) == shapes(expected)
    for grad, expected_grad in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(expected_grad).max() > 0.01
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5 * np.abs(expected_grad).max())


@pytest.mark.parametrize("model", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_a_step_makes_neither_merged_weights_nor_their_gradient(model):
    """Nothing in the whole program has the shape of a stack of matrices; those of the base are given."""
    model = model.model_copy(update={"layers": 5, "remat": True})
    config, mesh = (
        TrainConfig(steps=10, batch_size=3, seq_len=32, gradient_accumulation_steps=3, lora=LORA),
        MeshConfig().build(),
    )
    with jax.set_mesh(mesh):
        step = training_step(model, config, mesh).traced.jaxpr.jaxpr
        full = training_step(model, config.model_copy(update={"lora": None}), mesh).traced.jaxpr.jaxpr
    stacks = shapes(LORA._each(abstract_params(model, mesh), lambda name, weight: weight))
    assert len(stacks) == len(MATRIX_AXES)
    assert not set(stacks.values()) & set(outputs(step))
    assert set(stacks.values()) <= set(outputs(full))  # they would be seen


def test_a_compiled_step_has_no_room_for_them():
    wide = MODEL.model_copy(update={"layers": 8, "d_model": 64, "d_ff": 512, "remat": True})
    config, mesh = TrainConfig(steps=10, batch_size=1, seq_len=32, lora=LORA), MeshConfig().build()
    with jax.set_mesh(mesh):
        memory = training_step(wide, config, mesh).traced.lower().compile().memory_analysis()
    base = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract_params(wide, mesh)["layers"]))
    assert memory.temp_size_in_bytes < base / 2


def test_new_adapters_change_nothing():
    new = LORA.init(abstract_params(MODEL, MeshConfig().build()), seed=0)
    merged = LORA.merge(params(), new)
    jax.tree.map(np.testing.assert_array_equal, merged, params())
    a = new["layers"]["output"]["a"]
    assert a.shape == (MODEL.layers, MODEL.heads, MODEL.head_dim, 3)
    np.testing.assert_allclose(jnp.std(a), (MODEL.heads * MODEL.head_dim) ** -0.5, rtol=0.2)


def test_only_what_is_named_is_adapted():
    named = adapters(LoraConfig(targets=("query", "down")))
    assert {name: set(pair) for name, pair in named["layers"].items()} == {"query": {"a", "b"}, "down": {"a", "b"}}


def test_training_leaves_the_base_alone_and_saves_the_adapters_only(shards, tmp_path):
    base, before = params(), jax.tree.map(np.asarray, params())
    config = CONFIG.model_copy(update={"lora": LORA})
    trained = train(MODEL, config, shards, tmp_path, supervised, init=lambda: base)
    jax.tree.map(np.testing.assert_array_equal, base, before)
    actual = losses(tmp_path)
    assert np.mean([actual[step] for step in range(31, 41)]) < 0.9 * actual[1]
    _, learnt = newest_checkpoint(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, trained, jax.jit(LORA.merge)(base, learnt))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained, before)
    assert {name for name, is_so in changed["layers"].items() if is_so is True} == set(MATRIX_AXES)
    assert not changed["embedding"]
    again = train(MODEL, config, shards, tmp_path, supervised, init=lambda: base)  # from its last checkpoint
    jax.tree.map(np.testing.assert_array_equal, again, trained)


def test_what_cannot_be_adapted_is_refused(shards, tmp_path):
    config = CONFIG.model_copy(update={"lora": LORA})
    with pytest.raises(ValueError, match=r"train\.lora adapts the weights of a model: there is none to start from"):
        train(MODEL, config, shards, tmp_path, Align())
    wide = params(MODEL.model_copy(update={"head_dim": 10}))
    with pytest.raises(ValueError, match=r"do not fit model 'tiny': .*key.* is \(2, 16, 2, 10, .* not \(2, 16, 2, 8, "):
        train(MODEL, config, shards, tmp_path, Align(), init=lambda: wide)
