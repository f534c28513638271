"""What the optimisers may be asked for, which weights decay, and what Muon makes of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from brewjax.config import ConfigError
from brewjax.model.sharding import MESH_AXES
from brewjax.model.weights import MATRIX_AXES
from brewjax.train.optimizer import UPDATE_RMS, OptimizerConfig
from tests.tiny import MODEL, params


def test_matrices_decay_and_nothing_else():
    model = MODEL.model_copy(update={"qkv_bias": True, "qk_norm": True, "tie_head": False})
    optimizer = OptimizerConfig(weight_decay=0.5, learning_rate=0.1, warmup=0, schedule="constant").build(10)

    @jax.jit
    def update(weights):
        return optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)[0]

    decayed = {
        jax.tree_util.keystr(path, simple=True)
        for path, x in jax.tree.leaves_with_path(update(params(model)))
        if x.any()
    }
    assert {name.split("layers")[-1] for name in decayed} == {
        *("embedding", "untied_head", "query", "key", "value", "output", "gate", "up", "down")
    }


def random_grads(weights):
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True))


def first_update(optimizer, weights, grads):
    return jax.jit(lambda weights, grads: optimizer.update(grads, optimizer.init(weights), weights)[0])(weights, grads)


def test_muon_makes_the_updates_of_matrices_orthogonal():
    settings = {"learning_rate": 0.1, "warmup": 0, "schedule": "constant", "weight_decay": 0.0}
    weights = params(MODEL)
    grads = random_grads(weights)
    updates = first_update(OptimizerConfig(method="muon", **settings).build(10), weights, grads)
    nadamw = first_update(optax.nadamw(0.1, b2=0.95), weights, grads)
    for name, (inputs, _) in MATRIX_AXES.items():
        for update in np.asarray(updates["layers"][name]):
            matrix = update.reshape(np.prod(update.shape[:inputs]), -1)
            singular_values = np.linalg.svd(matrix, compute_uv=False)
            assert singular_values.min() > 0.5 * singular_values.max()
            np.testing.assert_allclose(np.sqrt((matrix**2).mean()), UPDATE_RMS * 0.1, rtol=0.2)
    np.testing.assert_allclose(updates["embedding"], nadamw["embedding"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("devices", "whole"), [(2, False), (3, True)])
def test_devices_share_the_layers_of_muon_where_they_divide_them(devices, whole):
    mesh = AbstractMesh((devices, *[1] * (len(MESH_AXES) - 1)), MESH_AXES, (AxisType.Explicit,) * len(MESH_AXES))
    weights = params(MODEL)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(OptimizerConfig(method="muon").build(10).init, weights)
    momentum = optax.tree.get(state, "MuonState").mu["layers"]["query"]
    assert momentum.sharding.spec[0] == (None if whole else MESH_AXES)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("b1: 2.0", "b1: expected less than 1, found 2.0"),
        ("b2: -0.1", "b2: expected at least 0"),
        ("b2: .nan", "b2: expected a finite number, found nan"),
        ("learning_rate: .inf", "learning_rate: expected a finite number, found inf"),
        ("learning_rate: 1.0e+39", "learning_rate: expected at most 1"),
        ("weight_decay: .inf", "weight_decay: expected a finite number"),
        ("clip: .inf", "clip: expected a finite number"),
    ],
)
def test_a_number_without_sense_is_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig.parse(setting)
