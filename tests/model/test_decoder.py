import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.decoder import Decoder, ModelConfig, PagedKVCache, RMSNorm
from brewjax.model.params import Params, bind, prepare_for_inference
from pallas_kernels.token_labels import ALL, PADDING, TokenLabels
from tests.tiny import MODEL, pack, params, prompt

PARAMS = params()
ROWS, LENGTH = 6, 96


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(model: ModelConfig, params: Params, tokens, positions, token_labels):
    return bind(model, params)(tokens, positions, token_labels)


def run(*rows: tuple[np.ndarray, np.ndarray, TokenLabels]) -> list[np.ndarray]:
    """Hidden states [LENGTH, D] of each row, all of them in one pass of one shape."""
    padded = [*rows, *[rows[0]] * (ROWS - len(rows))]
    batch = jax.tree.map(lambda *row: np.stack(row), *padded)
    return list(np.asarray(hidden_states(MODEL, PARAMS, *batch)))[: len(rows)]


def row(*prompts: EncodedPrompt) -> tuple[np.ndarray, np.ndarray, TokenLabels]:
    return pack(prompts, LENGTH)


def reorder(encoded: EncodedPrompt, order: list[int]) -> EncodedPrompt:
    return dataclasses.replace(
        encoded, questions=[encoded.questions[i] for i in order], answers=[encoded.answers[i] for i in order]
    )


# --- many questions, many examples: one pass


@pytest.mark.parametrize("layout", ["dense", "star"])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(4)))
def test_questions_in_one_pass_read_as_each_alone_in_any_order(layout, seed, order):
    random = np.random.default_rng(seed)
    together = prompt(random, 20, random.integers(1, 9, 5), random.integers(1, 9, 4), layout)
    shuffled = reorder(together, order)
    alone = [reorder(together, [question]) for question in range(4)]
    first, second, *singles = run(row(together), row(shuffled), *map(row, alone))
    expected = np.stack([states[encoded.ends[0]] for states, encoded in zip(singles, alone, strict=True)])
    np.testing.assert_allclose(first[together.ends], expected, atol=1e-5)
    np.testing.assert_allclose(second[shuffled.ends], expected[list(order)], atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_packed_examples_read_as_each_alone(seed):
    random = np.random.default_rng(seed)
    prompts = [
        prompt(random, random.integers(1, 9), random.integers(1, 6, 3), random.integers(1, 5, 3), layout)
        for layout in ("dense", "star", "dense")
    ]
    packed, *alone = run(row(*prompts), *map(row, prompts))
    start = 0
    for encoded, states in zip(prompts, alone, strict=True):
        np.testing.assert_allclose(packed[start : start + len(encoded)], states[: len(encoded)], atol=1e-5)
        start += len(encoded)


def test_one_question_behind_a_dense_history_reads_as_plain_text():
    encoded = prompt(np.random.default_rng(0), questions=[5])
    tokens, _, token_labels = row(encoded)
    plain = (
        tokens,
        np.arange(LENGTH),
        TokenLabels(token_labels.example_id, 0 * token_labels.piece_id, np.full(LENGTH, ALL)),
    )
    as_question, as_text = run(row(encoded), plain)
    np.testing.assert_allclose(as_question[: len(encoded)], as_text[: len(encoded)], atol=1e-5)


def test_a_question_sees_the_whole_history():
    random = np.random.default_rng(0)
    encoded = prompt(random)
    changed = dataclasses.replace(
        encoded, prefix_pieces=[encoded.prefix_pieces[0], [63, 62, 61, 60], *encoded.prefix_pieces[2:]]
    )
    first, second = run(row(encoded), row(changed))
    assert np.abs(first - second)[encoded.ends].max(-1).min() > 1e-3


# --- precision and memory


@functools.partial(jax.jit, static_argnums=0)
def gradients(model: ModelConfig, params: Params, tokens, positions, token_labels):
    return jax.grad(lambda params: jnp.sum(hidden_states(model, params, tokens, positions, token_labels)[..., 0]))(
        params
    )


def test_remat_changes_no_gradient():
    batch = jax.tree.map(lambda x: x[None], pack([prompt(np.random.default_rng(0))], 32))
    stored = gradients(MODEL, PARAMS, *batch)
    recomputed = gradients(MODEL.model_copy(update={"remat": True}), PARAMS, *batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), recomputed, stored)


def test_bfloat16_compute():
    model = MODEL.model_copy(update={"compute_dtype": "bfloat16"})
    encoded = prompt(np.random.default_rng(0))
    batch = jax.tree.map(lambda x: x[None], pack([encoded], 32))
    coarse, exact = (hidden_states(config, PARAMS, *batch)[:, : len(encoded)] for config in (model, MODEL))
    assert coarse.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(coarse), exact, atol=0.1)  # states are of size 1, and bfloat16 has 8 bits


def test_bfloat16_products_are_near_those_of_float32_in_a_pass_and_its_gradients():
    batch = jax.tree.map(lambda x: x[None], pack([prompt(np.random.default_rng(0))], 32))
    exact = hidden_states(MODEL, PARAMS, *batch), gradients(MODEL, PARAMS, *batch)
    with jax.default_matmul_precision("bfloat16"):
        rounded = hidden_states(MODEL, PARAMS, *batch), gradients(MODEL, PARAMS, *batch)

    def distance(x, y):
        assert x.dtype == y.dtype == jnp.float32
        return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

    distances = jax.tree.leaves(jax.tree.map(distance, rounded, exact))
    assert min(distances) > 0
    assert max(distances) < 2**-5  # of sums of a few hundred products, each off by up to 2^-8


def test_weights_rounded_once_give_the_bits_of_weights_rounded_in_every_pass():
    batch = jax.tree.map(lambda x: x[None], pack([prompt(np.random.default_rng(0))], 32))
    assert prepare_for_inference(PARAMS)["layers"]["gate"] is PARAMS["layers"]["gate"]  # float32 in these tests
    with jax.default_matmul_precision("bfloat16"):
        rounded = prepare_for_inference(PARAMS)
        assert rounded["layers"]["gate"].dtype == jnp.uint16
        assert rounded["embedding"] is PARAMS["embedding"]
        once, every_pass = (hidden_states(MODEL, weights, *batch) for weights in (rounded, PARAMS))
    np.testing.assert_array_equal(once, every_pass)


@pytest.mark.parametrize("weights", ["bfloat16", "e4m3", "int8"])
def test_no_pass_makes_a_copy_of_the_weights_of_all_layers_in_another_dtype(weights):
    batch = jax.tree.map(lambda x: x[None], pack([prompt(np.random.default_rng(0))], 32))
    changed = {"param_dtype": "bfloat16"} if weights == "bfloat16" else {"quantized": {"dtype": weights}}
    model = ModelConfig.model_validate(MODEL.model_dump() | changed)
    stored = params(model)
    prepared = prepare_for_inference(stored)
    np.testing.assert_array_equal(hidden_states(model, prepared, *batch), hidden_states(model, stored, *batch))
    program = hidden_states.lower(model, prepared, *batch).compile().as_text()
    shape = ",".join(map(str, PARAMS["layers"]["gate"].shape))
    assert len({*re.findall(rf"(\w+)\[{shape}\]", program)}) == 1


def test_logits_of_bfloat16_states_are_float32():
    model = MODEL.model_copy(update={"compute_dtype": "bfloat16"})
    states = jnp.asarray(np.random.default_rng(0).standard_normal((5, MODEL.d_model)), jnp.bfloat16)
    logits = bind(model, PARAMS).logits(states)
    assert logits.dtype == jnp.float32
    exact = np.float64(states) @ np.float64(PARAMS["embedding"]).T
    np.testing.assert_allclose(logits, exact, atol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32():
    norm = RMSNorm(MODEL, MODEL.d_model)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 50, MODEL.d_model)), jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


# --- errors


def test_heads_must_be_a_multiple_of_kv_heads():
    with pytest.raises(pydantic.ValidationError, match=r"heads \(4\) must be a multiple of kv_heads \(3\)"):
        ModelConfig(**MODEL.model_dump() | {"kv_heads": 3})


def test_a_decoder_needs_a_vocabulary():
    with pytest.raises(ValueError, match="model 'tiny': vocab_size must be given"):
        Decoder(MODEL.model_copy(update={"vocab_size": 0}), nnx.Rngs(0))


def test_heads_must_have_halves_to_rotate():
    with pytest.raises(pydantic.ValidationError, match="head_dim"):
        ModelConfig(**MODEL.model_dump() | {"head_dim": 7})


# --- going on after keys and values computed before

PAGE = 8


@functools.partial(jax.jit, static_argnums=0)
def extended(model: ModelConfig, params: Params, tokens, positions, token_labels, past: PagedKVCache):
    return bind(model, params).forward_with_cache(tokens, positions, token_labels, past)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), layout=st.sampled_from(["dense", "star"]))
def test_questions_after_a_cached_prefix_read_as_behind_it(seed, layout):
    random = np.random.default_rng(seed)
    encoded = prompt(random, random.integers(1, 9), random.integers(1, 9, 3), random.integers(1, 6, 3), layout)
    tokens, positions, token_labels = row(encoded)
    (whole,) = run((tokens, positions, token_labels))
    ends, room = encoded.prefix_length, 5 * PAGE

    def prefix(labels: np.ndarray) -> np.ndarray:
        return np.where(np.arange(room) < ends, labels[:room], PADDING)[None]

    def questions(labels: np.ndarray) -> np.ndarray:
        return np.pad(labels[ends:], (0, ends), constant_values=PADDING)[None]

    size = (MODEL.layers, 11, PAGE, MODEL.kv_heads, MODEL.head_dim)
    poison = jnp.full(size, jnp.nan)  # what no page holds
    nothing = PagedKVCache(poison, poison, np.zeros((1, 0), np.int32))
    of_prefix = TokenLabels(*map(prefix, token_labels))
    _, keys_values = extended(MODEL, PARAMS, prefix(tokens), prefix(positions), of_prefix, nothing)
    pages = random.permutation(size[1])[None, : room // PAGE]
    pools = [poison.at[:, pages[0]].set(x.reshape(MODEL.layers, -1, *size[2:])) for x in keys_values]
    both = TokenLabels(*(np.concatenate([prefix(x), questions(x)], 1) for x in token_labels))
    hidden, _ = extended(MODEL, PARAMS, questions(tokens), questions(positions), both, PagedKVCache(*pools, pages))
    np.testing.assert_allclose(hidden[0][encoded.ends - ends], whole[encoded.ends], atol=1e-5)
