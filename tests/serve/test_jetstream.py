"""JetStream's own client against our server on loopback."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import grpc
import numpy as np
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.serve.config import DecodeConfig
from brewjax.serve.jetstream import Decoding, jetstream_pb2_grpc, pb
from brewjax.serve.jetstream_engine import BrewEngine
from tests.serve.serving import eventually
from tests.tiny import params

CONFIG = DecodeConfig(slots=2, context=128, queue=2)
PROMPT = "The member has applied to"


class Served:
    """A server with nothing but Decode, and JetStream's client of it."""

    def __init__(self, bundle: Bundle, config: DecodeConfig = CONFIG):
        self.decoding = Decoding(bundle, config)
        self.compiled = self.decoding.compilations()
        self.tokenizer, self.generator = bundle.tokenizer, self.decoding.generator
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._server, port = self.run(self._start())
        self._channel = grpc.insecure_channel(f"localhost:{port}")
        self.stub = jetstream_pb2_grpc.OrchestratorStub(self._channel)

    async def _start(self) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        self.decoding.add_to(server)
        port = server.add_insecure_port("localhost:0")
        await server.start()
        return server, port

    def run(self, coroutine, seconds: float = 60):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    def close(self) -> None:
        self._channel.close()
        self.run(self.decoding.drain(10))
        self.run(self._server.stop(5))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.bos + self.tokenizer.encode([text])[0]

    def expected(self, tokens: list[int], max_tokens: int) -> list[int]:
        """What the generator says by itself."""
        return self.generator.generate([tokens], max_tokens, [self.tokenizer.hf.eos_token_id])[0]

    def says(self, text: str = PROMPT, max_tokens: int = 12) -> bool:
        """Whether a request is answered as it ought to be."""
        return ids(self.stub.Decode(ask(text, max_tokens))) == self.expected(self.prompt(text), max_tokens)


def ask(text: str = PROMPT, max_tokens: int = 12) -> pb.DecodeRequest:
    return pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text=text), max_tokens=max_tokens)


def ask_tokens(tokens: list[int], max_tokens: int = 12) -> pb.DecodeRequest:
    return pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=tokens), max_tokens=max_tokens)


def ids(responses) -> list[int]:
    return [token for response in responses for token in response.stream_content.samples[0].token_ids]


@pytest.fixture(scope="module")
def served(bundle) -> Iterator[Served]:
    server = Served(bundle)
    yield server
    assert server.decoding.compilations() == server.compiled, "a request compiled something"
    server.close()


@contextmanager
def steps(served: Served) -> Iterator[threading.Semaphore]:
    """The model takes a step for each release; all it likes in the end."""
    engine, allowed, done = served.decoding._engine, threading.Semaphore(0), False
    generate = engine.generate

    def held(*args):
        if not done and not all(request.over for request in engine._requests.values()):
            allowed.acquire()
        return generate(*args)

    with mock.patch.object(engine, "generate", held):
        try:
            yield allowed
        finally:
            done = True
            allowed.release(1000)


def code_of(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    return raised.value.code(), raised.value.details()


def idle(served: Served) -> bool:
    return served.decoding.requests == 0


def test_text_streams_as_the_generator_says_it(served):
    responses = list(served.stub.Decode(ask(max_tokens=40)))
    expected = served.expected(served.prompt(PROMPT), 40)
    assert ids(responses) == expected
    assert len(responses) >= len(expected) > 5
    text = "".join(response.stream_content.samples[0].text for response in responses)
    assert text == served.tokenizer.hf.backend_tokenizer.decode(expected, skip_special_tokens=False)


def test_tokens_are_answered_in_tokens(served):
    tokens = served.prompt(PROMPT)
    for prompt in (tokens, tokens[1:]):  # the first is put in front where it is missing
        responses = list(served.stub.Decode(ask_tokens(prompt)))
        assert ids(responses) == served.expected(tokens, 12)
        assert not any(response.stream_content.samples[0].text for response in responses)


def test_requests_side_by_side_are_answered_as_alone(served):
    texts = [PROMPT, "Yes", "No, the member has " * 3, "x"]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(served.says, texts, [30, 7, 50, 1]))


def test_many_short_requests_outlast_jetstreams_race(served):
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(served.says, [str(number) for number in range(60)], [1, 2] * 30))


def test_a_cancelled_request_leaves_its_slot(served):
    with steps(served) as allowed:
        first = served.stub.Decode(ask(max_tokens=100))
        allowed.release(3)
        next(first)
        queued = [served.stub.Decode(ask(max_tokens=100)) for _ in range(3)]  # one in a slot, two that wait
        eventually(lambda: served.decoding.requests == 4)
        for call in [first, *queued]:
            call.cancel()
        eventually(lambda: allowed.release() or idle(served))
    assert served.says()


def test_a_deadline_leaves_its_slot(served):
    with steps(served) as allowed:
        assert code_of(served.stub.Decode(ask(), timeout=0.3))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: allowed.release() or idle(served))
    assert served.says()


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (ask_tokens([5] * 120), "token_content: 121 tokens and max_tokens 12; at most 128 together"),
        (ask("x " * 20_000), "text_content.text: 40,000 characters; at most 128 tokens are read"),
        (ask("?,: " * 60), "text_content.text: 240 tokens; at most 128 are read"),
        (ask_tokens([3, -1]), "token_content.token_ids: no token -1; the model knows "),
        (ask_tokens([1 << 30]), "token_content.token_ids: no token 1073741824; the model knows "),
        (ask(max_tokens=0), "max_tokens: 0; ask for 1 or more"),
        (ask(max_tokens=117 << 20), "text_content: "),
        (pb.DecodeRequest(max_tokens=3), "content: give text_content or token_content"),
    ],
)
def test_what_cannot_be_answered_is_refused(served, request_, why):
    code, details = code_of(served.stub.Decode(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(why)
    eventually(lambda: idle(served))
    assert served.says()


def test_a_full_queue_says_when_to_come_back(served):
    with ThreadPoolExecutor(4) as pool, steps(served):
        full = [pool.submit(served.says, max_tokens=5) for _ in range(CONFIG.slots + CONFIG.queue)]
        eventually(lambda: served.decoding.requests == 4)
        refused = served.stub.Decode(ask())
        assert code_of(refused)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(refused.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    assert all(future.result() for future in full)


def test_a_failed_prefill_fails_alone(served):
    prefill = served.generator.prefill

    def poisoned(padded, length, *args):
        if length == 5:
            raise RuntimeError("poison")
        return prefill(padded, length, *args)

    with mock.patch.object(served.generator, "prefill", poisoned), ThreadPoolExecutor(2) as pool:
        good = pool.submit(lambda: ids(served.stub.Decode(ask(max_tokens=40))))
        code, details = code_of(served.stub.Decode(ask_tokens(served.tokenizer.bos + [7] * 4)))
        assert (code, details) == (grpc.StatusCode.INTERNAL, "prefill failed: RuntimeError")
        assert good.result(60) == served.expected(served.prompt(PROMPT), 40)


@pytest.mark.parametrize("method", ["step", "insert"])
def test_a_failed_step_fails_what_is_in_it_and_no_later_request(served, method):
    with mock.patch.object(served.generator, method, side_effect=RuntimeError("poison")):
        code, details = code_of(served.stub.Decode(ask()))
    assert (code, details) == (grpc.StatusCode.INTERNAL, f"{method} failed: RuntimeError")
    assert served.says()
    eventually(lambda: idle(served))
    assert served.stub.HealthCheck(pb.HealthCheckRequest()).is_live


def test_other_weights_go_on_with_the_text_that_is_running(bundle, served):
    tokens = served.prompt(PROMPT)
    before = served.expected(tokens, 20)
    loading = threading.Thread(target=served.decoding.load, args=[params(bundle.model, seed=1)])
    with steps(served) as allowed:
        running = served.stub.Decode(ask(max_tokens=20))
        allowed.release(3)
        generated = [ids([next(running)])[0] for _ in range(3)]
        loading.start()
        eventually(lambda: allowed.release() or not loading.is_alive())
        allowed.release(20)
        generated += ids(running)
    try:
        num_unchanged = next(count for count in range(20) if generated[count] != before[count])
        assert num_unchanged >= 3
        # Where the new weights agree with those before for a token, it may be either's.
        assert any(
            generated[n:] == served.expected(tokens + generated[:n], 20 - n) for n in range(3, num_unchanged + 1)
        )
        assert served.says()
    finally:
        served.decoding.load(bundle.params)
    assert served.expected(tokens, 20) == before


def test_draining_finishes_what_runs_and_takes_no_more(bundle):
    server = Served(bundle)
    expected = server.expected(server.prompt(PROMPT), 6)
    with steps(server) as allowed:
        running = server.stub.Decode(ask(max_tokens=6))
        allowed.release()
        first = ids([next(running)])
        draining = asyncio.run_coroutine_threadsafe(server.decoding.drain(30), server.loop)
        eventually(lambda: not server.stub.HealthCheck(pb.HealthCheckRequest()).is_live)
        assert code_of(server.stub.Decode(ask()))[0] is grpc.StatusCode.UNAVAILABLE
        allowed.release(6)
        assert first + ids(running) == expected
        draining.result(60)
    assert not any(thread.is_alive() for thread in server.decoding._driver._all_threads)
    server.close()


def test_draining_ends_what_takes_too_long(bundle):
    server = Served(bundle)
    with steps(server) as allowed:
        running = [server.stub.Decode(ask(max_tokens=100))]
        allowed.release()
        next(running[0])
        running += [server.stub.Decode(ask(max_tokens=100)) for _ in range(2)]
        eventually(lambda: server.decoding.requests == 3)
        draining = asyncio.run_coroutine_threadsafe(server.decoding.drain(0.2), server.loop)
        eventually(lambda: all(request.error for request in server.decoding._open))
        allowed.release()
        assert {code_of(call)[0] for call in running} == {grpc.StatusCode.UNAVAILABLE}
        draining.result(60)
    server.close()


def test_draining_waits_for_no_device_that_hangs(bundle):
    server = Served(bundle)
    with steps(server) as allowed, mock.patch("brewjax.serve.jetstream.DRAIN_SECONDS", 0.2):
        running = server.stub.Decode(ask())
        allowed.release()
        next(running)
        server.run(server.decoding.drain(0.1))
        assert code_of(running)[0] is grpc.StatusCode.UNAVAILABLE
    server.close()


def test_the_engine_is_one_of_jetstreams(served, bundle):
    engine = BrewEngine(served.generator, bundle.tokenizer)
    weights = engine.load_params()
    tokenizer = engine.build_tokenizer(engine.get_tokenizer())
    tokens = served.prompt(PROMPT)
    padded, length = tokenizer.encode(PROMPT)
    assert padded[:length].tolist() == tokens
    assert tokenizer.decode(tokens[1:]) == PROMPT
    head = engine.prefill(params=weights, padded_tokens=engine.generator.pad(tokens[:3]), true_length=3)
    tail = engine.generator.pad(tokens[3:])
    prefix = engine.prefill(params=weights, existing_prefix=head, padded_tokens=tail, true_length=length - 3)
    state = engine.insert(prefix, engine.init_decode_state(), slot=1)
    generated = []
    for number in range(1, 6):
        state, result = engine.generate(weights, state)
        data = result.convert_to_numpy().get_result_at_slot(1)
        assert (data.valid.item(), data.lengths.item()) == (1, number)
        generated.append(data.tokens.item())
    assert generated == served.expected(tokens, 5)
    served.compiled = served.decoding.compilations()  # prefixes of prefixes are not warmed: the driver has none
    assert engine.max_concurrent_decodes == 2
    assert engine.samples_per_slot == 1
    np.testing.assert_array_equal(engine.mesh.devices, served.generator.mesh.devices)


def test_importing_it_leaves_the_process_as_it_was():
    script = """
import logging, sys
import brewjax.bundle.bundle  # absl gives the root logger a handler
before = logging.root.level, list(logging.root.handlers)
import brewjax.serve.jetstream
assert (logging.root.level, list(logging.root.handlers)) == before
assert not [name for name in ("tensorflow", "seqio", "tiktoken", "shortuuid") if name in sys.modules]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
