"""Tokenizers: a byte-level BPE trained on a company's own prompts, or any Hugging Face tokenizer in a folder."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REMEMBERED = 1 << 17  # texts,
LONGEST_REMEMBERED = 1_000  # of at most so many characters
BATCH_CHARACTERS = 1 << 16  # that are tokenised at a time: some 20 ms
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in order, so many at a time that they have `BATCH_CHARACTERS`; a longer one is alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


class Tokenizer:
    """A Hugging Face tokenizer with the few verbs brewjax needs."""

    def __init__(self, hf: PreTrainedTokenizerBase):
        self.hf = hf
        hf.backend_tokenizer.no_truncation()  # which many a tokenizer.json asks for, and padding
        hf.backend_tokenizer.no_padding()
        self._encode_batch = hf.backend_tokenizer.encode_batch_fast
        self._known: dict[str, list[int]] = {}
        # `all_special_tokens` is not all of them: Llama's <|eot_id|>, for one, is only among the added tokens.
        marks = sorted({*hf.all_special_tokens, *hf.get_added_vocab()}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads a folder that holds `tokenizer.json`, as Hugging Face models have it."""
        if not (Path(folder) / "tokenizer.json").is_file():
            raise ValueError(f"{folder}: no tokenizer.json there; expected the folder of a Hugging Face tokenizer")
        # Not AutoTokenizer: beside a config.json it may put a family's own splitting in place of the file's.
        return cls(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))

    @classmethod
    def train(cls, texts: Iterable[str], words: Sequence[str], vocab_size: int) -> Tokenizer:
        """Trains a byte-level BPE (GPT-2's, Radford et al. 2019) in which each of `words` is one token."""
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        corpus = list(texts)
        # A word alone on its line, as often as there are texts, is merged into one token before anything rarer is.
        bpe.train_from_iterator(corpus + [f"\n{word}" for word in words] * max(len(corpus), 100), trainer)
        return cls(
            PreTrainedTokenizerFast(
                tokenizer_object=bpe,
                bos_token=SPECIAL_TOKENS[0],
                eos_token=SPECIAL_TOKENS[0],
                pad_token=SPECIAL_TOKENS[0],
                additional_special_tokens=SPECIAL_TOKENS[1:],
                chat_template=CHAT_TEMPLATE,
            )
        )

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """A token a byte: for text that no tokenizer was trained on yet."""
        return cls.train([], [], vocab_size=0)

    def save(self, folder: str | Path) -> None:
        self.hf.save_pretrained(folder)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return len(self.hf)

    @property
    def bos(self) -> list[int]:
        """The tokens that a sequence begins with: one or none."""
        return [] if self.hf.bos_token_id is None else [self.hf.bos_token_id]

    def begin(self, ids: list[int]) -> list[int]:
        """These ids with what a sequence begins with in front, unless it is there: a chat template may have said it."""
        return ids if ids[: len(self.bos)] == self.bos else self.bos + ids

    @property
    def eos(self) -> list[int]:
        """The tokens that a text ends with: one or none."""
        return [] if self.hf.eos_token_id is None else [self.hf.eos_token_id]

    def without_special_tokens(self) -> Tokenizer:
        """The same tokenizer, but that special tokens written in a text are text like any other."""
        hf = copy.deepcopy(self.hf)
        hf.backend_tokenizer.encode_special_tokens = True  # as text
        return type(self)(hf)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, not to be changed; special tokens written in a text count as such, none is added.

        Remembered: the same items and events are said again and again.
        """
        known = self._known
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if len(known) + len(new) > REMEMBERED:
            self._known = known = {}  # not cleared: another thread may be reading it
            new = list(dict.fromkeys(texts))
        found: dict[str, list[int]] = {}
        for batch in batches(new):  # an encoding takes a hundred times the memory of its text
            encodings = self._encode_batch(batch, add_special_tokens=False)
            found |= {text: encoding.ids for text, encoding in zip(batch, encodings, strict=True)}
        known.update((text, ids) for text, ids in found.items() if len(text) <= LONGEST_REMEMBERED)
        return [found[text] if text in found else known[text] for text in texts]

    @cached_property
    def max_token_bytes(self) -> int:
        """No token stands for more bytes of a text: it has no more than its name."""
        return max(len(name.encode()) for name in self.hf.get_vocab())

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) for ids in self.encode(texts)]

    def word(self, word: str) -> int:
        """The id of a label word; ValueError unless it is exactly one token that reads back as the word."""
        ids = self.encode([word])[0]
        if len(ids) != 1 or self.hf.decode(ids) != word:
            pieces = self.hf.convert_ids_to_tokens(ids)
            raise ValueError(
                f"label word '{word}' is {len(ids)} tokens {pieces} in this tokenizer; choose one-token words"
            )
        return ids[0]

    def clean(self, text: str) -> str:
        """A value from a table, made unable to pass for markup: one line, no special tokens."""
        return " ".join(self._special.sub(" ", text).split())

    def chat(self, turns: list[dict[str, str]]) -> str:
        """The turns in this tokenizer's chat template, up to where the assistant's answer begins."""
        if not self.hf.chat_template:
            raise ValueError("this tokenizer has no chat template; use another prompt style")
        return str(self.hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
