"""The prefix cache: which page of device memory holds which part of which prefix, by content, evicted by LRU."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import NULL_PAGE, PAGE


def page_hashes(prompt: EncodedPrompt) -> list[bytes]:
    """A digest for each page of the prefix: of its tokens, of which tokens attend to them, and of all pages before."""
    arrays = prompt.arrays
    content = np.stack([arrays[name][: prompt.prefix_length] for name in ("tokens", "piece_id", "visibility")], 1)
    hashes, digest = [], b""
    for start in range(0, len(content), PAGE):
        digest = hashlib.blake2b(digest + content[start : start + PAGE].tobytes(), digest_size=16).digest()
        hashes.append(digest)
    return hashes


class PrefixCache:
    """The pages of a pool and their contents. A page that is held is never given to another holder.

    Members with the same beginning share its pages, so a member whose history grew pays only for the new part.

    Args:
      pages: size of the pool, `NULL_PAGE` included.
    """

    def __init__(self, pages: int):
        self._size = pages
        self.clear()

    @property
    def capacity(self) -> int:
        """How many pages can be held at once."""
        return self._size - 1

    def clear(self) -> None:
        """Forgets all contents. No page may be held."""
        self._free = [page for page in range(self._size) if page != NULL_PAGE]
        self._known: OrderedDict[bytes, int] = OrderedDict()  # readable pages by digest, the least recently used first
        self._digest_of: dict[int, bytes] = {}
        self._holders: Counter[int] = Counter()

    def acquire(self, hashes: Sequence[bytes]) -> tuple[list[int], int] | None:
        """Holds a page for each digest of a prefix, until `release`.

        Args:
          hashes: the digests, in order, as `page_hashes` makes them.

        Returns:
          The pages, and how many of them, from the first on, can be read already: the caller computes the others and
          publishes them by `commit`. None, with nothing held, if too many pages are held by others.
        """
        hits = 0
        while hits < len(hashes) and hashes[hits] in self._known:
            hits += 1
        pages = [self._known[digest] for digest in hashes[:hits]]
        self._holders.update(pages)
        for digest in reversed(hashes[:hits]):  # the end of a prefix is useless without its beginning: evicted first
            self._known.move_to_end(digest)
        num_new = len(hashes) - hits
        if num_new > len(self._free):
            idle = (digest for digest, page in self._known.items() if not self._holders[page])
            for digest in list(itertools.islice(idle, num_new - len(self._free))):
                page = self._known.pop(digest)
                del self._digest_of[page]
                self._free.append(page)
        if num_new > len(self._free):
            self.release(pages)
            return None
        new_pages = [self._free.pop() for _ in range(num_new)]
        self._holders.update(new_pages)
        return pages + new_pages, hits

    def commit(self, hashes: Sequence[bytes], pages: Sequence[int]) -> None:
        """Publishes computed pages for reuse by later passes.

        If another request published the same content first, the duplicate page stays private and is freed on release.

        Args:
          hashes: the digest of each page.
          pages: as `acquire` returned them.
        """
        for digest, page in zip(hashes, pages, strict=True):
            if self._known.setdefault(digest, page) == page:
                self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Ends one hold of each page. Published pages stay readable until they are evicted."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page not in self._digest_of:
                    self._free.append(page)

    def __len__(self) -> int:
        """How many pages can be read."""
        return len(self._known)
