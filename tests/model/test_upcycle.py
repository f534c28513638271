import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.config import ConfigError
from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.params import abstract_params, bind, model_size
from brewjax.model.sharding import MeshConfig
from brewjax.model.upcycle import upcycle
from brewjax.paths import CONFIGS
from pallas_kernels.token_labels import TokenLabels
from tests.tiny import MODEL, pack, params, prompt


def test_an_upcycled_model_says_the_same_at_the_start():
    mesh = MeshConfig().build()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(MODEL, mesh))
    dense = jax.device_put(params(), shardings)
    model, mixed = upcycle(MODEL, dense, ExpertsConfig(num_experts=4, num_experts_per_tok=2), mesh)
    for leaf, expected in zip(jax.tree.leaves(mixed), jax.tree.leaves(abstract_params(model, mesh)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (expected.shape, expected.dtype, expected.sharding)
    router = np.asarray(mixed["layers"]["experts"]["router"])
    assert 0.01 < router.std() < 0.03
    tokens, positions, token_labels = pack([prompt(np.random.default_rng(0))], 32)
    batch = (tokens[None], positions[None], TokenLabels(*(x[None] for x in token_labels)))
    before, after = (
        bind(config, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), weights))(*batch)
        for config, weights in ((MODEL, dense), (model, mixed))
    )
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_what_is_not_dense_or_would_not_say_the_same_is_refused():
    mesh, experts = MeshConfig().build(), ExpertsConfig(num_experts=4)
    with pytest.raises(ConfigError, match="experts: it has experts already"):
        upcycle(MODEL.model_copy(update={"experts": experts}), {}, experts, mesh)
    with pytest.raises(ValueError, match=r"experts.norm_topk_prob: must be true"):
        upcycle(MODEL, {}, ExpertsConfig(num_experts=4, norm_topk_prob=False), mesh)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("brew-xl", 141.8e9, 39.7e9),
        ("brew-large", 47.5e9, 13.1e9),
        ("brew-mini", 8.03e9, 7.5e9),
        ("brew-mini-turbo", 3.21e9, 3.21e9),
        ("brew-nano", 1.24e9, 1.24e9),
        ("smollm2-135m", 134_515_008, 134_515_008),
    ],
)
def test_shipped_models_have_the_sizes_they_say(name, parameters, active):
    config = ModelConfig.load(CONFIGS / "models" / f"{name}.yaml")
    actual = model_size(config)
    assert actual.parameters == pytest.approx(parameters, rel=5e-3)
    assert actual.active == pytest.approx(active, rel=5e-3)
    assert config.name == name
