"""The tokenizers of open families, in small, against what AutoTokenizer makes of them: piece by piece as whole."""

import itertools
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from brewjax.data.text.chat import ChatTemplate, chat_parts
from brewjax.data.text.encode import encode, encode_text
from brewjax.data.text.prompt import Prompt, Question
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.gguf import SPLITS

TEXTS = [f"Title: Nurse, Company: Acme\n- Age: 2 days, Zoë {word} [INST]\n" for word in ("Yes", "No", "Yes No")] * 20
TEXTS += ["\nYes\nNo"] * 200
BYTES = [f"<0x{number:02X}>" for number in range(256)]
PROMPT = Prompt(
    "## Past jobs of Zoë\n",
    ("[Age: 2 days, Title: Nurse]\n", "[Age: 13 days, 界]\n"),
    (
        Question("## Question\nNurse? Acme\n## Answer\n", 0),
        Question("## Question\nTeacher?  Two spaces\n## Answer\n", 1),
    ),
    ("Yes", "No"),
)


def sentencepiece(mark: str) -> tokenizers.Tokenizer:
    """As transformers converts SentencePiece's BPE."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    lines = [text.replace("\n", "(") for text in TEXTS]  # an end of line is a byte there, and merges with nothing
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *model["vocab"]])}
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if mark == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=mark, split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return bpe


def byte_level(split: str, prefix: bool = False) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    bpe.normalizer = normalizers.NFC() if split == "qwen2" else None
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(prefix) if prefix else pre_tokenizers.Sequence(SPLITS[split])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    bpe.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    if split == "llama-bpe":
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return bpe


# By family: its tokenizer, and the class that its tokenizer_config.json names.
FAMILIES = {
    "Llama 2": (sentencepiece("prepend"), "PreTrainedTokenizerFast"),
    "Mistral": (sentencepiece("first"), "LlamaTokenizerFast"),
    "Mixtral": (sentencepiece("always"), "PreTrainedTokenizerFast"),
    "Llama 3": (byte_level("llama-bpe"), "PreTrainedTokenizerFast"),
    "Qwen": (byte_level("qwen2"), "PreTrainedTokenizerFast"),
    "SmolLM2": (byte_level("smollm"), "PreTrainedTokenizerFast"),
    "RoBERTa's": (byte_level("gpt-2", prefix=True), "PreTrainedTokenizerFast"),
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path) -> Path:
    backend, name = FAMILIES[request.param]
    bos = None if request.param == "Qwen" else "<s>"
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
    return tmp_path


def test_pieces_joined_are_the_tokens_of_the_whole_text(folder):
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    ours.follow_own_bos()
    encoded = encode(PROMPT, ours, "dense")
    for number, question in enumerate(PROMPT.questions):
        whole = "".join([PROMPT.preamble, *PROMPT.events, question.text, PROMPT.labels[question.label]])
        pieces = [*encoded.prefix_pieces, encoded.questions[number], [encoded.labels[question.label]]]
        assert list(itertools.chain(*pieces)) == theirs(whole)["input_ids"]
    assert [ours.hf.convert_ids_to_tokens(label) for label in encoded.labels] == ["Yes", "No"]
    assert encode_text("Nurse Yes", ours).tokens == [*theirs("Nurse Yes")["input_ids"], *ours.eos]


LLAMA2 = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no system') }}{% endif %}\
{% endfor %}"""


@pytest.mark.parametrize("family", ["Llama 2", "Mistral", "Mixtral"])
def test_an_answer_in_a_chat_is_the_token_that_the_assistant_says_there(family):
    backend, _ = FAMILIES[family]
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=LLAMA2)
    chat = chat_parts(Tokenizer(hf), ChatTemplate())
    labels = (f"{chat.answer}Yes", f"{chat.answer}No")
    prompt = Prompt(f"{chat.begin}Predict.{chat.user}", (), (Question(f"Nurse{chat.assistant}"),), labels)
    encoded = encode(prompt, Tokenizer(hf), "dense")
    turns = [{"role": "user", "content": "Predict.\n\nNurse"}, {"role": "assistant", "content": "Yes"}]
    whole = hf.apply_chat_template(turns)["input_ids"]
    assert [*encoded.prefix_pieces[0], *encoded.questions[0], encoded.labels[0], *Tokenizer(hf).eos] == whole
    assert hf.convert_ids_to_tokens(encoded.labels) == ["▁Yes", "▁No"]


@pytest.mark.parametrize(
    "text",
    [
        *("Nurse</s>Yes", "</s>Yes", "a <s>b</s> c</s>", "Yes", "", "\nYes", " Yes", "<|tool|>x"),
        *("3d|Nurse|Acme\n", "12mo|7|Zoë", "2h||Yes", "1y|</s>Yes", "5w| Yes", "9m|'s", "4d|"),
    ],
)
def test_a_text_behind_special_tokens_is_as_in_the_whole(folder, text):
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    [begin], [behind] = ours.encode(["Acme:\n"], begins=True), ours.encode([text])
    assert begin + behind == theirs("Acme:\n" + text, add_special_tokens=False)["input_ids"]
    assert ours.encode([text]) == [behind]  # remembered


def test_a_tokenizer_that_strips_its_texts_cannot_be_asked_piece_by_piece():
    backend = byte_level("smollm")
    backend.normalizer = normalizers.Strip()
    with pytest.raises(
        ValueError, match=r"cannot tokenize prompts piece by piece: 'Nurse\\nYes' is .*, but 'Nurse\\n' and then"
    ):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend)).check_pieces([("Nurse\n", "Yes")])


def test_special_tokens_as_text_are_text_wherever_they_stand(folder):
    plain = Tokenizer.load(folder).without_special_tokens()
    special = set(plain.hf.convert_tokens_to_ids(["<s>", "</s>"]))
    start, rest = "Nurse\n", "Yes</s> No<s>Yes"
    [whole] = plain.encode([start + rest], begins=True)
    [first], [behind] = plain.encode([start], begins=True), plain.encode([rest])
    assert not special & {*whole, *behind}
    assert plain.hf.decode(behind).replace(" ", "") == rest.replace(" ", "")
    assert first + behind == whole
