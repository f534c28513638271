import functools

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.experts import Experts, _expert_outputs, _sum_in_chunks
from brewjax.model.params import bind
from pallas_kernels.token_labels import ALL, PADDING, TokenLabels
from tests.tiny import MODEL, params

N, K = 5, 2
CONFIG = MODEL.model_copy(
    update={"layers": 1, "d_ff": 12, "experts": ExpertsConfig(num_experts=N, num_experts_per_tok=K)}
)
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 11))
REAL = np.arange(11) < [[11], [7]]


@functools.cache
def experts(config: ModelConfig = CONFIG) -> Experts:
    """The first layer's."""
    weights = params(config)
    layer = jax.tree.map(lambda leaf: leaf[0], weights["layers"])
    decoder = bind(config, weights | {"layers": layer})
    return decoder.layers.experts


def states(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 11, MODEL.d_model)).astype(np.float32)


@pytest.mark.parametrize("normalize", [True, False])
def test_each_token_goes_through_its_best_experts(normalize):
    module = experts(
        CONFIG.model_copy(
            update={"experts": ExpertsConfig(num_experts=N, num_experts_per_tok=K, norm_topk_prob=normalize)}
        )
    )
    x = states()
    out, _ = module(x, REAL)
    router, gate, up, down = (np.asarray(w[...]) for w in (module.router, module.gate, module.up, module.down))
    for at in np.ndindex(2, 11):
        logits = x[at] @ router
        weights = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-weights)[:K]
        share = weights[best] / (weights[best].sum() if normalize else 1)
        outputs = [(np.asarray(jax.nn.silu(x[at] @ gate[e])) * (x[at] @ up[e])) @ down[e] for e in best]
        np.testing.assert_allclose(out[at], share @ np.array(outputs), atol=1e-5)


def test_a_token_gets_the_same_whatever_stands_beside_it():
    x, mixed = states(), states(1)
    mixed[1, 3] = x[1, 3]
    first, second = (experts()(states, REAL)[0] for states in (x, mixed))
    np.testing.assert_allclose(first[1, 3], second[1, 3], atol=1e-6)


@pytest.mark.long
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=2, max_size=3),
    rows_elsewhere=st.integers(0, 5),
    count=st.integers(1, 12),
)
def test_in_turns_is_as_at_once(sizes, rows_elsewhere, count):
    """Values and gradients, for more, fewer or no rows at all than fit into a turn."""
    random = np.random.default_rng(0)
    R, D, F = sum(sizes) + rows_elsewhere + 1, 4, 6
    x, weight = random.standard_normal((7, D), np.float32), random.standard_normal(R, np.float32)
    shapes = [(len(sizes), D, F)] * 2 + [(len(sizes), F, D)]
    matrices = tuple(random.standard_normal(shape, np.float32) for shape in shapes)
    token, direction = random.integers(0, 7, R), random.standard_normal((7, D), np.float32)
    expert_outputs, sizes = functools.partial(_expert_outputs, None, ()), np.array(sizes)

    def at_once(x, weight, matrices):
        return jnp.zeros((7, D)).at[token].add(expert_outputs(x[token], weight, matrices, sizes))

    def in_chunks(x, weight, matrices):
        whole = (0, -R % count)
        return _sum_in_chunks(expert_outputs, count, x, jnp.pad(weight, whole), matrices, jnp.pad(token, whole), sizes)

    expected, actual = (
        jax.jit(jax.value_and_grad(lambda *args, add=add: jnp.sum(add(*args) * direction), (0, 1, 2)))
        for add in (at_once, in_chunks)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        actual(x, weight, matrices),
        expected(x, weight, matrices),
    )


def test_balance_is_of_the_real_tokens():
    module, x = experts(), states()
    _, balance = module(x, REAL)
    probabilities = np.asarray(jax.nn.softmax(x[REAL] @ np.asarray(module.router[...])))
    chosen = np.argsort(-probabilities)[:, :K]
    share = np.bincount(chosen.ravel(), minlength=N) / len(chosen)
    assert balance == pytest.approx(N * share @ probabilities.mean(0))
    x[~REAL] = 100
    assert module(x, REAL)[1] == balance


def test_the_training_loss_has_the_mean_balance_of_the_layers():
    config = CONFIG.model_copy(
        update={"layers": 2, "experts": ExpertsConfig(num_experts=N, num_experts_per_tok=K, router_aux_loss_coef=0.25)}
    )
    weights = params(config)
    weights["layers"]["experts"]["router"] = jnp.zeros((2, MODEL.d_model, N))  # every expert is as probable
    batch = (
        TOKENS,
        np.broadcast_to(np.arange(11), (2, 11)),
        TokenLabels(np.where(REAL, 1, PADDING), 0 * TOKENS, 0 * TOKENS + ALL),
    )
    hidden, loss = bind(config, weights).forward_with_aux_loss(*batch)
    assert loss == pytest.approx(0.25 * K)
    np.testing.assert_array_equal(hidden, bind(config, weights)(*batch))
    assert bind(MODEL, params(MODEL)).forward_with_aux_loss(*batch)[1] == 0


def test_a_token_cannot_go_through_more_experts_than_there_are():
    with pytest.raises(pydantic.ValidationError, match=r"num_experts_per_tok \(3\) must be at most num_experts \(2\)"):
        ExpertsConfig(num_experts=2, num_experts_per_tok=3)
