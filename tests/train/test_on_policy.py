"""Distillation on a student's own answers, and of its layers: what is said is what plain decoding says."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from brewjax.data.records.loader import NO_TARGET, TokenBatch
from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.decoder import Decoder
from brewjax.model.params import bind
from brewjax.model.sharding import MeshConfig
from brewjax.train.distill import Distill
from brewjax.train.on_policy import replace_with_student_samples
from tests.tiny import MODEL, batch_of, pack, params, prompt

ASKED = 3  # tokens of a question before its answer
LENGTH = 96
DEEP = MODEL.model_copy(update={"name": "deep", "layers": 5})


def with_answers(seed: int, lengths: list[int], end: int) -> EncodedPrompt:
    """A prompt whose questions are answered in so many tokens, 1 for a label word; whole answers finish with `end`."""
    random = np.random.default_rng(seed)
    encoded = prompt(random, questions=[ASKED + length - 1 for length in lengths])
    answers = [
        [*question[ASKED:], end] if length > 1 else label
        for question, length, label in zip(encoded.questions, lengths, encoded.answers, strict=True)
    ]
    return dataclasses.replace(encoded, answers=answers)


def prompts(end: int = 0) -> list[list[EncodedPrompt]]:
    return [
        [with_answers(0, [4, 1, 2], end), with_answers(1, [1, 5], end)],
        [with_answers(2, [3, 3], end), with_answers(3, [1, 1], end)],
    ]


def decoder(seed: int = 0) -> Decoder:
    return bind(MODEL, params(seed=seed))


@functools.cache
def resampled(end: int = 0, share: float = 1.0, top_k: int = 1) -> tuple[TokenBatch, TokenBatch, np.ndarray]:
    """A batch; the same with the student's own answers, and which targets are theirs."""
    before = batch_of(prompts(end), LENGTH)
    with jax.set_mesh(MeshConfig().build()):
        speak = jax.jit(lambda batch: replace_with_student_samples(decoder(), batch, share, top_k))
        after, is_sampled = speak(jax.tree.map(jnp.asarray, before))
    return before, jax.tree.map(np.asarray, after), np.asarray(is_sampled)


@functools.cache
def _likeliest():
    def likeliest(tokens, positions, token_labels, last):
        return jnp.argmax(decoder().logits(decoder()(tokens, positions, token_labels)[0, last]))

    return jax.jit(likeliest)


def spoken(encoded: EncodedPrompt, number: int) -> list[int]:
    """The likeliest words of an answer, one after the other, of a prompt with that question alone."""
    question, words = encoded.questions[number][:ASKED], []
    for _ in range(len(encoded.questions[number]) - ASKED):
        alone = dataclasses.replace(encoded, questions=[question + words], answers=[None])
        inputs = jax.tree.map(lambda x: jnp.asarray(x)[None], pack([alone], LENGTH))
        with jax.set_mesh(MeshConfig().build()):
            words.append(int(_likeliest()(*inputs, len(alone) - 1)))
    return words


def answers_of(batch: TokenBatch, row: int) -> list[np.ndarray]:
    """Where the targets of each answer in a row stand."""
    places = np.flatnonzero(batch.targets[row] != NO_TARGET)
    of = batch.token_labels.example_id[row, places] * 1000 + batch.token_labels.piece_id[row, places]
    return np.split(places, np.flatnonzero(np.diff(of)) + 1)


def test_it_says_what_decoding_word_by_word_says():
    before, after, is_sampled = resampled()
    for row, both in enumerate(prompts()):
        questions = [(encoded, number) for encoded in both for number in range(len(encoded.questions))]
        for (encoded, number), places in zip(questions, answers_of(before, row), strict=True):
            expected = spoken(encoded, number)
            assert after.tokens[row, places[1:]].tolist() == expected
            assert after.targets[row, places[:-1]].tolist() == expected
            assert is_sampled[row, places].all() == (len(places) > 1)


def test_what_is_no_answer_stays():
    before, after, is_sampled = resampled()
    changes = np.nonzero(after.tokens != before.tokens)
    assert is_sampled[changes[0], changes[1] - 1].all()
    assert (after.targets == before.targets)[~is_sampled].all()
    for name in ("positions", "source", "preference"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_nothing_counts_behind_the_end():
    """The end is what the student says first in answer to the first question."""
    end = spoken(prompts()[0][0], 0)[0]
    before, after, is_sampled = resampled(end)
    first = answers_of(before, 0)[0]
    assert after.targets[0, first[0]] == end
    assert after.weights[0, first].tolist() == [1, 0, 0, 0]
    assert (after.weights[~is_sampled] == before.weights[~is_sampled]).all()


def test_a_share_of_the_answers_is_the_students_own():
    before, _, is_sampled = resampled(share=0.5, top_k=8)
    whole = [places for row in range(2) for places in answers_of(before, row) if len(places) > 1]
    masks = [is_sampled.reshape(-1)[row * LENGTH + places] for row in range(2) for places in answers_of(before, row)]
    assert all(mask.all() or not mask.any() for mask in masks)
    assert 0 < sum(mask.all() for mask in masks) < len(whole)


def test_the_same_batch_is_answered_the_same():
    first, second = resampled(top_k=8)[1], resampled.__wrapped__(top_k=8)[1]
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert (resampled()[1].tokens != first.tokens).any()


def test_its_own_answers_are_judged_by_the_teacher_alone():
    distill = Distill(on_policy_fraction=1.0, top_k=1, kd_weight=0.5)
    before, after, is_sampled = resampled()
    with jax.set_mesh(MeshConfig().build()):
        aux = {"teacher": decoder(1)}
        loss, metrics = jax.jit(lambda batch: distill(decoder(), batch, aux))(jax.tree.map(jnp.asarray, before))
        of_words = jax.jit(lambda batch: Distill()(decoder(), batch, aux)[1])
        expected = of_words(jax.tree.map(jnp.asarray, after))
        labels = of_words(jax.tree.map(jnp.asarray, before._replace(weights=np.where(is_sampled, 0, before.weights))))
    np.testing.assert_allclose(metrics["loss_kd"].total, expected["loss_kd"].total, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_sft"].total, labels["loss_sft"].total, rtol=1e-5)
    np.testing.assert_allclose(loss.total, 0.5 * (metrics["loss_sft"].total + metrics["loss_kd"].total), rtol=1e-5)
    assert loss.weight == after.weights.sum()


# --- layers


def layer_loss(student: Decoder, teacher: Decoder) -> float:
    batch = jax.tree.map(jnp.asarray, batch_of(prompts(), LENGTH))
    with jax.set_mesh(MeshConfig().build()):
        _, metrics = jax.jit(lambda batch: Distill(hidden_state_weight=1.0)(student, batch, {"teacher": teacher}))(
            batch
        )
    return float(metrics["loss_hidden_states"].total / metrics["loss_hidden_states"].weight)


def test_a_layer_is_held_to_the_teachers_at_its_depth():
    """Two layers to the second and the fifth of five: one minus the cosine, over layers and tokens."""
    student, teacher = decoder(), bind(DEEP, params(DEEP, seed=1))
    batch = jax.tree.map(jnp.asarray, batch_of(prompts(), LENGTH))
    inputs = (batch.tokens, batch.positions, batch.token_labels)
    with jax.set_mesh(MeshConfig().build()):
        streams, shown = (
            np.float64(jax.jit(lambda *x, of=of: of.forward_with_hidden_states(*x))(*inputs)[2])
            for of in (student, teacher)
        )
    real = np.asarray(batch.token_labels.example_id) > 0
    cosine = lambda a, b: (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)  # noqa: E731
    expected = np.mean([1 - cosine(streams[n], shown[like])[real] for n, like in ((0, 1), (1, 4))])
    np.testing.assert_allclose(layer_loss(student, teacher), expected, rtol=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_match():
    assert abs(layer_loss(decoder(), decoder())) < 1e-6


def test_streams_of_two_widths_are_refused():
    wide = MODEL.model_copy(update={"name": "wide", "d_model": 24})
    with pytest.raises(ValueError, match="the teacher's is 24 wide, the student's 16"):
        layer_loss(decoder(), bind(wide, params(wide)))


@pytest.mark.parametrize("option", [{"on_policy_fraction": 0.5}, {"hidden_state_weight": 1.0}])
@pytest.mark.parametrize("teacher", ["own_mesh", "cache"])
def test_a_teacher_who_is_elsewhere_is_refused(option, teacher):
    with pytest.raises(pydantic.ValidationError, match=f"needs teacher_placement same_mesh, not {teacher}"):
        Distill(teacher_placement=teacher, **option)
