"""Callers' texts as tokens, at no more than a bounded cost for those that are refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from brewjax.data.text.tokenizer import Tokenizer, batches

PIECE = 1 << 14  # characters of a long text that are counted at a time


class Texts:
    """Reads texts with a tokenizer; each has a limit of tokens.

    A text is refused by its bytes before a byte of it is read, and otherwise soon after its first tokens beyond the
    limit: tokenising eight megabytes takes seconds, and a gigabyte of memory.

    Args:
      special_tokens: special tokens in a text count as such; otherwise they are text like any other.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: bool):
        self._tokenizer = tokenizer if special_tokens else tokenizer.without_special_tokens()
        self.max_token_bytes = tokenizer.max_token_bytes

    def shorten(self, text: str, limit: int, field: str) -> str:
        """The text without what is surely behind the limit of tokens."""
        return text[: limit * self.max_token_bytes]

    def check_bytes(self, text: str, limit: int, field: str) -> str:
        """The text. Raises ValueError, naming the field, where it surely has more tokens than the limit."""
        if len(text) * 4 > (max_bytes := limit * self.max_token_bytes) and len(text.encode()) > max_bytes:
            raise ValueError(f"{field}: {len(text):,} characters; at most {limit:,} tokens are read")
        return text

    def read(self, texts: Sequence[str], limit: int, fields: Sequence[str], begins: bool = False) -> list[list[int]]:
        """Token ids of each text, which `begins` a prompt or stands behind other texts.

        Raises ValueError naming the field of the first that has more than `limit`.
        """
        for text, field in zip(texts, fields, strict=True):
            self.check_bytes(text, limit, field)
        ids: list[list[int]] = []
        for batch in batches(texts):
            if len(batch[0]) > PIECE and self._end(batch[0], limit):  # it may be alone
                raise ValueError(f"{fields[len(ids)]}: too many tokens; at most {limit:,} are read")
            for tokens in self._encode(batch, begins):
                if len(tokens) > limit:
                    raise ValueError(f"{fields[len(ids)]}: {len(tokens):,} tokens; at most {limit:,} are read")
                ids.append(tokens)
        return ids

    def word(self, word: str, field: str) -> int:
        """The id of a label word. Raises ValueError, naming the field, for what is not one token."""
        self.check_bytes(word, 1, field)
        try:
            return self._tokenizer.label_token_id(word)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None

    def read_end(self, text: str, limit: int, begins: bool = False) -> list[int]:
        """Token ids of a text, or of an end of it with more than `limit` of them."""
        end = self._end(text, limit)
        return self._encode([text[end:]], begins and not end)[0]

    def _end(self, text: str, limit: int) -> int:
        """Where an end of the text begins that surely has more than `limit` tokens; 0 where the text may have fewer.

        Counted in pieces: where a token is cut in two, its bytes are at most as many tokens.
        """
        tokens = 0
        for start in range(len(text) - PIECE, 0, -PIECE):
            tokens += max(0, len(self._encode([text[start : start + PIECE]])[0]) - self.max_token_bytes)
            if tokens > limit:
                return start
        return 0

    def _encode(self, texts: Iterable[str], begins: bool = False) -> list[list[int]]:
        return self._tokenizer.encode(list(texts), begins)
