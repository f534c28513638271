"""Vectors: the same alone and packed, on any mesh, of any family; what they are pooled of; the texts of both sides."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from brewjax.config import ConfigError
from brewjax.data.prompts.sides import SideConfig, Sides
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import example_at
from brewjax.model.config import ExpertsConfig
from brewjax.model.params import bind
from brewjax.retrieve.encoder import Encoder, EncoderConfig
from pallas_kernels.token_labels import ALL, TokenLabels
from tests.data.conftest import moment
from tests.retrieve.conftest import PROMPTS
from tests.tiny import MODEL

FAMILIES = {
    "llama": MODEL,
    "qwen": MODEL.model_copy(update={"qk_norm": True, "qkv_bias": True, "tie_head": False}),
    "experts": MODEL.model_copy(update={"experts": ExpertsConfig(num_experts=4)}),
}


def random_texts(count: int, longest: int = 40) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 500, length).tolist() for length in random.integers(1, longest, count)]


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("llama", "mean"), ("qwen", "last"), pytest.param("experts", "mean", marks=pytest.mark.long)],
)
def test_a_text_has_one_vector_alone_and_packed(make_encoder, family, pooling):
    encoder, texts = make_encoder(FAMILIES[family], pooling=pooling), random_texts(150)
    packed = encoder.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(packed, axis=1), 1, atol=1e-5)
    for number in (0, 149):
        np.testing.assert_allclose(encoder.embed([texts[number]])[0], packed[number], atol=2e-5)
    assert packed.std(0).mean() > 0.05


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_vector_is_pooled_from_the_hidden_states_of_its_tokens(make_encoder, pooling):
    encoder, (text,) = make_encoder(pooling=pooling), random_texts(1, 12)
    tokens = np.array([text])
    labels = TokenLabels(np.ones_like(tokens), np.zeros_like(tokens), np.full_like(tokens, ALL))
    run = jax.jit(lambda params: bind(encoder.bundle.model, params)(tokens, np.arange(len(text))[None], labels))
    hidden = np.asarray(run(encoder.bundle.params), np.float64)[0]
    pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
    for size in (4, 16):
        expected = pooled[:size] / np.linalg.norm(pooled[:size])
        np.testing.assert_allclose(encoder.embed([text], size)[0], expected, atol=1e-5)


def test_a_truncated_vector_is_the_beginning_of_the_whole_one_at_length_1(make_encoder):
    encoder, texts = make_encoder(), random_texts(2, 20)
    whole, short = encoder.embed(texts), encoder.embed(texts, 4)
    np.testing.assert_allclose(short, whole[:, :4] / np.linalg.norm(whole[:, :4], axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(ValueError, match=r"dimensions 5: this encoder's vectors have 4, 8, 16"):
        encoder.embed(texts, 5)


def test_bad_texts_are_named(make_encoder):
    encoder = make_encoder(MODEL.model_copy(update={"max_seq_len": 8}))
    with pytest.raises(ValueError, match="text 2 is empty"):
        encoder.embed([[3], []])
    with pytest.raises(ValueError, match=r"text 1 has 9 tokens; model 'tiny' reads at most 8"):
        encoder.embed([[3] * 9])
    assert encoder.embed([]).shape == (0, 16)


def test_an_encoder_goes_through_a_folder(make_encoder, jobs, tmp_path):
    encoder = make_encoder(pooling="last", item_instruction="A job.")
    encoder.save(tmp_path / "model")
    loaded = Encoder.load(tmp_path / "model")
    assert loaded.config == encoder.config
    rows, time = np.arange(1), moment(100)
    np.testing.assert_array_equal(loaded.embed_items(jobs, rows, time), encoder.embed_items(jobs, rows, time))
    (tmp_path / "model" / "encoder.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no encoder\.yaml there: a model, but not trained by"):
        Encoder.load(tmp_path / "model")


# --- texts


def make_sides(jobs, tokenizer, task, **settings) -> Sides:
    scales = Scales.fit(jobs, moment(200))
    return Sides(Verbalizer(jobs, scales, tokenizer, PROMPTS.max_tokens), task, PROMPTS, SideConfig(**settings))


def read(tokenizer, tokens: list[int]) -> str:
    return tokenizer.hf.decode(tokens, skip_special_tokens=True)


def test_both_sides_speak_of_one_card_each_with_its_instruction(jobs, tokenizer, task):
    sides, time = make_sides(jobs, tokenizer, task), moment(300)
    (item,) = sides.items(np.array([3]), time)
    text = read(tokenizer, item)
    assert text.startswith("Represent the job.\n")
    assert jobs.item_name(3) in text
    member = read(tokenizer, sides.member(example_at(jobs, task, 7, time)))
    assert member.startswith("Represent the member to find the next job.\n")
    assert "Teacher" in member  # the position of member 7


def test_an_empty_instruction_leaves_the_facts_alone(jobs, tokenizer, task):
    time = moment(300)
    (item,) = make_sides(jobs, tokenizer, task, item_instruction="").items(np.array([3]), time)
    (longer,) = make_sides(jobs, tokenizer, task).items(np.array([3]), time)
    bare = read(tokenizer, item)
    assert bare.startswith(jobs.item_name(3))
    assert read(tokenizer, longer) == f"Represent the job.\n{bare}"


def test_nothing_that_happens_later_is_in_a_text(jobs, jobs_with, tokenizer, task):
    from tests.data.conftest import Event

    events = [Event(0, 1, "viewed", 1, 5), Event(1, 1, "applied", 2, 5)]
    later = [*events, Event(0, 2, "applied", 10, 5), Event(2, 1, "applied", 11, 5)]
    before, after = (make_sides(jobs_with(e), tokenizer, task) for e in (events, later))
    dataset = jobs_with(later)
    time = moment(10)
    assert before.items(np.array([1, 2]), time) == after.items(np.array([1, 2]), time)
    assert before.member(example_at(jobs_with(events), task, 0, time)) == after.member(
        example_at(dataset, task, 0, time)
    )


def test_wrong_instructions_and_tasks_are_refused(task):
    with pytest.raises(ValueError, match=r"only \{member\} and \{item\} can stand in braces"):
        EncoderConfig(item_instruction="The {thing}")
    with pytest.raises(ConfigError, match="no task 'nope'; tasks: apply"):
        EncoderConfig(task="nope").choose({task.name: task})
