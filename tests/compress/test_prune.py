import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.compress.calibrate import calibrate
from brewjax.compress.prune import LayerReport, PruneConfig, prune
from brewjax.config import ConfigError
from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.params import Params, abstract_params, bind
from brewjax.model.rope import rotary
from brewjax.model.sharding import MeshConfig
from pallas_kernels.token_labels import TokenLabels
from tests.compress.conftest import DEEPER, hidden
from tests.tiny import pack, params, prompt

MIXTURE = DEEPER.model_copy(update={"layers": 2, "experts": ExpertsConfig(num_experts=4, num_experts_per_tok=2)})
BIASED = DEEPER.model_copy(update={"qkv_bias": True, "qk_norm": True})
EXACT = {"damping": 1e-6}  # what is redundant goes without a trace, but for rounding


def with_model(bundle: Bundle, model: ModelConfig, weights: Params | None = None) -> Bundle:
    return dataclasses.replace(bundle, model=model, params=params(model) if weights is None else weights)


def numpy_params(model: ModelConfig) -> Params:
    return jax.tree.map(np.array, params(model))


# --- what is gathered


def test_statistics_are_of_every_token_and_of_no_padding():
    """Against prompts of two lengths, each alone and without padding."""
    random = np.random.default_rng(0)
    prompts = [prompt(random, preamble) for preamble in (6, 6, 9)]
    mesh = MeshConfig().build()
    weights = jax.device_put(params(DEEPER), jax.tree.map(lambda x: x.sharding, abstract_params(DEEPER, mesh)))
    seen = [
        [np.asarray(each, np.float64) for each in layer_activations(params(DEEPER), *alone(encoded))]
        for encoded in prompts
    ]
    inputs, heads, neurons, afters = (np.concatenate(part, 2)[:, 0] for part in zip(*seen, strict=True))
    for number, statistics in enumerate(calibrate(DEEPER, weights, prompts, mesh)):
        X, Y, a, b = heads[number].reshape(-1, 32), neurons[number], inputs[number], afters[number]
        np.testing.assert_allclose(statistics.heads, X.T @ X, rtol=1e-4, atol=1e-4 * np.abs(X.T @ X).max())
        np.testing.assert_allclose(statistics.neurons[0], Y.T @ Y, rtol=1e-4, atol=1e-4 * np.abs(Y.T @ Y).max())
        assert statistics.tokens == sum(map(len, prompts)) == len(X)
        cosines = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(statistics.cosine, np.sum(cosines), rtol=1e-5)
    assert number == 2


def alone(encoded: EncodedPrompt) -> tuple:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], pack([encoded], len(encoded)))


@jax.jit
def layer_activations(
    weights: Params, tokens: jax.Array, positions: jax.Array, token_labels: TokenLabels
) -> tuple[jax.Array, ...]:
    """Of every layer: its input, what the two projections take, its output."""
    decoder = bind(DEEPER, weights)
    x, rotation, actual = decoder.embed(tokens), rotary(positions, DEEPER), []
    for number in range(DEEPER.layers):
        layer = decoder.layer(jnp.int32(number))
        heads, _ = layer.attend(x, rotation, token_labels, None)
        after = layer(x, rotation, token_labels, None)[0]
        actual.append((x, heads, layer.neurons(layer.mlp_norm(layer.add_attention(x, heads))), after))
        x = after
    return tuple(jnp.stack(part) for part in zip(*actual, strict=True))


# --- what is left


@pytest.mark.parametrize("method", ["least_squares", "activation", "magnitude"])
@pytest.mark.parametrize(
    ("targets", "sizes"),
    [
        ({"d_ff": 20, "kv_heads": 1, "layers": 2}, {"d_ff": 20, "kv_heads": 1, "heads": 2, "layers": 2}),
        ({"d_ff": 0.3}, {"d_ff": 10, "kv_heads": 2, "heads": 4, "layers": 3}),
    ],
)
def test_the_smaller_model_is_an_ordinary_one_of_exact_size(bundle, prompts, targets, sizes, method):
    smaller = prune(bundle, iter(prompts), PruneConfig(method=method, **targets))
    assert smaller.model == DEEPER.model_copy(update=sizes)
    expected = abstract_params(smaller.model, MeshConfig().build())
    for leaf, abstract in zip(jax.tree.leaves(smaller.params), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)
    assert np.isfinite(hidden(smaller.model, smaller.params, prompts[:4])).all()
    assert (smaller.tokenizer, smaller.prompts) == (bundle.tokenizer, bundle.prompts)


def kept_of(whole: np.ndarray, left: np.ndarray, axis: int) -> list[int]:
    """Which entries along an axis are left."""
    whole, left = np.moveaxis(whole, axis, 0), np.moveaxis(left, axis, 0)
    return [next(at for at, entry in enumerate(whole) if np.array_equal(entry, row)) for row in left]


@pytest.mark.parametrize("method", ["activation", "magnitude"])
def test_what_goes_is_as_if_it_said_nothing(bundle, prompts, method):
    """Without re-solving, the smaller model is the big one with zeros where the rest was."""
    big = with_model(bundle, BIASED)
    smaller = prune(big, prompts, PruneConfig(d_ff=20, kv_heads=1, layers=2, method=method))
    zeroed, layers, left = numpy_params(BIASED), numpy_params(BIASED)["layers"], smaller.params["layers"]
    stay = kept_of(layers["attention_norm"]["scale"], np.asarray(left["attention_norm"]["scale"]), 0)
    assert len(stay) == 2
    for name in ("output", "down"):
        zeroed["layers"][name][:] = 0
    for place, number in enumerate(stay):
        neurons = kept_of(layers["gate"][number], np.asarray(left["gate"][place]), 1)
        heads = kept_of(layers["query"][number], np.asarray(left["query"][place]), 1)
        assert heads in ([0, 1], [2, 3])
        zeroed["layers"]["down"][number][neurons] = layers["down"][number][neurons]
        zeroed["layers"]["output"][number][heads] = layers["output"][number][heads]
    np.testing.assert_allclose(
        hidden(smaller.model, smaller.params, prompts[:8]), hidden(BIASED, zeroed, prompts[:8]), atol=1e-4
    )


def test_least_squares_loses_least(bundle, prompts):
    shares = {}
    for method in ("least_squares", "activation", "magnitude"):
        reports: list[LayerReport] = []
        prune(bundle, prompts, PruneConfig(d_ff=16, kv_heads=1, method=method), reports.append)
        assert [report.layer for report in reports] == [0, 1, 2]
        shares[method] = np.array([(report.attention, report.mlp) for report in reports])
    for method in ("activation", "magnitude"):
        assert (shares["least_squares"] < shares[method]).all()
    assert shares["least_squares"].min() > 0.01  # random weights: something is lost


def test_a_layer_that_says_nothing_goes_first(bundle, prompts):
    weights = numpy_params(DEEPER)
    for name in ("output", "down"):
        weights["layers"][name][1] = 0
    smaller = prune(with_model(bundle, DEEPER, weights), prompts, PruneConfig(layers=2))
    np.testing.assert_allclose(
        hidden(smaller.model, smaller.params, prompts[:8]), hidden(DEEPER, weights, prompts[:8]), atol=1e-5
    )


def test_doubles_go_without_a_trace(bundle, prompts):
    """Half of the neurons, and of the heads, say what the other half says, each with weights of its own behind it."""
    weights = numpy_params(DEEPER)
    layers = weights["layers"]
    for name in ("gate", "up"):
        layers[name][..., 16:] = layers[name][..., :16]
    for name, half in (("query", 2), ("key", 1), ("value", 1)):
        layers[name][:, :, half:] = layers[name][:, :, :half]
    whole = hidden(DEEPER, weights, prompts[:8])
    smaller, dropped = (
        prune(with_model(bundle, DEEPER, weights), prompts, PruneConfig(d_ff=16, kv_heads=1, method=method, **EXACT))
        for method in ("least_squares", "activation")
    )
    np.testing.assert_allclose(hidden(smaller.model, smaller.params, prompts[:8]), whole, atol=2e-3)
    assert np.abs(hidden(dropped.model, dropped.params, prompts[:8]) - whole).max() > 0.1


# --- experts


def test_the_experts_with_the_most_load_stay(bundle, prompts):
    mesh = MeshConfig().build()
    weights = jax.device_put(params(MIXTURE), jax.tree.map(lambda x: x.sharding, abstract_params(MIXTURE, mesh)))
    loads = np.stack([statistics.load for statistics in calibrate(MIXTURE, weights, prompts, mesh)])
    np.testing.assert_allclose(loads.sum(1), sum(map(len, prompts)), rtol=1e-5)  # a token's weights add up to one
    smaller = prune(with_model(bundle, MIXTURE), prompts, PruneConfig(experts=3, d_ff=24))
    assert smaller.model.experts == ExpertsConfig(num_experts=3, num_experts_per_tok=2)
    for layer, load in enumerate(loads):
        router = np.asarray(weights["layers"]["experts"]["router"][layer])
        left = np.asarray(smaller.params["layers"]["experts"]["router"][layer])
        assert kept_of(router, left, 1) == sorted(np.argsort(-load)[:3])
    assert np.isfinite(hidden(smaller.model, smaller.params, prompts[:4])).all()


@pytest.mark.parametrize("fold", [False, True])
def test_experts_that_say_the_same_go_without_a_trace(bundle, prompts, fold):
    """Each expert is the first with its neurons in another order."""
    weights, random = numpy_params(MIXTURE), np.random.default_rng(1)
    experts = weights["layers"]["experts"]
    for layer in range(2):
        for number in range(1, 4):
            order = random.permutation(32)
            for name in ("gate", "up"):
                experts[name][layer, number] = experts[name][layer, 0][:, order]
            experts["down"][layer, number] = experts["down"][layer, 0][order]
    whole = hidden(MIXTURE, weights, prompts[:8])
    for count in (1, 2):
        smaller = prune(
            with_model(bundle, MIXTURE, weights), prompts, PruneConfig(experts=count, fold_experts=fold, **EXACT)
        )
        assert smaller.model.experts.num_experts_per_tok == min(count, 2)
        np.testing.assert_allclose(hidden(smaller.model, smaller.params, prompts[:8]), whole, atol=1e-3)


def test_experts_that_fold_leave_their_mean(bundle, prompts):
    pruned = {
        fold: prune(with_model(bundle, MIXTURE), prompts, PruneConfig(experts=2, d_ff=16, fold_experts=fold))
        for fold in (False, True)
    }
    dropped, folded = (hidden(smaller.model, smaller.params, prompts[:4]) for smaller in pruned.values())
    assert np.isfinite(folded).all()
    assert np.abs(dropped - folded).max() > 1e-2


def test_doubled_neurons_of_experts_go_without_a_trace(bundle, prompts):
    weights = numpy_params(MIXTURE)
    for name in ("gate", "up"):
        weights["layers"]["experts"][name][..., 16:] = weights["layers"]["experts"][name][..., :16]
    smaller = prune(with_model(bundle, MIXTURE, weights), prompts, PruneConfig(d_ff=16, **EXACT))
    np.testing.assert_allclose(
        hidden(smaller.model, smaller.params, prompts[:8]), hidden(MIXTURE, weights, prompts[:8]), atol=2e-3
    )


# --- what is refused


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"d_ff": 33}, "d_ff: 33 are more than the 32 that model 'tiny' has"),
        ({"kv_heads": 4}, "kv_heads: 4 are more than the 2"),
        ({"experts": 2}, "experts: model 'tiny' is no mixture of experts"),
    ],
)
def test_targets_that_the_model_does_not_have(bundle, targets, message):
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**targets).target(bundle.model)


def test_configs_that_say_nothing_or_nonsense():
    with pytest.raises(ConfigError, match="at least one of layers, kv_heads, d_ff and experts"):
        PruneConfig.parse("method: activation")
    for wrong in ("0", "-1", "1.5"):
        with pytest.raises(ConfigError, match=r"d_ff.*size to keep"):
            PruneConfig.parse(f"d_ff: {wrong}")
    assert PruneConfig.parse("d_ff: 0.5").target(DEEPER).d_ff == 16


def test_nothing_to_calibrate_on(bundle):
    with pytest.raises(ValueError, match="no prompts to calibrate on"):
        prune(bundle, [], PruneConfig(d_ff=16))


def test_the_big_model_is_as_it_was(bundle, prompts):
    before = copy.deepcopy(jax.tree.map(np.asarray, bundle.params))
    prune(bundle, prompts, PruneConfig(d_ff=16, kv_heads=1))
    jax.tree.map(np.testing.assert_array_equal, bundle.params, before)
