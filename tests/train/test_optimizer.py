"""What AdamW may be asked for, and which weights decay."""

import jax
import jax.numpy as jnp
import pytest

from brewjax.config import ConfigError
from brewjax.train.optimizer import OptimizerConfig
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
