"""Which page of the device's memory holds which part of which prefix: by content, the least recently used go first."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import NULL_PAGE, PAGE


def page_hashes(prompt: EncodedPrompt) -> list[bytes]:
    """One for each page of the prefix: of its tokens, who sees them, and all that is before them."""
    arrays = prompt.arrays
    facts = np.stack([arrays[name][: prompt.prefix_length] for name in ("tokens", "piece_id", "visibility")], 1)
    chain, digest = [], b""
    for start in range(0, len(facts), PAGE):
        digest = hashlib.blake2b(digest + facts[start : start + PAGE].tobytes(), digest_size=16).digest()
        chain.append(digest)
    return chain


class PrefixCache:
    """The pages of a pool and what they hold. Pages that are held are never given to another.

    Members with the same beginning share its pages, so a member whose history grew pays only for what is new.
    """

    def __init__(self, pages: int):
        self._size = pages
        self.clear()

    @property
    def capacity(self) -> int:
        """How many pages can be held at once."""
        return self._size - 1

    def clear(self) -> None:
        """Forgets everything; nobody may hold a page."""
        self._free = [page for page in range(self._size) if page != NULL_PAGE]
        self._known: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._digest_of: dict[int, bytes] = {}
        self._holders: Counter[int] = Counter()

    def acquire(self, chain: Sequence[bytes]) -> tuple[list[int], int] | None:
        """A page for each of a chain of digests, and how many of them, from the first on, are there to be read.

        The others are the caller's to fill. None where too many pages are held by others.
        """
        hits = 0
        while hits < len(chain) and chain[hits] in self._known:
            hits += 1
        pages = [self._known[digest] for digest in chain[:hits]]
        self._holders.update(pages)
        for digest in reversed(chain[:hits]):  # the end of a chain is of no use without its beginning: it goes first
            self._known.move_to_end(digest)
        new = len(chain) - hits
        if new > len(self._free):
            idle = (digest for digest, page in self._known.items() if not self._holders[page])
            for digest in list(itertools.islice(idle, new - len(self._free))):
                page = self._known.pop(digest)
                del self._digest_of[page]
                self._free.append(page)
        if new > len(self._free):
            self.release(pages)
            return None
        mine = [self._free.pop() for _ in range(new)]
        self._holders.update(mine)
        return pages + mine, hits

    def commit(self, chain: Sequence[bytes], pages: Sequence[int]) -> None:
        """From the next pass on, these pages can be read; who filled the same at the same time keeps it for itself."""
        for digest, page in zip(chain, pages, strict=True):
            if self._known.setdefault(digest, page) == page:
                self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """The holder is done with them."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page not in self._digest_of:
                    self._free.append(page)

    def __len__(self) -> int:
        """How many pages can be read."""
        return len(self._known)
