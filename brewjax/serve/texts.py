"""Callers' texts as tokens; refusing a text costs a bounded amount of work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from brewjax.data.text.tokenizer import Tokenizer, batches

PIECE = 1 << 14  # characters of a long text that are tokenised at a time, to count their tokens


class Texts:
    """Tokenises texts up to a limit of tokens.

    A text with too many bytes is refused before it is tokenised, and any other soon after its first tokens beyond the
    limit, because tokenising eight megabytes takes seconds and a gigabyte of memory.

    Args:
      tokenizer: of the model.
      special_tokens: whether special tokens in a text are read as such; otherwise they are ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: bool):
        self._tokenizer = tokenizer if special_tokens else tokenizer.without_special_tokens()
        self.max_token_bytes = tokenizer.max_token_bytes

    def shorten(self, text: str, limit: int, field: str) -> str:
        """The text without its end that is surely beyond the limit of tokens."""
        return text[: limit * self.max_token_bytes]

    def check_bytes(self, text: str, limit: int, field: str) -> str:
        """Checks that a text can be short enough, before it is tokenised.

        Args:
          text: any.
          limit: tokens that are read.
          field: of the request, for the error.

        Returns:
          `text`.

        Raises:
          ValueError: it surely has more tokens than the limit; names the field.
        """
        if len(text) * 4 > (max_bytes := limit * self.max_token_bytes) and len(text.encode()) > max_bytes:
            raise ValueError(f"{field}: {len(text):,} characters; at most {limit:,} tokens are read")
        return text

    def read(self, texts: Sequence[str], limit: int, fields: Sequence[str], begins: bool = False) -> list[list[int]]:
        """Token ids of texts.

        Args:
          texts: to tokenise.
          limit: maximum tokens of each.
          fields: of the request, one for each text, for errors.
          begins: whether the texts begin prompts; otherwise they follow other text.

        Raises:
          ValueError: naming the field of the first text with more than `limit` tokens.
        """
        for text, field in zip(texts, fields, strict=True):
            self.check_bytes(text, limit, field)
        ids: list[list[int]] = []
        for batch in batches(texts):
            if len(batch[0]) > PIECE and self._end(batch[0], limit):  # a text this long has a batch of its own
                raise ValueError(f"{fields[len(ids)]}: too many tokens; at most {limit:,} are read")
            for tokens in self._encode(batch, begins):
                if len(tokens) > limit:
                    raise ValueError(f"{fields[len(ids)]}: {len(tokens):,} tokens; at most {limit:,} are read")
                ids.append(tokens)
        return ids

    def label_token_id(self, word: str, field: str) -> int:
        """The id of a label word.

        Args:
          word: of one token.
          field: of the request, for the error.

        Returns:
          The token id.

        Raises:
          ValueError: the word is not one token; names the field.
        """
        self.check_bytes(word, 1, field)
        try:
            return self._tokenizer.label_token_id(word)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None

    def read_end(self, text: str, limit: int, begins: bool = False) -> list[int]:
        """Token ids of a text, or of an end of the text that has more than `limit` of them."""
        end = self._end(text, limit)
        return self._encode([text[end:]], begins and not end)[0]

    def _end(self, text: str, limit: int) -> int:
        """Where an end of the text starts that surely has more than `limit` tokens; 0 if the text may have fewer.

        The text is counted in pieces. A token that a piece cuts in two counts for at most as many tokens as its bytes,
        which are subtracted.
        """
        tokens = 0
        for start in range(len(text) - PIECE, 0, -PIECE):
            tokens += max(0, len(self._encode([text[start : start + PIECE]])[0]) - self.max_token_bytes)
            if tokens > limit:
                return start
        return 0

    def _encode(self, texts: Iterable[str], begins: bool = False) -> list[list[int]]:
        return self._tokenizer.encode(list(texts), begins)
