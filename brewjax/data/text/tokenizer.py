"""Tokenizers: a byte-level BPE trained on a company's own prompts, or any Hugging Face tokenizer in a folder."""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from brewjax.data.text.chat import AS_IT_COMES, ChatTemplate

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REMEMBERED = 1 << 17  # texts,
LONGEST_REMEMBERED = 1_000  # of at most so many characters
PIECES = (("## Past jobs\n", "[Age: 2 days]\n"), ("[Title: Nurse]\n## Answer\n", "Yes"))  # as prompts have them
BEGINS = "begins_with_bos"  # in a tokenizer_config.json: transformers drops its own add_bos_token
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
        self._mark = _Mark.of(hf.backend_tokenizer)
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
    def byte_level(cls) -> Tokenizer:
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
        none = self.hf.bos_token_id is None or not self.hf.init_kwargs.get(BEGINS, True)
        return [] if none else [self.hf.bos_token_id]

    def follow_own_bos(self) -> None:
        """From now on, and when it is saved, sequences begin with that token only if the tokenizer of a model of others
        puts it there itself; many only have it."""
        self.hf.init_kwargs[BEGINS] = self.hf.bos_token_id in self.hf("")["input_ids"]

    def with_bos(self, ids: list[int]) -> list[int]:
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

    def encode(self, texts: Sequence[str], begins: bool = False) -> list[list[int]]:
        """Token ids of each text, not to be changed; special tokens written in a text count as such, none is added.

        A text `begins` a sequence, or stands behind others: SentencePiece's tokenizers mark the beginning as they mark
        a space, and a piece that goes on from another would get a mark that the whole text has not.

        Remembered: the same items and events are said again and again.
        """
        if begins and self._mark:
            return [encoding.ids for encoding in self._encode_batch(list(texts), add_special_tokens=False)]
        known = self._known
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if len(known) + len(new) > REMEMBERED:
            self._known = known = {}  # not cleared: another thread may be reading it
            new = list(dict.fromkeys(texts))
        fresh: dict[str, list[int]] = {}
        for batch in batches(new):  # an encoding takes a hundred times the memory of its text
            fresh |= zip(batch, self._encode_behind(batch), strict=True)
        known.update((text, ids) for text, ids in fresh.items() if len(text) <= LONGEST_REMEMBERED)
        return [fresh[text] if text in fresh else known[text] for text in texts]

    def _encode_behind(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts behind others."""
        if not self._mark:
            return [encoding.ids for encoding in self._encode_batch(texts, add_special_tokens=False)]
        # What stands behind a special token is marked as a beginning is, or is not.
        ends = [len(text) for text in texts]
        if self._mark.behind_special:
            matches = map(self._special.search, texts)
            ends = [match.start() if match else end for match, end in zip(matches, ends, strict=True)]
        heads = [text[:end] for text, end in zip(texts, ends, strict=True)]
        tails = [text[end:] for text, end in zip(texts, ends, strict=True)]
        head_encodings = self._mark.without.encode_batch_fast(heads, add_special_tokens=False)
        tail_encodings = self._encode_batch(tails, add_special_tokens=False)
        return [head.ids + tail.ids for head, tail in zip(head_encodings, tail_encodings, strict=True)]

    def check_pieces(self, pairs: Iterable[tuple[str, str]] = PIECES) -> None:
        """ValueError unless the tokens of each two pieces, joined, are those of their text."""
        for text, more in pairs:
            [joined], [first] = self.encode([text + more], begins=True), self.encode([text], begins=True)
            [second] = self.encode([more])
            if first + second != joined:
                whole, pieces = (self.hf.convert_ids_to_tokens(ids) for ids in (joined, first + second))
                raise ValueError(
                    f"this tokenizer cannot be asked piece by piece: {text + more!r} is {whole}, but {text!r} and then "
                    f"{more!r} are {pieces}"
                )

    @cached_property
    def max_token_bytes(self) -> int:
        """No token stands for more bytes of a text: it has no more than its name."""
        return max(len(name.encode()) for name in self.hf.get_vocab())

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) for ids in self.encode(texts)]

    def label_token_id(self, word: str) -> int:
        """The id of a label word behind other text; ValueError unless it is exactly one token that reads back as the
        word, but for a space in front."""
        ids = self.encode([word])[0]
        if len(ids) != 1 or str(self.hf.decode(ids)).removeprefix(" ") != word.removeprefix(" "):
            pieces = self.hf.convert_ids_to_tokens(ids)
            raise ValueError(
                f"label word '{word}' is {len(ids)} tokens {pieces} in this tokenizer; choose one-token words"
            )
        return ids[0]

    def clean(self, text: str) -> str:
        """A value from a table, made unable to pass for markup: one line, no special tokens."""
        return " ".join(self._special.sub(" ", text).split())

    def chat(self, turns: list[dict[str, str]], template: ChatTemplate = AS_IT_COMES) -> str:
        """The turns in this tokenizer's chat template, up to where the assistant's answer begins.

        Raises ValueError where there is none, or it refuses them.
        """
        if not self.hf.chat_template:
            raise ValueError("this tokenizer has no chat template; use another prompt style")
        today = datetime.datetime.combine(template.date, datetime.time())
        # `apply_chat_template` makes text of all that it is given, functions too.
        arguments: dict[str, Any] = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True}
        arguments |= {"enable_thinking": False, "strftime_now": today.strftime} | self.hf.special_tokens_map
        try:
            return _compile_jinja_template(self.hf.get_chat_template()).render(arguments | template.arguments)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(f"its chat template cannot say the turns of {roles}: {error}") from None


class _Mark(NamedTuple):
    """What a tokenizer puts in front of a text, as SentencePiece's do with a space.

    Attributes:
      without: the tokenizer without it.
      behind_special: it is put behind every special token, too.
    """

    without: tokenizers.Tokenizer
    behind_special: bool

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> _Mark | None:
        """None where nothing is put in front."""
        parts, schemes = json.loads(backend.to_str()), set[str]()

        def unmarked(part: Any) -> Any:
            kind = part and part["type"]
            if kind == "Sequence":
                [(name, members)] = [(key, value) for key, value in part.items() if key != "type"]
                return part | {name: [own for own in map(unmarked, members) if own]}
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

        bare = parts | {name: unmarked(parts[name]) for name in ("normalizer", "pre_tokenizer")}
        if not schemes:
            return None
        without = tokenizers.Tokenizer.from_str(json.dumps(bare))
        without.encode_special_tokens = backend.encode_special_tokens  # tokenizer.json does not hold this setting
        return cls(without, "always" in schemes and not backend.encode_special_tokens)
