"""google-jetstream 0.2.2 at arm's length: its `Engine` over our decoder, its driver and its `Decode` on our server.

Nothing else in brewjax knows of JetStream. What it does to a process that serves, and what is done about it here:

- It imports seqio, and so TensorFlow (18 s, 0.7 GB), for tokenizers that are not used: `_import_alone`.
- It sets the root logger to DEBUG and logs every step: `_import_alone`, and a logger of its own.
- It calls `jax.tree_map`, which is gone: `orchestrator.delete_pytree`.
- It kills the process when one of its threads raises: the engine that it drives (`_Driven`) raises nothing, a request
  that fails fails alone; what its own threads raise is logged, and the thread goes on (`_Driver`).
- It never bounds its queue, checks no token, cuts long prompts silently, runs what was cancelled to the end, and turns
  tokens into text one by one, which breaks characters of several bytes: `Decoding` does these before and after it.
- It has no end: `Decoding.drain`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import jax
import numpy as np
from jaxtyping import Int
from tokenizers.decoders import DecodeStream

from brewjax.data.tokenizer import Tokenizer
from brewjax.model.generate import Generator, Prefix, Slots
from brewjax.model.params import Params
from brewjax.scoring.bundle import Bundle
from brewjax.serve.config import DecodeConfig
from brewjax.serve.refusals import shortened
from brewjax.serve.texts import Texts


@contextlib.contextmanager
def _import_alone() -> Iterator[None]:
    """Stand-ins for what JetStream imports and we do not use, only while it does; the root logger is left as it was.

    So JetStream needs none of its requirements but ours: `pip install --no-deps google-jetstream` is enough.
    """
    names: dict[str, dict[str, Any]] = {
        "seqio": {},
        "seqio.vocabularies": {"SentencePieceVocabulary": object, "Vocabulary": object},
        "tiktoken": {},
        "tiktoken.load": {"load_tiktoken_bpe": None},
        "jetstream.core.metrics.prometheus": {
            "JetstreamMetricsCollector": object
        },  # two gauges for everyone's registry
    }
    stand_ins = {}
    for name, content in names.items():
        if name not in sys.modules:  # whoever has imported it keeps it
            stand_ins[name] = types.ModuleType(name)
            vars(stand_ins[name]).update(content)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    sys.modules.update(stand_ins)
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}: Decode needs google-jetstream; the README says how to install it") from error
    finally:
        for name in stand_ins:
            del sys.modules[name]
        root.setLevel(level)
        root.handlers[:] = handlers


with _import_alone():
    from jetstream.core import orchestrator
    from jetstream.core.proto import jetstream_pb2 as pb
    from jetstream.core.proto import jetstream_pb2_grpc
    from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2

SERVICE = pb.DESCRIPTOR.services_by_name["Orchestrator"].full_name  # for reflection and health
RETRY_MS = 1000
DRAIN_SECONDS = 5  # for what was told to end to do so

log = logging.getLogger(__name__)
# Its calls of `logging.info` would go to the root logger, and give it a handler where it has none.
orchestrator.logging = token_utils.logging = logging.getLogger("jetstream")
orchestrator.logging.setLevel(logging.WARNING)  # unless someone asks for a line a step
orchestrator.delete_pytree = lambda prefix: jax.tree.map(_delete, prefix)  # without `jax.tree_map`


def _delete(leaf: Any) -> None:
    if isinstance(leaf, jax.Array):
        leaf.delete()


class BrewTokenizer(tokenizer_api.Tokenizer):
    """Our tokenizer as JetStream has them; an id that there is none of is -1."""

    def __init__(self, tokenizer: Tokenizer, generator: Generator):
        self._tokenizer, self._generator = tokenizer, generator

    def encode(self, s: str, **kwargs: Any) -> tuple[np.ndarray, int]:
        """Padded token ids and their true number; `is_bos` (by default) puts the first token in front."""
        ids = self._tokenizer.hf.backend_tokenizer.encode(s, add_special_tokens=False).ids
        if kwargs.get("is_bos", True):
            ids = self._tokenizer.begin(ids)
        return self._generator.pad(ids), len(ids)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """The text of these ids, special tokens spelled out."""
        return self._tokenizer.hf.backend_tokenizer.decode(token_ids, skip_special_tokens=False)

    @property
    def pad_id(self) -> int:
        return _id(self._tokenizer.hf.pad_token_id)

    @property
    def eos_id(self) -> int:
        return _id(self._tokenizer.hf.eos_token_id)

    @property
    def bos_id(self) -> int:
        return _id(self._tokenizer.hf.bos_token_id)

    @property
    def stop_tokens(self) -> set[int]:
        """Not the padding's, which may be a word."""
        return {self.eos_id} - {-1}


def _id(token: int | None) -> int:
    return -1 if token is None else token


class BrewEngine(engine_api.Engine):
    """JetStream's engine over our decoder, as its interface has it: arrays in, arrays out, one sample a slot."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer):
        self.generator, self.tokenizer = generator, tokenizer

    def load_params(self, *args: Any, **kwargs: Any) -> Params:
        """Those of the generator, which it computes with, whatever `params` it is handed later."""
        return self.generator.params

    def prefill(
        self,
        *,
        params: Params,
        existing_prefix: Prefix | None = None,
        padded_tokens: Int[np.ndarray, " T"],
        true_length: int,
    ) -> Prefix:
        """Reads a prompt, behind a prefix that was read before where it is given."""
        return self.generator.prefill(padded_tokens, true_length, existing_prefix)

    def insert(self, prefix: Prefix, decode_state: Slots, slot: int) -> Slots:
        return self.generator.insert(decode_state, prefix, slot)

    def generate(self, params: Params, decode_state: Slots) -> tuple[Slots, engine_api.ResultTokens]:
        """A token in every slot. It waits for it: what fails, fails here."""
        slots, tokens = self.generator.step(decode_state)
        drawn = np.asarray(tokens)
        return slots, _result(np.stack([drawn, np.ones_like(drawn), np.asarray(slots.drawn)], 1))

    def init_decode_state(self, *args: Any, **kwargs: Any) -> Slots:
        return self.generator.slots()

    def get_prefix_destination_sharding(self) -> Any:
        """A prefix is where it is needed: the same devices read and write."""
        return None

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:
        """Says nothing: `build_tokenizer` knows."""
        return tokenizer_pb2.TokenizerParameters()

    def build_tokenizer(self, metadata: tokenizer_pb2.TokenizerParameters) -> BrewTokenizer:
        return BrewTokenizer(self.tokenizer, self.generator)

    @property
    def max_concurrent_decodes(self) -> int:
        return self.generator.count

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self.generator.context

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.generator.mesh

    @property
    def colocated_cpus(self) -> None:
        return None


def _result(rows: Int[np.ndarray, "N 3"]) -> engine_api.ResultTokens:
    """Token, whether it counts, and number of tokens, of each slot."""
    return engine_api.ResultTokens(rows, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1)


class _Request:
    """One call of Decode.

    Attributes:
      tokens: of the prompt, then those that were drawn.
      left: how many more may be drawn.
      closed: the call is over, whoever ended it.
      driven: JetStream holds it.
      error: why it failed, and the code that says so.
      version: of the weights that its slot's keys and values are from.
      end: ends the call, whatever JetStream does.
    """

    session_cache = ""  # JetStream's only use of it is to leave out the first token

    def __init__(self, max_tokens: int):
        self.max_tokens = self.left = max_tokens
        self.tokens: list[int] = []
        self.closed = self.driven = False
        self.error: tuple[grpc.StatusCode, str] | None = None
        self.version = 0
        self.end: Callable[[], None] = lambda: None

    @property
    def over(self) -> bool:
        """Nothing more is to be computed for it."""
        return self.closed or self.error is not None or not self.left

    def fail(self, code: grpc.StatusCode, why: str) -> None:
        self.error = self.error or (code, why)


class _Driven(BrewEngine):
    """The engine that the driver has: it raises nothing, and knows whose request is in which slot.

    Its "tokens" are a `_Request`, its prefix a request with its prefix, and it keeps the decode state itself, which a
    failed step takes with it. A request that is over is reported as invalid, and JetStream frees its slot.

    Args:
      device: held while programs are sent to the device.
      released: is told of each request that JetStream is done with.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        device: contextlib.AbstractContextManager,
        released: Callable[[_Request], None],
    ):
        super().__init__(generator, tokenizer)
        self._device, self._released = device, released
        self._stop = BrewTokenizer(tokenizer, generator).stop_tokens
        self._requests: dict[int, _Request] = {}  # by slot
        self._slots: Slots | None = None
        self._version = 0

    def load(self, params: Params) -> None:
        """Other weights, from the next step on; texts that are running are read again with them."""
        placed = self.generator.place(params)
        with self._device:
            self.generator.params = placed
            self._version += 1

    def init_decode_state(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        return None

    def prefill(self, *, params: Params, padded_tokens: _Request, **kwargs: Any) -> tuple[_Request, Prefix | None]:  # type: ignore[override]
        request = padded_tokens
        if request.over:
            return request, None
        try:
            with self._device:
                prefix = self._read(request)
            return request, jax.block_until_ready(prefix)  # what fails, fails here, and alone
        except Exception as error:
            log.exception("prefill failed")
            request.fail(grpc.StatusCode.INTERNAL, f"prefill failed: {type(error).__name__}")
            return request, None

    def insert(self, prefix: tuple[_Request, Prefix | None], decode_state: None, slot: int) -> None:  # type: ignore[override]
        request, keys_values = prefix
        self._requests[slot] = request
        if keys_values is not None:
            with self._failing_all("insert"), self._device:
                self._put(keys_values, slot)

    def generate(self, params: Params, decode_state: None) -> tuple[None, engine_api.ResultTokens]:  # type: ignore[override]
        rows = np.zeros((self.max_concurrent_decodes, 3), np.int32)
        running = {slot: request for slot, request in self._requests.items() if not request.over}
        for slot in self._requests.keys() - running.keys():
            self._released(self._requests.pop(slot))
        if not running:
            return None, _result(rows)
        with self._failing_all("step"):
            with self._device:
                for slot, request in running.items():
                    if request.version != self._version:
                        self._put(self._read(request), slot)
                assert self._slots is not None  # whoever runs was put there
                self._slots, drawn = self.generator.step(self._slots)
            for (slot, request), token in zip(running.items(), np.asarray(drawn)[list(running)].tolist(), strict=True):
                if token in self._stop:
                    request.left = 0
                    continue
                request.tokens.append(token)
                request.left -= 1
                rows[slot] = token, True, request.max_tokens - request.left
        return None, _result(rows)

    def _read(self, request: _Request) -> Prefix:
        request.version = self._version
        return self.generator.prefill(self.generator.pad(request.tokens), len(request.tokens))

    def _put(self, prefix: Prefix, slot: int) -> None:
        self._slots = self.generator.insert(self._slots or self.generator.slots(), prefix, slot)

    @contextlib.contextmanager
    def _failing_all(self, what: str) -> Iterator[None]:
        """An error takes the keys and values of every slot with it, and so every request in one."""
        try:
            yield
        except Exception as error:
            log.exception("%s failed", what)
            self._slots = None
            for request in self._requests.values():
                request.fail(grpc.StatusCode.INTERNAL, f"{what} failed: {type(error).__name__}")


def _outlives(run: Callable[[orchestrator.Driver, int], None]) -> Callable[[orchestrator.Driver, int], None]:
    """A driver's thread that goes on after an exception, which JetStream would end the process for."""

    def outliving(self: orchestrator.Driver, index: int) -> None:
        while self.live:
            try:
                return run(self, index)
            except AssertionError:  # JetStream's own race: a slot that is freed while it looks for a request
                log.debug("JetStream found no request in a slot", exc_info=True)
            except Exception:
                log.exception("a thread of JetStream failed")

    return outliving


class _Driver(orchestrator.Driver):
    _prefill_thread = _outlives(orchestrator.Driver._prefill_thread)
    _transfer_thread = _outlives(orchestrator.Driver._transfer_thread)
    _generate_thread = _outlives(orchestrator.Driver._generate_thread)
    _detokenize_thread = _outlives(orchestrator.Driver._detokenize_thread)

    def place_request_on_prefill_queue(self, request: orchestrator.ActiveRequest) -> None:
        request.prefill_content.end = request.return_channel.close
        super().place_request_on_prefill_queue(request)

    def _process_prefill_content(self, request: orchestrator.ActiveRequest, *args: Any) -> tuple[_Request, int]:
        """Requests come checked and as tokens."""
        return request.prefill_content, len(request.prefill_content.tokens)


def _stop_at_exit(driver: _Driver) -> None:
    threading.main_thread().join()
    driver.stop()


class Decoding(orchestrator.LLMOrchestrator):
    """JetStream's `Decode` and `HealthCheck` with a model of ours, for any `grpc.aio` server.

    Making one compiles every shape (seconds to minutes) and starts JetStream's threads, which `drain` ends.

    Args:
      mesh: the model's devices, as of `Generator`.
      device: held while programs are sent to the device: those of two threads must come to all devices in one order.
      special_tokens: those that callers write in a text count as such; otherwise they are text like any other.
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
        bundle.model.check_context(config.context, "context")
        self.config = config
        self.generator = Generator(
            bundle.model, bundle.params, config.slots, config.context, config.sampling, config.seed, mesh
        )
        self.generator.warm_up()
        self._tokenizer = BrewTokenizer(bundle.tokenizer, self.generator)
        self._begin, self._backend = bundle.tokenizer.begin, bundle.tokenizer.hf.backend_tokenizer
        self._texts = Texts(bundle.tokenizer, special_tokens)
        self._open: set[_Request] = set()
        self._draining = self.lame_duck = False
        self._engine = _Driven(self.generator, bundle.tokenizer, device or threading.Lock(), self._settle_driven)
        # Interleaved: one set of weights and devices for prefill and generation.
        driver = _Driver([self._engine], [self._engine], [None], [None], interleaved_mode=True, jax_padding=False)
        super().__init__(driver)
        # One of its threads is no daemon: a main thread that ends without `drain` would wait for it for ever.
        threading.Thread(target=_stop_at_exit, args=[driver], daemon=True).start()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serves it there, beside whatever else is."""
        jetstream_pb2_grpc.add_OrchestratorServicer_to_server(self, server)

    def load(self, params: Params) -> None:
        """Other weights of the same shape; running texts go on with them. Blocks for as long as a step."""
        self._engine.load(params)

    def compilations(self) -> int:
        """How many shapes were compiled; constant from the start."""
        return self.generator.compilations()

    @property
    def requests(self) -> int:
        """How many are queued or running."""
        return len(self._open)

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, waits for those there are, fails (UNAVAILABLE) what is left, and ends the threads."""
        self._draining = True
        await self._emptied(timeout)
        for request in tuple(self._open):
            request.fail(grpc.StatusCode.UNAVAILABLE, "the server shuts down")
        await self._emptied(DRAIN_SECONDS)
        for request in tuple(self._open):
            request.end()
        # In a daemon of its own: a device that hangs must not keep the process from its end.
        stopping = threading.Thread(target=self._driver.stop, daemon=True)
        stopping.start()
        await asyncio.to_thread(stopping.join, DRAIN_SECONDS)

    async def HealthCheck(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        """Whether callers should come."""
        return pb.HealthCheckResponse(is_live=self._driver.live and not (self._draining or self.lame_duck))

    async def Decode(  # noqa: N802
        self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeResponse]:
        """Streams what follows a prompt, a token at a time: as text with its ids, or as ids where the prompt was ids.

        Codes: INVALID_ARGUMENT names the field, RESOURCE_EXHAUSTED comes with grpc-retry-pushback-ms, UNAVAILABLE
        while it drains, INTERNAL where the model failed. `session_cache` and `priority` mean nothing.
        """
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server shuts down")
        if len(self._open) >= self.config.slots + self.config.queue:
            retry = (("grpc-retry-pushback-ms", str(RETRY_MS)),)
            full = f"{len(self._open)} requests are queued or running; come back later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full, retry)
        ours = _Request(request.max_tokens)
        self._open.add(ours)
        context.add_done_callback(lambda _: self._settle_closed(ours))
        try:
            ours.tokens = await asyncio.to_thread(self._prompt, request)  # tokenizing a long text takes a while
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, shortened(error))
        as_text = request.WhichOneof("content") == "text_content"
        said, stream, text = [], DecodeStream(skip_special_tokens=False), ""
        ours.driven = True
        with contextlib.suppress(orchestrator.async_multifuture.futures.CancelledError):
            async for response in super().Decode(ours, context):
                sample = response.stream_content.samples[0]
                if as_text:
                    said += sample.token_ids
                    sample.text = "".join(stream.step(self._backend, token) or "" for token in sample.token_ids)
                    text += sample.text
                if sample.token_ids:
                    yield response
        if ours.error:
            await context.abort(*ours.error)
        whole = self._tokenizer.decode(said)
        if whole != text and whole.startswith(text):  # it ends within a character
            sample = pb.DecodeResponse.StreamContent.Sample(text=whole[len(text) :])
            yield pb.DecodeResponse(stream_content=pb.DecodeResponse.StreamContent(samples=[sample]))

    def _get_prefill_content(self, request: _Request) -> tuple[_Request, bool]:
        """As tokens, whatever the caller sent: JetStream then leaves turning them into text to `Decode`."""
        return request, True

    def _prompt(self, request: pb.DecodeRequest) -> list[int]:
        """A request's tokens; ValueError names the field that is wrong."""
        content, most = request.WhichOneof("content"), self.config.context
        if content == "text_content":
            (tokens,) = self._texts.read([request.text_content.text], most, ["text_content.text"])
            tokens = list(tokens)  # the request's own, to be added to
        elif content == "token_content":
            tokens, size = list(request.token_content.token_ids), self.generator.model.vocab_size
            if wrong := [token for token in tokens if not 0 <= token < size]:
                raise ValueError(f"token_content.token_ids: no token {wrong[0]}; the model knows {size:,}")
        else:
            raise ValueError("content: give text_content or token_content")
        tokens = self._begin(tokens)
        if not tokens:
            raise ValueError(f"{content}: empty")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens: {request.max_tokens}; ask for 1 or more")
        if len(tokens) + request.max_tokens > most:
            raise ValueError(
                f"{content}: {len(tokens):,} tokens and max_tokens {request.max_tokens:,}; at most {most:,} together"
            )
        return tokens

    def _settle_closed(self, request: _Request) -> None:
        request.closed = True
        if not request.driven:
            self._open.discard(request)

    def _settle_driven(self, request: _Request) -> None:
        request.driven = False
        if request.closed:
            self._open.discard(request)

    async def _emptied(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.01)
