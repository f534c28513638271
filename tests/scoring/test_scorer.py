import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brewjax.data.text.encode import HistoryLayout, encode
from brewjax.data.text.prompt import Prompt, Question
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.model.params import abstract_params, bind
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.passes import Bucket, Chunk, Pass
from brewjax.scoring.scorer import Scorer
from tests.tiny import MODEL, pack, params

ROOT = Path(__file__).parents[2]
BUCKETS = (Bucket(128), Bucket(640), Bucket(3072))
WORDS = ["Nurse", "Teacher", "Acme", "Globex", "Berlin", "Excel", "Age: 2 days", "Title:", "viewed", "jobs:"]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    tokenizer = Tokenizer.train(WORDS, ["Yes", "No"], vocab_size=400)
    model = model_for(tokenizer)
    return Scorer(model, params(model), tokenizer, "dense", BUCKETS)


def model_for(tokenizer: Tokenizer) -> ModelConfig:
    even = tokenizer.vocab_size + tokenizer.vocab_size % 2  # for a mesh that splits it in two
    return MODEL.model_copy(update={"vocab_size": even})


def text(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


def make_prompt(seed: int, questions: int) -> Prompt:
    random = np.random.default_rng(seed)
    return Prompt(
        preamble=text(random, 5),
        events=tuple(text(random, count) for count in random.integers(1, 5, 4)),
        questions=tuple(Question(text(random, count)) for count in random.integers(1, 5, questions)),
        labels=("Yes", "No"),
    )


def score(scorer: Scorer, prompts: list[Prompt], layout: HistoryLayout) -> list[np.ndarray]:
    return scorer.score_encoded([encode(prompt, scorer.tokenizer, layout) for prompt in prompts])


def ask(prompt: Prompt, order) -> Prompt:
    """Only these of the questions, in this order."""
    return dataclasses.replace(prompt, questions=tuple(prompt.questions[at] for at in order))


# --- one pass or many


@pytest.mark.parametrize("layout", ["dense", "star"])
@pytest.mark.parametrize("count", [1, 50, 500])
def test_questions_score_together_as_one_by_one(scorer, count, layout):
    prompt = make_prompt(count, count)
    together = score(scorer, [prompt], layout)[0]
    singles = [encode(ask(prompt, [question]), scorer.tokenizer, layout) for question in range(count)]
    one_by_one = np.concatenate([scorer.score_encoded([single])[0] for single in singles])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    assert count == 1 or together.std(0).min() > 1e-3  # the questions do differ


def test_bfloat16_products_move_scores_a_little(scorer):
    prompt = make_prompt(0, 20)
    exact = score(scorer, [prompt], "dense")[0]
    with jax.default_matmul_precision("bfloat16"):
        rounding = Scorer(scorer.model, scorer.params, scorer.tokenizer, "dense", BUCKETS[1:2])
        together = score(rounding, [prompt, make_prompt(1, 5)], "dense")[0]
        backwards = score(rounding, [ask(prompt, range(19, -1, -1))], "dense")[0][::-1]
    assert 0 < np.abs(together - exact).max() < 0.02
    # The last bit of a sum, which other neighbours may change, may decide how a number is rounded.
    np.testing.assert_allclose(together, backwards, atol=0.02)


@pytest.mark.parametrize("layout", ["dense", "star"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(20)))
def test_questions_score_the_same_in_any_order(scorer, seed, order, layout):
    prompt = make_prompt(seed, 20)
    straight, shuffled = (score(scorer, [variant], layout)[0] for variant in (prompt, ask(prompt, order)))
    np.testing.assert_allclose(shuffled, straight[list(order)], atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 10**6))
def test_prompts_score_together_as_each_alone(scorer, counts, seed):
    prompts = [make_prompt(seed + number, count) for number, count in enumerate(counts)]
    prompts[::3] = [dataclasses.replace(prompt, labels=("No", "A", "Yes")) for prompt in prompts[::3]]
    encoded = [encode(prompt, scorer.tokenizer, ("dense", "star")[at % 2]) for at, prompt in enumerate(prompts)]
    heard: list[int] = []
    together = scorer.score_encoded(encoded, heard.append)
    assert sum(heard) == sum(counts)
    for packed, prompt in zip(together, encoded, strict=True):
        np.testing.assert_allclose(packed, scorer.score_encoded([prompt])[0], atol=1e-5)


def test_a_prompt_longer_than_the_largest_bucket_takes_several_passes(scorer):
    prompt = make_prompt(0, 60)
    small = Scorer(scorer.model, params(scorer.model), scorer.tokenizer, "dense", BUCKETS[:1])
    passes: list[int] = []
    split = small.score_many([prompt], passes.append)[0]
    assert len(passes) > 2
    np.testing.assert_allclose(split, scorer.score(prompt), atol=1e-5)


def test_more_questions_or_labels_than_a_pass_has_places_for(scorer):
    one_token = dataclasses.replace(make_prompt(0, 300), questions=(Question("A"), Question("B")) * 500)
    probabilities = scorer.score(one_token)
    np.testing.assert_allclose(probabilities, np.tile(probabilities[:2], (500, 1)), atol=1e-5)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    prompts = [dataclasses.replace(make_prompt(0, 2), labels=tuple(word)) for word in (letters, letters.lower())]
    for packed, prompt in zip(scorer.score_many(prompts), prompts, strict=True):
        np.testing.assert_allclose(packed, scorer.score(prompt), atol=1e-5)


def test_prompts_score_the_same_on_a_mesh(scorer, tmp_path):
    scorer.tokenizer.save(tmp_path)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    subprocess.run([sys.executable, "-m", "tests.scoring.test_scorer", tmp_path], cwd=ROOT, env=environment, check=True)
    expected = np.concatenate(scorer.score_many(prompts_for_the_mesh()))
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-5)


def prompts_for_the_mesh() -> list[Prompt]:
    """Of which a bucket of 128 tokens takes five passes or more: a full row for each of two devices, and some over."""
    return [make_prompt(seed, 12) for seed in range(6)]


def main(folder: Path) -> None:
    """Scores them on four devices, the weights split over all, the vocabulary over two."""
    tokenizer, mesh = Tokenizer.load(folder), MeshConfig(fsdp=2, tensor=2).build()
    assert (mesh.shape["fsdp"], mesh.shape["tensor"]) == (2, 2)
    model = model_for(tokenizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    scorer = Scorer(model, jax.device_put(params(model), shardings), tokenizer, "dense", BUCKETS[:1], mesh)
    np.save(folder / "scores.npy", np.concatenate(scorer.score_many(prompts_for_the_mesh())))


# --- what a score is


def test_scores_are_the_softmax_of_the_label_logits_where_a_question_ends(scorer):
    prompt = dataclasses.replace(make_prompt(3, 6), labels=("Yes", "A", "No"))
    encoded = scorer.encode(prompt)
    decoder = bind(scorer.model, params(scorer.model))
    tokens, positions, token_labels = pack([encoded], 128)
    hidden = decoder(tokens[None], positions[None], type(token_labels)(*(x[None] for x in token_labels)))
    logits = np.float64(decoder.logits(hidden[0, encoded.ends]))[:, encoded.labels]
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(scorer.score(prompt), expected, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_scores_are_float32_probabilities(scorer, seed, count):
    probabilities = scorer.score(make_prompt(seed, count))
    assert probabilities.shape == (count, 2)
    assert probabilities.dtype == jnp.float32
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)


def test_nothing_is_compiled_after_warm_up(scorer):
    scorer.warm_up()
    warm = scorer.compilations()
    assert warm == 2 * len(BUCKETS)  # each a pass and a head
    for layout in ("dense", "star"):
        for count in (1, 30, 200, 500):
            score(scorer, [make_prompt(count, count), make_prompt(1, 2)], layout)
    assert scorer.compilations() == warm


def test_the_head_over_the_vocabulary_computes_what_is_asked_and_little_more(scorer):
    (bucket,) = buckets = [Bucket(640)]
    cached = Scorer(scorer.model, scorer.params, scorer.tokenizer, "dense", buckets, cache_pages=2)
    cached.warm_up()
    warm = cached.compilations()
    prompt = dataclasses.replace(make_prompt(0, 1), questions=(Question("A"), Question("B"), Question("C")) * 50)
    encoded, results = scorer.encode(prompt), {}
    for count, size in ((1, 32), (32, 32), (33, 128), (150, 160)):
        chunk = Chunk(None, encoded, range(count), 0, encoded.prefix_length)
        running = cached.dispatch([Pass(bucket, [chunk])], "vocabulary")
        assert running.log_probs.shape[1] == size
        ((results[count],),) = cached.collect(running)
    for log_probs in results.values():
        np.testing.assert_allclose(log_probs, results[150][: len(log_probs)], atol=1e-5)
    assert np.unique(results[150].round(4), axis=0).shape == (3, 2)
    assert cached.compilations() == warm


# --- errors name the prompt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": ()}, "prompt 1: no question"),
        ({"labels": ("Yes", "Perhaps not")}, r"prompt 1: label word 'Perhaps not' is \d+ tokens"),
        ({"labels": tuple(map(str, range(33)))}, "prompt 1: 33 labels; at most 32"),
        ({"questions": (Question("Nurse"), Question(""))}, "prompt 1: question 2 is empty"),
        ({"preamble": "Nurse " * 4000}, r"prompt 1: a prefix of \d+ tokens .* do not fit in a row of 3072 tokens"),
    ],
)
def test_errors_name_the_prompt(scorer, change, message):
    passes: list[int] = []
    good = make_prompt(0, 3)
    with pytest.raises(ValueError, match=message):
        scorer.score_many([good, dataclasses.replace(good, **change)], passes.append)
    assert passes == []  # nothing was computed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
