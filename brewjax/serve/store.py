"""Stores of changes: what callers changed of a catalogue, in the order in which it was acknowledged."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from brewjax.retrieve.log import Segment

if TYPE_CHECKING:
    from redis import Redis

START = ""  # the position before the first change
LOG = "changes.log"
REDIS = ("redis://", "rediss://", "unix://")
STREAM = "brewjax"  # the key of a Redis stream that the setting does not name
READ_AT_ONCE = 10_000  # changes


class StoreError(RuntimeError):
    """A store that cannot be opened, read or written to."""


class ChangeStore(Protocol):
    """Changes in the order in which they were appended. Thread-safe. Whoever keeps them elsewhere implements this: in
    Bigtable, say, rows whose keys ascend."""

    def append(self, changes: Sequence[bytes]) -> None:
        """Adds changes to the end. When this returns, they survive a crash.

        Args:
          changes: serialised, none of them empty.

        Raises:
          StoreError: they may not be there.
        """

    def read(self, position: str) -> tuple[list[bytes], str]:
        """Reads the next changes, some thousands at a time.

        Args:
          position: where the last call ended, or START.

        Returns:
          Changes in their order, none where there is nothing new; and the position after them.

        Raises:
          StoreError: it cannot be read.
        """

    def close(self) -> None:
        """Ends the use of the store."""


def open_store(address: str) -> ChangeStore:
    """Opens a store.

    Args:
      address: a folder, or a Redis: `redis://HOST:PORT/DATABASE#STREAM`.

    Raises:
      StoreError: it cannot be opened.
    """
    return RedisStore(address) if address.startswith(REDIS) else FileStore(Path(address))


class FileStore:
    """Changes in a file, for one server.

    Args:
      folder: that the file is in; made if there is none.
    """

    def __init__(self, folder: Path):
        with _store_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            self._folder, self._segment = folder, Segment(folder / LOG)

    def append(self, changes: Sequence[bytes]) -> None:
        """See `ChangeStore`."""
        with _store_errors(str(self._folder)):
            self._segment.append(changes)

    def read(self, position: str) -> tuple[list[bytes], str]:
        """See `ChangeStore`. A position is a number of bytes."""
        with _store_errors(str(self._folder)):
            records = list(itertools.islice(self._segment.read(int(position or 0)), READ_AT_ONCE))
        return [change for change, _ in records], str(records[-1][1]) if records else position

    def close(self) -> None:
        """See `ChangeStore`."""
        self._segment.close()


class RedisStore:
    """Changes in a Redis stream, for any number of servers. How much of it survives a crash of Redis is Redis' own
    setting: `appendonly yes`, and `appendfsync always` where not even the last second may be lost.

    Args:
      address: of Redis, with the key of the stream behind a `#`.
    """

    def __init__(self, address: str):
        try:
            import redis
        except ImportError:
            raise StoreError("the client of Redis is missing: pip install 'brewjax[redis]'") from None
        address, _, stream = address.partition("#")
        self._stream, self._error = stream or STREAM, redis.RedisError
        self._name = re.sub("//.*@", "//", address)  # without a password
        with self._errors():
            self._redis: Redis = redis.Redis.from_url(address, socket_timeout=10, socket_connect_timeout=10)
            self._redis.ping()

    def append(self, changes: Sequence[bytes]) -> None:
        """See `ChangeStore`."""
        with self._errors(), self._redis.pipeline(transaction=True) as pipeline:
            for change in changes:
                pipeline.xadd(self._stream, {"change": change})
            pipeline.execute()

    def read(self, position: str) -> tuple[list[bytes], str]:
        """See `ChangeStore`. A position is the id of an entry.

        Raises:
          StoreError: it cannot be read, or has entries that are no changes.
        """
        with self._errors():
            entries: Any = self._redis.xrange(self._stream, f"({position}" if position else "-", count=READ_AT_ONCE)
        if not entries:
            return [], position
        if any(b"change" not in fields for _, fields in entries):
            raise StoreError(f"{self._name}: stream '{self._stream}' has entries that are no changes; name another")
        return [fields[b"change"] for _, fields in entries], entries[-1][0].decode()

    def close(self) -> None:
        """See `ChangeStore`."""
        self._redis.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._error, ValueError) as error:
            raise StoreError(f"{self._name}: {error}") from None


@contextlib.contextmanager
def _store_errors(name: str) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise StoreError(f"{name} is open elsewhere; several servers share a Redis") from None
    except (OSError, ValueError) as error:  # DamagedError is one
        raise StoreError(f"{name}: {error}") from None
