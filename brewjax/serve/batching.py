"""`Batcher`: what callers ask for at the same time is computed together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Collects inputs while a thread computes the last ones, and computes all that have arrived at once.

    Args:
      compute: inputs -> as many outputs; it runs in a thread, one call at a time.
      limit: inputs that are computed at once, at most.
    """

    def __init__(self, compute: Callable[[Sequence[T]], Sequence[R]], limit: int):
        self._compute, self._limit = compute, limit
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, inputs: Sequence[T]) -> list[R]:
        """The outputs of `inputs`. Raises what `compute` raises."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[R]] = [loop.create_future() for _ in inputs]
        self._waiting += zip(inputs, futures, strict=True)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return list(await asyncio.gather(*futures))

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            batch = [(value, future) for value, future in batch if not future.cancelled()]
            if not batch:
                continue
            try:
                outputs = await asyncio.to_thread(self._compute, [value for value, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), output in zip(batch, outputs, strict=True):
                if not future.done():
                    future.set_result(output)
