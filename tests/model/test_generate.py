import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.model.generate import Generator, SamplingParams, sample
from brewjax.model.params import bind
from pallas_kernels.token_labels import ALL, PADDING, TokenLabels
from tests.tiny import MODEL, params

PARAMS = params()
CONTEXT = 128


@functools.cache
def generator() -> Generator:
    return Generator(MODEL, PARAMS, slots=3, context=CONTEXT)


@jax.jit
def next_token(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """The likeliest, from reading everything anew."""
    real = jnp.arange(CONTEXT)[None] < length
    token_labels = TokenLabels(jnp.where(real, 1, PADDING), jnp.zeros_like(tokens[None]), jnp.full((1, CONTEXT), ALL))
    decoder = bind(MODEL, PARAMS)
    hidden = decoder(tokens[None], jnp.arange(CONTEXT)[None], token_labels)
    return jnp.argmax(decoder.logits(hidden[0, length - 1]))


def recomputed(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_token(np.pad(tokens, (0, CONTEXT - len(tokens))), len(tokens))))
    return tokens[len(prompt) :]


def some_prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(sum(lengths))
    return [random.integers(0, MODEL.vocab_size, length).tolist() for length in lengths]


def test_greedy_text_is_what_reading_everything_anew_says():
    prompts = some_prompts(1, 5, 63, 64, 65, 100, 2, 30)  # more than there are slots
    assert generator().generate(prompts, 28) == [recomputed(prompt, 28) for prompt in prompts]


def test_a_sequence_may_fill_its_slot_to_the_last_token():
    (prompt,) = some_prompts(CONTEXT - 3)
    assert generator().generate([prompt], 3) == [recomputed(prompt, 3)]
    with pytest.raises(ValueError, match="prompt 0: 125 tokens and 4 more do not fit 128"):
        generator().generate([prompt], 4)


def test_text_ends_before_a_stop_token():
    (prompt,) = some_prompts(7)
    (generated,) = generator().generate([prompt], 20)
    stop = generated[5]
    assert generator().generate([prompt], 20, stop=[stop]) == [generated[: generated.index(stop)]]
    assert generator().generate([prompt], 0) == [[]]


def test_a_prefix_goes_on_where_it_ended():
    text_generator = generator()
    head, middle, tail = some_prompts(9, 70, 2)
    prefix = None
    for piece in (head, middle, tail):
        prefix = text_generator.prefill(text_generator.pad(piece), len(piece), prefix)
    slots = text_generator.insert(text_generator.slots(), prefix, 1)
    generated = []
    for _ in range(6):
        slots, tokens = text_generator.step(slots)
        generated.append(int(tokens[1]))
    assert generated == recomputed(head + middle + tail, 6)


def test_nothing_compiles_after_the_warm_up():
    text_generator = Generator(MODEL, PARAMS, slots=2, context=CONTEXT)
    text_generator.warm_up()
    before = text_generator.compilations()
    assert before == 2 * len(text_generator.buckets) + 2
    text_generator.generate(some_prompts(3, 64, 120), 5)
    assert text_generator.compilations() == before


@pytest.mark.parametrize("tokens", [[], [0] * (CONTEXT + 1)])
def test_what_cannot_be_read_is_refused(tokens):
    with pytest.raises(ValueError, match="1 to 128 can be read"):
        generator().pad(tokens)


def test_sampling_draws_by_temperature_among_the_likeliest():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    rows = jnp.tile(logits, (20_000, 1))

    def shares(**how: float) -> np.ndarray:
        sampled = np.asarray(sample(rows, jax.random.key(0), SamplingParams(**how)))
        return np.bincount(sampled, minlength=4) / len(sampled)

    np.testing.assert_array_equal(shares(), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(temperature=1), [0.5, 0.3, 0.15, 0.05], atol=0.02)
    np.testing.assert_allclose(shares(temperature=1, top_k=2), [0.625, 0.375, 0, 0], atol=0.02)
    squared = np.asarray([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.02)


def test_the_same_seed_says_the_same():
    prompts = some_prompts(4, 6)

    def generate(seed: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=1.0, top_k=10)
        return Generator(MODEL, PARAMS, 2, 64, sampling, seed).generate(prompts, 12)

    assert generate(1) == generate(1)
    assert generate(1) != generate(2)
