"""A list of 50,000 items holds up nobody who asks beside it."""

import asyncio
import gc
import threading
import time
from unittest import mock

from brewjax.serve.client import raw
from tests.serve.serving import eventually, waiting

ITEMS = 50_000
MAX_SECONDS = 0.02  # of the event loop's own time at a stretch


def test_a_stream_of_50_000_items_never_holds_the_event_loop(server, client):
    """Measured in time that the loop's thread computes, whatever else the machine does; and all threads stand still for
    a collection of old garbage, which such a list makes long."""
    loop_thread = asyncio.run_coroutine_threadsafe(_identity(), server.loop).result(10)
    seconds: list[float] = []
    generations: list[int] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        start_time = time.thread_time()
        run(handle)
        if threading.get_ident() == loop_thread:
            seconds.append(time.thread_time() - start_time)

    def collected(phase: str, info: dict) -> None:
        if phase == "start" and threading.current_thread().name == "scoring":
            generations.append(info["generation"])

    scoring_loop = server.service.scoring_loop
    question = raw([3] * 200, [[3 + number % 200, 4, 5, 6, 7] for number in range(ITEMS)], [5, 9])
    responses = client.stream(question, timeout=600)
    with mock.patch.object(asyncio.Handle, "_run", timed):
        assert next(responses).scores
        scoring_loop._collect_old_at = time.monotonic()  # it is time
        gc.callbacks.append(collected)
        assert all(next(responses).scores for _ in range(5))
        gc.callbacks.remove(collected)
        responses.close()
    eventually(lambda: waiting(scoring_loop) == 0)
    assert max(seconds) < MAX_SECONDS
    assert set(generations) == {1}


async def _identity() -> int:
    return threading.get_ident()
