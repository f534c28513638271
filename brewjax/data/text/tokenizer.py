"""Tokenizers: a byte-level BPE trained on a company's own prompts, or any Hugging Face tokenizer in a folder."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from brewjax.data.text.chat import AS_IT_COMES, ChatTemplate

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CACHE_SIZE = 1 << 17  # texts whose tokens are cached,
MAX_CACHED_CHARACTERS = 1_000  # each of at most so many characters
PIECES = (
    ("## Past jobs\n", "[Age: 2 days]\n"),
    ("[Title: Nurse]\n## Answer\n", "Yes"),
)  # as in prompts
BEGINS = "begins_with_bos"  # key of tokenizer_config.json, because transformers drops its own add_bos_token
BATCH_CHARACTERS = 1 << 16  # characters that are tokenized at a time, in some 20 ms
# What may be merged into tokens: a number in buckets with its name and the mark before it ("|popularity#9"); words,
# numbers and punctuation, as in GPT-2, but no number with the space before it.
WORDS = r"[ |]?\w+#\d+|'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
AGE = re.compile(r"[0-9]+[a-z]+(?=\|)")  # what an event begins with in compact styles, "3d|has viewed|Toy Story"
AGE_PROBES = tuple(f"{age}|{text}" for age in ("3d", "12mo") for text in ("film", "7", " ", "|", "#1", "[", "'s", "é"))
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts, in order, into batches of at most `BATCH_CHARACTERS`; a longer text is a batch of its own."""
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
    """A Hugging Face tokenizer behind the few methods that brewjax needs.

    In the prompt-learning literature a "verbalizer" maps labels to words; here that is `label_token_id`, and
    `Verbalizer` renders data as text (360Brew's use of the word).

    Args:
      hf: a fast tokenizer; its truncation and padding are switched off.
    """

    def __init__(self, hf: PreTrainedTokenizerBase):
        self.hf = hf
        hf.backend_tokenizer.no_truncation()  # many a tokenizer.json sets truncation and padding
        hf.backend_tokenizer.no_padding()
        self._encode_batch = hf.backend_tokenizer.encode_batch_fast
        self._mark = _PrefixMark.detect(hf.backend_tokenizer)
        self._splits_ages = _splits_ages(hf.backend_tokenizer)
        self._cache: dict[str, list[int]] = {}
        self._parts: dict[str, list[int]] = {}  # of texts with an age: the age, and the rest
        self._label_ids: dict[str, int] = {}
        # `all_special_tokens` is incomplete: Llama's <|eot_id|>, for instance, is only among the added tokens.
        special_tokens = sorted({*hf.all_special_tokens, *hf.get_added_vocab()}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special_tokens)) or r"(?!)")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads a folder with a `tokenizer.json`, such as that of a Hugging Face model.

        Args:
          folder: of the tokenizer, or of the model.

        Returns:
          The tokenizer, with the splitting rule of its own file.

        Raises:
          ValueError: the folder has no `tokenizer.json`.
        """
        if not (Path(folder) / "tokenizer.json").is_file():
            raise ValueError(f"{folder}: no tokenizer.json there; expected the folder of a Hugging Face tokenizer")
        # Not AutoTokenizer: next to a config.json it may replace the file's splitting rule by that of a model family.
        return cls(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))

    @classmethod
    def train(cls, texts: Iterable[str], words: Sequence[str], vocab_size: int) -> Tokenizer:
        """Trains a byte-level BPE (as GPT-2's, Radford et al. 2019).

        Args:
          texts: the corpus.
          words: label words, each of which becomes one token.
          vocab_size: number of token ids, of which 259 are the bytes and the special tokens.

        Returns:
          The tokenizer; it depends on the texts alone, in their order.
        """
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        corpus = list(texts)
        # Label words, on lines of their own, are merged first, whatever the texts are: no two bytes of these are beside
        # each other more often than a byte is there at all.
        repeats = 1 + int(np.bincount(np.frombuffer("".join(corpus).encode(), np.uint8), minlength=1).max())
        bpe.train_from_iterator(corpus + [f"\n{word}" * repeats for word in words], trainer)
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
    def byte_level(cls) -> Tokenizer:
        """Makes a tokenizer with one token per byte, for use before one is trained.

        Returns:
          The tokenizer.
        """
        return cls.train([], [], vocab_size=0)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, `tokenizer.json` among them.

        Args:
          folder: is made if it is not there.
        """
        self.hf.save_pretrained(folder)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return len(self.hf)

    @property
    def bos(self) -> list[int]:
        """The ids that a sequence begins with: one or none."""
        none = self.hf.bos_token_id is None or not self.hf.init_kwargs.get(BEGINS, True)
        return [] if none else [self.hf.bos_token_id]

    def follow_own_bos(self) -> None:
        """Sets `bos` to what the tokenizer of an imported model does itself: many define a BOS token and never use it.
        The setting is saved with the tokenizer."""
        self.hf.init_kwargs[BEGINS] = self.hf.bos_token_id in self.hf("")["input_ids"]

    def with_bos(self, ids: list[int]) -> list[int]:
        """Puts BOS in front, unless the ids begin with it already: a chat template may have added it.

        Args:
          ids: of a text's beginning.

        Returns:
          The ids with BOS, or as they are if the tokenizer has none.
        """
        bos = self.bos
        return ids if ids[: len(bos)] == bos else bos + ids

    @property
    def eos(self) -> list[int]:
        """The ids that a text ends with: one or none."""
        return [] if self.hf.eos_token_id is None else [self.hf.eos_token_id]

    def without_special_tokens(self) -> Tokenizer:
        """Copies the tokenizer such that special tokens written in a text are ordinary text.

        Returns:
          The copy.
        """
        hf = copy.deepcopy(self.hf)
        hf.backend_tokenizer.encode_special_tokens = True  # as text
        return type(self)(hf)

    def encode(self, texts: Sequence[str], begins: bool = False) -> list[list[int]]:
        """Tokenizes each text. Special tokens written in a text are recognised; none is added.

        Results are cached, because prompts repeat the same items and events. An event's age differs from prompt to
        prompt, so the age and the rest are cached apart.

        Args:
          texts: the texts, tokenized independently.
          begins: whether the texts begin a sequence, rather than continue it. SentencePiece tokenizers mark the
            beginning of a text as they mark a space, and a piece in the middle of a prompt must not get that mark.

        Returns:
          The ids of each text. The lists are shared with the cache: do not change them.
        """
        if begins and self._mark:
            return [encoding.ids for encoding in self._encode_batch(list(texts), add_special_tokens=False)]
        cache = self._cache
        new_texts = [text for text in dict.fromkeys(texts) if text not in cache]
        if len(cache) + len(new_texts) > CACHE_SIZE:
            self._cache = cache = {}  # replaced, not cleared: a concurrent call may be reading it
            new_texts = list(dict.fromkeys(texts))
        new_ids: dict[str, list[int]] = {}
        for batch in batches(new_texts):  # an encoding takes a hundred times the memory of its text
            new_ids |= zip(batch, self._encode_by_age(batch), strict=True)
        cache.update((text, ids) for text, ids in new_ids.items() if len(text) <= MAX_CACHED_CHARACTERS)
        return [new_ids[text] if text in new_ids else cache[text] for text in texts]

    def _encode_by_age(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that continue a sequence; of those with an age, what follows it is looked up."""
        ages = [AGE.match(text) for text in texts] if self._splits_ages else []
        if not any(ages):
            return self._encode_continuations(texts)
        cuts = [age.end() if age and len(age.string) <= MAX_CACHED_CHARACTERS else 0 for age in ages]
        parts = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
        cache = self._parts
        if len(cache) > CACHE_SIZE:
            self._parts = cache = {}
        missing = [part for part in dict.fromkeys(itertools.chain.from_iterable(parts)) if part not in cache]
        cache.update(zip(missing, self._encode_continuations(missing), strict=True))
        return [cache[head] + cache[tail] for head, tail in parts]

    def _encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that continue a sequence."""
        if not self._mark:
            return [encoding.ids for encoding in self._encode_batch(texts, add_special_tokens=False)]
        # Text behind a special token is marked as a beginning by some tokenizers, and not by others.
        ends = [len(text) for text in texts]
        if self._mark.after_special:
            matches = map(self._special.search, texts)
            ends = [match.start() if match else end for match, end in zip(matches, ends, strict=True)]
        heads = [text[:end] for text, end in zip(texts, ends, strict=True)]
        tails = [text[end:] for text, end in zip(texts, ends, strict=True)]
        head_encodings = self._mark.unmarked.encode_batch_fast(heads, add_special_tokens=False)
        tail_encodings = self._encode_batch(tails, add_special_tokens=False)
        return [head.ids + tail.ids for head, tail in zip(head_encodings, tail_encodings, strict=True)]

    def check_pieces(self, pairs: Iterable[tuple[str, str]] = PIECES) -> None:
        """Checks that prompts may be tokenized piece by piece.

        Args:
          pairs: adjacent pieces of prompts.

        Raises:
          ValueError: the tokens of two pieces, joined, are not those of their joined text.
        """
        for text, continuation in pairs:
            [whole_ids], [text_ids] = self.encode([text + continuation], begins=True), self.encode([text], begins=True)
            piece_ids = text_ids + self.encode([continuation])[0]
            if piece_ids != whole_ids:
                whole, pieces = (self.hf.convert_ids_to_tokens(ids) for ids in (whole_ids, piece_ids))
                raise ValueError(
                    f"this tokenizer cannot tokenize prompts piece by piece: {text + continuation!r} is {whole}, but "
                    f"{text!r} and then {continuation!r} are {pieces}"
                )

    @cached_property
    def max_token_bytes(self) -> int:
        """The most bytes of text that a token stands for: those of its name, at most."""
        return max(len(name.encode()) for name in self.hf.get_vocab())

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Counts tokens.

        Args:
          texts: continuations of other text.

        Returns:
          The number of tokens of each.
        """
        return [len(ids) for ids in self.encode(texts)]

    def label_token_id(self, word: str) -> int:
        """Finds the id of a label word that continues a prompt.

        Args:
          word: of a label.

        Returns:
          The token's id.

        Raises:
          ValueError: the word is not exactly one token that decodes to the word, apart from a space in front.
        """
        if word in self._label_ids:
            return self._label_ids[word]
        ids = self.encode([word])[0]
        if len(ids) != 1 or str(self.hf.decode(ids)).removeprefix(" ") != word.removeprefix(" "):
            pieces = self.hf.convert_ids_to_tokens(ids)
            raise ValueError(
                f"label word '{word}' is {len(ids)} tokens {pieces} in this tokenizer; choose one-token words"
            )
        self._label_ids[word] = ids[0]
        return ids[0]

    def clean(self, text: str) -> str:
        """Cleans a value of a table, so that it cannot forge markup.

        Args:
          text: as it is in the table.

        Returns:
          The text on one line, without special tokens.
        """
        return " ".join(self._special.sub(" ", text).split())

    def chat(self, turns: list[dict[str, str]], template: ChatTemplate = AS_IT_COMES) -> str:
        """Renders turns in this tokenizer's chat template, up to where the assistant's answer begins.

        Args:
          turns: `role` and `content` of each turn.
          template: the other variables of the template.

        Returns:
          The text, special tokens written out.

        Raises:
          ValueError: the tokenizer has no chat template, or the template refuses the turns.
        """
        if not self.hf.chat_template:
            raise ValueError("this tokenizer has no chat template; use another prompt style")
        today = datetime.datetime.combine(template.date, datetime.time())
        # Not `apply_chat_template`, which renders every argument as text, functions too.
        arguments: dict[str, Any] = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True}
        arguments |= {"enable_thinking": False, "strftime_now": today.strftime} | self.hf.special_tokens_map
        try:
            return _compile_jinja_template(self.hf.get_chat_template()).render(arguments | template.arguments)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(f"its chat template cannot render the turns of {roles}: {error}") from None


def _splits_ages(backend: tokenizers.Tokenizer) -> bool:
    """Whether no token reaches over the end of an `AGE`, because texts are split into words there before merging."""
    splitter = backend.pre_tokenizer
    if splitter is None:
        return False
    ends = ([span[1] for _, span in splitter.pre_tokenize_str(probe)] for probe in AGE_PROBES)
    return all(probe.index("|") in word_ends for probe, word_ends in zip(AGE_PROBES, ends, strict=True))


class _PrefixMark(NamedTuple):
    """The mark that a tokenizer puts in front of a text, as SentencePiece tokenizers do with a space.

    Attributes:
      unmarked: the same tokenizer without the mark.
      after_special: whether the mark is also put behind every special token.
    """

    unmarked: tokenizers.Tokenizer
    after_special: bool

    @classmethod
    def detect(cls, backend: tokenizers.Tokenizer) -> _PrefixMark | None:
        """Reads the mark from the tokenizer's JSON; None if it has no mark."""
        parts, schemes = json.loads(backend.to_str()), set[str]()

        def remove_mark(part: Any) -> Any:
            kind = part and part["type"]
            if kind == "Sequence":
                [(name, members)] = [(key, value) for key, value in part.items() if key != "type"]
                return part | {name: [member for member in map(remove_mark, members) if member]}
            if kind == "Prepend":
                schemes.add("always")
                return None
            if kind == "Metaspace" and part["prepend_scheme"] != "never":
                schemes.add(part["prepend_scheme"])
                return part | {"prepend_scheme": "never"}
            if kind == "ByteLevel" and part["add_prefix_space"]:
                schemes.add("always")
                return part | {"add_prefix_space": False}
            return part

        bare = parts | {name: remove_mark(parts[name]) for name in ("normalizer", "pre_tokenizer")}
        if not schemes:
            return None
        unmarked = tokenizers.Tokenizer.from_str(json.dumps(bare))
        unmarked.encode_special_tokens = backend.encode_special_tokens  # tokenizer.json does not hold this setting
        return cls(unmarked, "always" in schemes and not backend.encode_special_tokens)
