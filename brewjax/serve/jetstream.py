"""JetStream's driver and its `Decode` service on our gRPC server; see also `jetstream_engine.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import jax
from tokenizers.decoders import DecodeStream

from brewjax.bundle.bundle import Bundle
from brewjax.model.generate import Generator
from brewjax.model.params import Params
from brewjax.serve.config import DecodeConfig
from brewjax.serve.jetstream_engine import (
    BrewTokenizer,
    DecodeCall,
    DrivenEngine,
    jetstream_pb2_grpc,
    orchestrator,
    pb,
)
from brewjax.serve.refusals import truncate_message
from brewjax.serve.texts import Texts

SERVICE = pb.DESCRIPTOR.services_by_name["Orchestrator"].full_name  # for reflection and health
RETRY_MS = 1000
DRAIN_SECONDS = 5  # for failed requests, and for JetStream's threads, to end

log = logging.getLogger(__name__)


def _outlives(run: Callable[[orchestrator.Driver, int], None]) -> Callable[[orchestrator.Driver, int], None]:
    """A thread of the driver that continues after an exception, for which JetStream would kill the process."""

    def outliving(self: orchestrator.Driver, index: int) -> None:
        while self.live:
            try:
                return run(self, index)
            except AssertionError:  # JetStream's own race: a slot that is freed while it looks for a request
                log.debug("JetStream found no request in a slot", exc_info=True)
            except Exception:
                log.exception("a thread of JetStream failed")

    return outliving


class Driver(orchestrator.Driver):
    """JetStream's driver, made to survive exceptions and to take tokens."""

    _prefill_thread = _outlives(orchestrator.Driver._prefill_thread)
    _transfer_thread = _outlives(orchestrator.Driver._transfer_thread)
    _generate_thread = _outlives(orchestrator.Driver._generate_thread)
    _detokenize_thread = _outlives(orchestrator.Driver._detokenize_thread)

    def place_request_on_prefill_queue(self, request: orchestrator.ActiveRequest) -> None:
        request.prefill_content.end = request.return_channel.close
        super().place_request_on_prefill_queue(request)

    def _process_prefill_content(self, request: orchestrator.ActiveRequest, *args: Any) -> tuple[DecodeCall, int]:
        """The request and its prompt length: requests arrive checked and as tokens."""
        return request.prefill_content, len(request.prefill_content.tokens)


def _stop_at_exit(driver: Driver) -> None:
    threading.main_thread().join()
    driver.stop()


class Decoding(orchestrator.LLMOrchestrator):
    """JetStream's `Decode` and `HealthCheck` with a bundle, for any `grpc.aio` server.

    Construction compiles every shape (seconds to minutes) and starts JetStream's threads, which `drain` ends.

    Args:
      bundle: the model.
      config: slots, lengths and sampling.
      mesh: the model's devices, as in `Generator`.
      device: held while programs are dispatched, because those of two threads must reach all devices in one order.
      special_tokens: whether special tokens in callers' texts are read as such; otherwise they are ordinary text.
    """

    service = SERVICE

    def __init__(
        self,
        bundle: Bundle,
        config: DecodeConfig,
        mesh: jax.sharding.Mesh | None = None,
        device: contextlib.AbstractContextManager | None = None,
        special_tokens: bool = False,
    ):
        bundle.model.check_length(config.context, "context")
        self.config = config
        self.generator = Generator(
            bundle.model, bundle.params, config.slots, config.context, config.sampling, config.seed, mesh
        )
        self.generator.warm_up()
        self._tokenizer = BrewTokenizer(bundle.tokenizer, self.generator)
        self._with_bos, self._backend = bundle.tokenizer.with_bos, bundle.tokenizer.hf.backend_tokenizer
        self._texts = Texts(bundle.tokenizer, special_tokens)
        self._open: set[DecodeCall] = set()
        self._draining = self.lame_duck = False
        self._engine = DrivenEngine(self.generator, bundle.tokenizer, device or threading.Lock(), self._on_released)
        # Interleaved: one set of weights and devices for prefill and generation.
        driver = Driver([self._engine], [self._engine], [None], [None], interleaved_mode=True, jax_padding=False)
        super().__init__(driver)
        # One of its threads is no daemon: a main thread that ends without `drain` would wait for it for ever.
        threading.Thread(target=_stop_at_exit, args=[driver], daemon=True).start()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service with a gRPC server."""
        jetstream_pb2_grpc.add_OrchestratorServicer_to_server(self, server)

    def load(self, params: Params) -> None:
        """Serves other weights of the same shape, in running texts too. Blocks for as long as a step."""
        self._engine.load(params)

    def compilations(self) -> int:
        """How many programs were compiled; constant after construction."""
        return self.generator.compilations()

    @property
    def requests(self) -> int:
        """How many requests are queued or running."""
        return len(self._open)

    async def drain(self, timeout: float) -> None:
        """Refuses new requests and waits up to `timeout` seconds for open ones.

        Then it fails the rest as UNAVAILABLE, and ends JetStream's threads.
        """
        self._draining = True
        await self._wait_until_idle(timeout)
        for request in tuple(self._open):
            request.fail(grpc.StatusCode.UNAVAILABLE, "the server shuts down")
        await self._wait_until_idle(DRAIN_SECONDS)
        for request in tuple(self._open):
            request.end()
        # In a daemon thread: a device that hangs must not keep the process alive.
        stopping = threading.Thread(target=self._driver.stop, daemon=True)
        stopping.start()
        await asyncio.to_thread(stopping.join, DRAIN_SECONDS)

    async def HealthCheck(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        """Readiness."""
        return pb.HealthCheckResponse(is_live=self._driver.live and not (self._draining or self.lame_duck))

    async def Decode(  # noqa: N802
        self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeResponse]:
        """Streams the text that follows a prompt, token by token: ids and text, or only ids if the prompt was ids.

        Codes: INVALID_ARGUMENT names the field, RESOURCE_EXHAUSTED comes with grpc-retry-pushback-ms, UNAVAILABLE
        while the server drains, INTERNAL if the model failed. `session_cache` and `priority` are ignored.
        """
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server shuts down")
        if len(self._open) >= self.config.slots + self.config.queue:
            retry = (("grpc-retry-pushback-ms", str(RETRY_MS)),)
            full = f"{len(self._open)} requests are queued or running; come back later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full, retry)
        call = DecodeCall(request.max_tokens)
        self._open.add(call)
        context.add_done_callback(lambda _: self._on_closed(call))
        try:
            call.tokens = await asyncio.to_thread(self._encode_prompt, request)  # a long text takes a while
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, truncate_message(error))
        as_text = request.WhichOneof("content") == "text_content"
        token_ids: list[int] = []
        text, stream = "", DecodeStream(skip_special_tokens=False)
        call.driven = True
        with contextlib.suppress(orchestrator.async_multifuture.futures.CancelledError):
            async for response in super().Decode(call, context):
                sample = response.stream_content.samples[0]
                if as_text:
                    token_ids += sample.token_ids
                    sample.text = "".join(stream.step(self._backend, token) or "" for token in sample.token_ids)
                    text += sample.text
                if sample.token_ids:
                    yield response
        if call.error:
            await context.abort(*call.error)
        whole = self._tokenizer.decode(token_ids)
        if whole != text and whole.startswith(text):  # the stream ended within a character
            sample = pb.DecodeResponse.StreamContent.Sample(text=whole[len(text) :])
            yield pb.DecodeResponse(stream_content=pb.DecodeResponse.StreamContent(samples=[sample]))

    def _get_prefill_content(self, request: DecodeCall) -> tuple[DecodeCall, bool]:
        """The call, as tokens whatever the caller sent: JetStream then leaves detokenising to `Decode`."""
        return request, True

    def _encode_prompt(self, request: pb.DecodeRequest) -> list[int]:
        """The tokens of a request's prompt. Raises ValueError, naming the field that is wrong."""
        content, context = request.WhichOneof("content"), self.config.context
        if content == "text_content":
            (tokens,) = self._texts.read([request.text_content.text], context, ["text_content.text"])
            tokens = list(tokens)  # a copy, which generated tokens are appended to
        elif content == "token_content":
            tokens, vocab_size = list(request.token_content.token_ids), self.generator.model.vocab_size
            if unknown := [token for token in tokens if not 0 <= token < vocab_size]:
                raise ValueError(f"token_content.token_ids: no token {unknown[0]}; the model knows {vocab_size:,}")
        else:
            raise ValueError("content: give text_content or token_content")
        tokens = self._with_bos(tokens)
        if not tokens:
            raise ValueError(f"{content}: empty")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens: {request.max_tokens}; ask for 1 or more")
        if len(tokens) + request.max_tokens > context:
            raise ValueError(
                f"{content}: {len(tokens):,} tokens and max_tokens {request.max_tokens:,}; at most {context:,} together"
            )
        return tokens

    def _on_closed(self, call: DecodeCall) -> None:
        """The gRPC call has ended."""
        call.closed = True
        if not call.driven:
            self._open.discard(call)

    def _on_released(self, call: DecodeCall) -> None:
        """JetStream has let go of the call."""
        call.driven = False
        if call.closed:
            self._open.discard(call)

    async def _wait_until_idle(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.01)
