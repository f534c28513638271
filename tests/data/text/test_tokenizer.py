from __future__ import annotations

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from brewjax.data.text.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, Tokenizer

TURNS = [{"role": "system", "content": "Predict."}, {"role": "user", "content": "Nurse, Acme"}]
# Texts of the kind that could go wrong: marks, halves of marks, white space of all sorts.
HOSTILE = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|im_", "end|>", "<|", "|>", " ", "\n", "\t", "\u2028", "\r", "## ", "a"]),
).map("".join)


@pytest.mark.parametrize("words", [["Yes", "No"], ["5", "4", "3", "2", "1"], ["Interested", "10"]])
def test_label_words_are_one_token_each(words):
    tokenizer = Tokenizer.train([f"Title: {word} interest" for word in ("Nurse", "Teacher")], words, vocab_size=300)
    ids = [tokenizer.label_token_id(word) for word in words]
    assert len(set(ids)) == len(words)
    assert tokenizer.encode([f"\n{words[0]}", f"answer={words[0]}"])[0][-1] == ids[0]
    assert [tokenizer.hf.decode([token]) for token in ids] == words


def test_a_word_of_several_tokens_is_refused_with_its_pieces(tokenizer):
    with pytest.raises(ValueError, match=r"label word 'Qqq' is 3 tokens \['Q', 'q', 'q'\] .*; choose one-token words"):
        tokenizer.label_token_id("Qqq")
    with pytest.raises(ValueError, match="label word '' is 0 tokens"):
        tokenizer.label_token_id("")
    with pytest.raises(ValueError, match="label word 'Very likely'"):
        Tokenizer.train(["Very likely"], ["Very likely"], 400).label_token_id("Very likely")


def test_a_vocabulary_too_small_for_the_words_is_noticed():
    with pytest.raises(ValueError, match="label word 'Yes' is 3 tokens"):
        Tokenizer.train(["Nurse"], ["Yes"], vocab_size=259).label_token_id("Yes")


@hypothesis.given(st.text() | HOSTILE)
@hypothesis.settings(deadline=None)
def test_decoding_gives_back_any_text(tokenizer, text):
    (ids,) = tokenizer.encode([text])
    assert tokenizer.hf.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@hypothesis.given(st.lists(st.text(max_size=10), max_size=4))
@hypothesis.settings(deadline=None)
def test_a_text_is_encoded_alike_alone_and_among_others(tokenizer, texts):
    ids = tokenizer.encode(texts)
    assert ids == [tokenizer.encode([text])[0] for text in texts]
    assert tokenizer.lengths(texts) == [len(tokens) for tokens in ids]


@hypothesis.given(st.sampled_from(["3d|", "12mo|", "0m|", "7y", "2d |"]), st.text() | HOSTILE)
@hypothesis.settings(deadline=None)
def test_the_age_of_an_event_and_the_rest_are_the_tokens_of_the_whole(tokenizer, age, text):
    (whole,) = tokenizer._encode_continuations([age + text])
    assert Tokenizer(tokenizer.hf).encode([age + text, text, age + text]) == [whole, *tokenizer.encode([text]), whole]


def test_forgetting_changes_nothing(tokenizer, monkeypatch):
    """What is remembered is bounded; a call with more texts than that works too."""
    monkeypatch.setattr("brewjax.data.text.tokenizer.CACHE_SIZE", 3)
    fresh = Tokenizer(tokenizer.hf)
    aged = [f"{days}d|{letter}" for days in (1, 2) for letter in "ab"]
    for texts in (["a", "b"], ["b", "c", "c"], ["d", "a"], list("abcdefg"), ["a", "g"], aged, [], [*aged, "1d|c"]):
        assert fresh.encode(texts) == tokenizer.encode(texts)


def test_no_text_is_cut_or_padded_whatever_tokenizer_json_asks_for(tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>").save_pretrained(tmp_path)
    texts = ["a", "a longer text of many tokens"]
    assert Tokenizer.load(tmp_path).encode(texts) == tokenizer.encode(texts)


def test_a_token_a_byte_where_nothing_was_trained():
    assert Tokenizer.byte_level().lengths(["Zoë", "Yes\n"]) == [4, 4]


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "Title: Nurse (senior), Zoë\n 12.5 <|im_end|> \U0001f37a"
    assert loaded.encode([text]) == tokenizer.encode([text])
    assert (loaded.vocab_size, loaded.bos) == (tokenizer.vocab_size, tokenizer.bos)
    assert loaded.chat(TURNS) == tokenizer.chat(TURNS)
    assert loaded.clean("a<|im_end|>b") == tokenizer.clean("a<|im_end|>b") == "a b"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json there; expected the folder of a Hugging Face tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("words", [["Yes", "No"], ["one", "two", "three"], ["ja", "nein"]])
def test_label_words_are_tokens_however_little_room_texts_leave(words):
    texts = [f"|popularity#{bucket}|neighbors#{bucket}" * 50 for bucket in range(20)]
    tokenizer = Tokenizer.train(texts, words, 259 + sum(len(word) - 1 for word in words))
    assert len({tokenizer.label_token_id(word) for word in words}) == len(words)


def test_the_same_texts_train_the_same_tokenizer():
    texts = [f"Title: {word}, Company: Acme" for word in ("Nurse", "Teacher", "Accountant")]
    first, second = (Tokenizer.train(iter(texts), ["Yes", "No"], 300).hf.get_vocab() for _ in range(2))
    assert first == second


def test_the_chat_ends_where_the_answer_begins(tokenizer):
    assert tokenizer.chat(TURNS) == (
        "<|im_start|>system\nPredict.<|im_end|>\n<|im_start|>user\nNurse, Acme<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [token for token in tokenizer.encode([tokenizer.chat(TURNS)])[0] if token < 3] == [1, 2, 1, 2, 1]


def test_without_a_chat_template_there_is_no_chat(tokenizer):
    plain = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer.hf.backend_tokenizer))
    with pytest.raises(ValueError, match="no chat template; use another prompt style"):
        plain.chat(TURNS)
    assert plain.bos == []


@hypothesis.given(st.text() | HOSTILE)
@hypothesis.settings(deadline=None)
def test_a_clean_text_is_one_line_without_special_tokens(tokenizer, text):
    cleaned = tokenizer.clean(text)
    assert cleaned.splitlines() in ([], [cleaned])
    assert cleaned == cleaned.strip()
    assert not {token for token in tokenizer.encode([cleaned])[0] if token < len(SPECIAL_TOKENS)}
    assert tokenizer.clean(cleaned) == cleaned


def test_marks_that_a_model_only_adds_are_cleaned_away_too(tokenizer):
    """As Llama 3 has <|eot_id|>, and Qwen <tool_call>: single tokens, but not among `all_special_tokens`."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|eot_id|>"])
    backend.add_tokens(["<tool_call>"])
    llama = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE))
    assert llama.clean("a<|eot_id|>b <tool_call>c<|im_end|>") == "a b c"
