from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from brewjax.data.text.encode import NO_TARGET, EncodedPrompt, encode
from brewjax.data.text.prompt import Prompt, Question
from brewjax.data.text.tokenizer import CHAT_TEMPLATE, Tokenizer
from pallas_kernels.token_labels import ALL, QUESTIONS, SELF

TEXT = st.sampled_from(["Title: Nurse\n", "Company: Acme, Skills: Care\n", "a", "[Age: 2 days]\n"])
PROMPTS = st.builds(
    Prompt,
    preamble=st.just("") | TEXT,
    events=st.lists(TEXT, max_size=4).map(tuple),
    questions=st.lists(
        st.builds(Question, TEXT, st.sampled_from([None, 0, 1]), st.sampled_from(["", "## Question"])),
        min_size=1,
        max_size=5,
    ).map(tuple),
    labels=st.just(("Yes", "No")),
)
LAYOUTS = st.sampled_from(["dense", "star"])
either_layout = pytest.mark.parametrize("layout", ["dense", "star"])


def questions_of(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of each question by itself."""
    is_question = arrays["visibility"] == SELF
    numbers = np.unique(arrays["piece_id"][is_question])
    return [
        {name: array[is_question & (arrays["piece_id"] == number)] for name, array in arrays.items()}
        for number in numbers
    ]


def test_a_small_prompt_by_hand():
    encoded = EncodedPrompt([[7, 8], [9], [10, 11]], [[20, 21, 22], [30]], [3, 4], [1, None], "star")
    arrays = encoded.arrays
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "tokens": [7, 8, 9, 10, 11, 20, 21, 22, 30],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7, 5],
        "piece_id": [0, 0, 1, 2, 2, 3, 3, 3, 4],
        "visibility": [ALL, ALL, QUESTIONS, QUESTIONS, QUESTIONS, SELF, SELF, SELF, SELF],
        "targets": [-1, -1, -1, -1, -1, -1, -1, 4, -1],
        "weights": [0, 0, 0, 0, 0, 0, 0, 1, 0],
        "preference": [0] * 9,
    }
    assert all(array.dtype == (np.float32 if name == "weights" else np.int32) for name, array in arrays.items())
    assert encoded.ends.tolist() == [7, 8]
    assert (encoded.prefix_length, len(encoded)) == (5, 9)
    dense = dataclasses.replace(encoded, layout="dense").arrays
    assert dense["visibility"].tolist() == [ALL] * 5 + [SELF] * 4
    assert all((dense[name] == arrays[name]).all() for name in arrays if name != "visibility")


@hypothesis.given(PROMPTS, LAYOUTS)
@hypothesis.settings(deadline=None)
def test_the_tokens_are_the_text_and_nothing_is_lost(tokenizer, prompt, layout):
    encoded = encode(prompt, tokenizer, layout)
    texts = [prompt.preamble, *prompt.events, *(question.heading + question.text for question in prompt.questions)]
    arrays = encoded.arrays
    assert tokenizer.hf.decode(arrays["tokens"]) == "<|endoftext|>" + "".join(texts)
    lengths = tokenizer.lengths(texts)
    assert arrays["piece_id"].tolist() == np.repeat(np.arange(len(texts)), [1 + lengths[0], *lengths[1:]]).tolist()
    assert {len(array) for array in arrays.values()} == {len(encoded)}


@hypothesis.given(PROMPTS, LAYOUTS)
@hypothesis.settings(deadline=None)
def test_a_question_is_the_same_alone_and_among_others(tokenizer, prompt, layout):
    encoded = encode(prompt, tokenizer, layout)
    together = questions_of(encoded.arrays)
    assert len(together) == len(prompt.questions)
    for question, among in zip(prompt.questions, together, strict=True):
        alone = encode(dataclasses.replace(prompt, questions=(question,)), tokenizer, layout)
        (only,) = questions_of(alone.arrays)
        for name in ("tokens", "positions", "visibility", "targets"):
            assert only[name].tolist() == among[name].tolist(), name
        assert among["positions"].tolist() == list(
            range(encoded.prefix_length, encoded.prefix_length + len(among["tokens"]))
        )


@hypothesis.given(PROMPTS, LAYOUTS)
@hypothesis.settings(deadline=None)
def test_loss_is_only_on_the_label_word_after_each_known_question(tokenizer, prompt, layout):
    encoded = encode(prompt, tokenizer, layout)
    targets = encoded.arrays["targets"]
    known = [question.label for question in prompt.questions if question.label is not None]
    assert targets[targets != NO_TARGET].tolist() == [tokenizer.label_token_id(prompt.labels[label]) for label in known]
    assert set(np.flatnonzero(targets != NO_TARGET)) <= set(encoded.ends)


@hypothesis.given(PROMPTS, LAYOUTS, st.integers(1, 80))
@hypothesis.settings(deadline=None)
def test_splitting_loses_nothing_and_keeps_to_the_capacity(tokenizer, prompt, layout, capacity):
    encoded = encode(prompt, tokenizer, layout)
    if encoded.prefix_length + max(map(len, encoded.questions)) > capacity:
        with pytest.raises(
            ValueError, match=f"a prefix of {encoded.prefix_length} tokens and a question of .* {capacity} tokens"
        ):
            encoded.split(capacity)
        return
    parts = encoded.split(capacity)
    assert all(part.questions and len(part) <= capacity for part in parts)
    assert [question for part in parts for question in part.questions] == encoded.questions
    assert [answer for part in parts for answer in part.answers] == encoded.answers
    assert all(
        (part.prefix_pieces, part.labels, part.layout) == (encoded.prefix_pieces, encoded.labels, layout)
        for part in parts
    )
    assert all(len(part) + len(next_part.questions[0]) > capacity for part, next_part in itertools.pairwise(parts))


@either_layout
def test_the_prefix_has_the_reach_of_its_layout(tokenizer, layout):
    prompt = Prompt("Title: Nurse\n", ("a\n", "b\n"), (Question("c\n", 0), Question("d\n")), ("Yes", "No"))
    arrays = encode(prompt, tokenizer, layout).arrays
    event = {"dense": ALL, "star": QUESTIONS}[layout]
    assert [set(arrays["visibility"][arrays["piece_id"] == n]) for n in range(5)] == [
        {ALL},
        {event},
        {event},
        {SELF},
        {SELF},
    ]


def test_a_label_word_of_several_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="label word 'Qqq' is 3 tokens"):
        encode(Prompt("a", (), (Question("b"),), ("Yes", "Qqq")), tokenizer, "dense")


def test_an_empty_question_is_refused(tokenizer):
    with pytest.raises(ValueError, match="question 2 is empty"):
        encode(Prompt("a", (), (Question("b"), Question("")), ("Yes", "No")), tokenizer, "dense")


def test_a_sequence_begins_with_one_bos_even_where_the_chat_template_has_it(tokenizer):
    """As the chat templates of Llama do."""
    backend = tokenizer.hf.backend_tokenizer
    llama = Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|endoftext|>", chat_template="{{ bos_token }}" + CHAT_TEMPLATE
        )
    )
    preamble = llama.chat([{"role": "user", "content": "Nurse"}])
    encoded = encode(Prompt(preamble, (), (Question("b"),), ("Yes", "No")), llama, "dense")
    assert encoded.prefix_pieces[0].count(llama.bos[0]) == 1
    without = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert encode(Prompt("", (), (Question("b"),), ("Yes", "No")), without, "dense").prefix_pieces == [[]]
