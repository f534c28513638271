"""JetStream's `Engine` interface (google-jetstream 0.2.2) over our decoder; `jetstream.py` has the rest.

Only these two modules know of JetStream. What it does to a serving process, and what they do about it:

- It imports seqio, and so TensorFlow (18 s, 0.7 GB), for tokenizers that are not used: `_stubbed_imports`.
- It sets the root logger to DEBUG and logs every step: `_stubbed_imports`, and a logger of its own.
- It calls `jax.tree_map`, which JAX has removed: `orchestrator.delete_pytree`.
- It kills the process when one of its threads raises: the engine that it drives (`DrivenEngine`) never raises, but
  fails single requests; exceptions of its own threads are logged, and the thread continues (`jetstream.Driver`).
- It has no limit of its queue, checks no token ids, truncates long prompts silently, runs cancelled requests to the
  end, and detokenises one token at a time, which breaks characters of several bytes: `jetstream.Decoding` does these
  itself.
- It cannot be drained: `jetstream.Decoding.drain`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import jax
import numpy as np
from jaxtyping import Int

from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.generate import DecodeState, Generator, Prefix
from brewjax.model.params import Params


@contextlib.contextmanager
def _stubbed_imports() -> Iterator[None]:
    """Stubs for modules that JetStream imports and we do not use, while it is imported; restores the root logger.

    So JetStream needs no requirements beyond ours: `pip install --no-deps google-jetstream` is enough.
    """
    stubbed: dict[str, dict[str, Any]] = {
        "seqio": {},
        "seqio.vocabularies": {"SentencePieceVocabulary": object, "Vocabulary": object},
        "tiktoken": {},
        "tiktoken.load": {"load_tiktoken_bpe": None},
        "jetstream.core.metrics.prometheus": {
            "JetstreamMetricsCollector": object
        },  # registers two gauges in the global registry
    }
    stubs = {}
    for name, content in stubbed.items():
        if name not in sys.modules:  # a real import stays
            stubs[name] = types.ModuleType(name)
            vars(stubs[name]).update(content)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    sys.modules.update(stubs)
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}: Decode needs google-jetstream; the README says how to install it") from error
    finally:
        for name in stubs:
            del sys.modules[name]
        root.setLevel(level)
        root.handlers[:] = handlers


with _stubbed_imports():
    from jetstream.core import orchestrator
    from jetstream.core.proto import jetstream_pb2 as pb
    from jetstream.core.proto import jetstream_pb2_grpc
    from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2

__all__ = ["BrewEngine", "BrewTokenizer", "DecodeCall", "DrivenEngine", "jetstream_pb2_grpc", "orchestrator", "pb"]

log = logging.getLogger(__name__)
# Its calls of `logging.info` would go to the root logger, and add a handler to it.
orchestrator.logging = token_utils.logging = logging.getLogger("jetstream")
orchestrator.logging.setLevel(logging.WARNING)  # INFO is a line per step
orchestrator.delete_pytree = lambda prefix: jax.tree.map(_delete, prefix)  # without `jax.tree_map`


def _delete(leaf: Any) -> None:
    if isinstance(leaf, jax.Array):
        leaf.delete()


class BrewTokenizer(tokenizer_api.Tokenizer):
    """Our tokenizer by JetStream's interface; a special token that the tokenizer lacks has id -1."""

    def __init__(self, tokenizer: Tokenizer, generator: Generator):
        self._tokenizer, self._generator = tokenizer, generator

    def encode(self, s: str, **kwargs: Any) -> tuple[np.ndarray, int]:
        """Padded token ids and their number without padding; `is_bos` (default True) adds BOS in front."""
        ids = self._tokenizer.hf.backend_tokenizer.encode(s, add_special_tokens=False).ids
        if kwargs.get("is_bos", True):
            ids = self._tokenizer.with_bos(ids)
        return self._generator.pad(ids), len(ids)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """The text of token ids, including special tokens."""
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
        """End of sequence only: the padding token may be a word."""
        return {self.eos_id} - {-1}


def _id(token: int | None) -> int:
    return -1 if token is None else token


class BrewEngine(engine_api.Engine):
    """JetStream's engine interface over our decoder: arrays in, arrays out, one sample per slot."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer):
        self.generator, self.tokenizer = generator, tokenizer

    def load_params(self, *args: Any, **kwargs: Any) -> Params:
        """The generator's parameters. Every method uses these, whatever `params` it is passed."""
        return self.generator.params

    def prefill(
        self,
        *,
        params: Params,
        existing_prefix: Prefix | None = None,
        padded_tokens: Int[np.ndarray, " T"],
        true_length: int,
    ) -> Prefix:
        """Computes the keys and values of a prompt, after an existing prefix if there is one."""
        return self.generator.prefill(padded_tokens, true_length, existing_prefix)

    def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
        """The decode state with a prefix in a slot."""
        return self.generator.insert(decode_state, prefix, slot)

    def generate(self, params: Params, decode_state: DecodeState) -> tuple[DecodeState, engine_api.ResultTokens]:
        """Samples a token in every slot, and waits for it, so that errors of the device are raised here."""
        decode_state, tokens = self.generator.step(decode_state)
        sampled = np.asarray(tokens)
        num_sampled = np.asarray(decode_state.num_sampled)
        return decode_state, _result(np.stack([sampled, np.ones_like(sampled), num_sampled], 1))

    def init_decode_state(self, *args: Any, **kwargs: Any) -> DecodeState:
        return self.generator.slots()

    def get_prefix_destination_sharding(self) -> Any:
        """None: prefill and generation use the same devices."""
        return None

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:
        """Empty: `build_tokenizer` needs no parameters."""
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
    """JetStream's result from the columns token, is valid, number of tokens, a row per slot."""
    return engine_api.ResultTokens(rows, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1)


class DecodeCall:
    """One call of Decode.

    Attributes:
      max_tokens: how many tokens the caller wants at most.
      tokens: of the prompt, followed by the sampled ones.
      remaining: how many more may be sampled.
      closed: whether the gRPC call has ended.
      driven: whether JetStream holds the call.
      error: gRPC code and message of a failure.
      version: of the weights that computed the keys and values in its slot.
      end: ends the gRPC call, whatever JetStream does.
    """

    session_cache = ""  # JetStream's only use of it is to leave out the first token

    def __init__(self, max_tokens: int):
        self.max_tokens = self.remaining = max_tokens
        self.tokens: list[int] = []
        self.closed = self.driven = False
        self.error: tuple[grpc.StatusCode, str] | None = None
        self.version = 0
        self.end: Callable[[], None] = lambda: None

    @property
    def over(self) -> bool:
        """Whether no more tokens have to be computed for the call."""
        return self.closed or self.error is not None or not self.remaining

    def fail(self, code: grpc.StatusCode, message: str) -> None:
        """Records an error, unless there is one already."""
        self.error = self.error or (code, message)


class DrivenEngine(BrewEngine):
    """The engine that JetStream's driver runs: it never raises, and it knows which request is in which slot.

    Its "tokens" are a `DecodeCall`, its prefix a request with a `Prefix`, and it keeps the decode state itself, because
    a failed step donates it. A request that is over is reported as invalid, and JetStream frees its slot.

    Args:
      generator: computes.
      tokenizer: knows the stop tokens.
      device: held while programs are dispatched.
      on_released: called with each request that JetStream no longer holds.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        device: contextlib.AbstractContextManager,
        on_released: Callable[[DecodeCall], None],
    ):
        super().__init__(generator, tokenizer)
        self._device, self._on_released = device, on_released
        self._stop = BrewTokenizer(tokenizer, generator).stop_tokens
        self._requests: dict[int, DecodeCall] = {}  # by slot
        self._slots: DecodeState | None = None
        self._version = 0

    def load(self, params: Params) -> None:
        """Uses other weights from the next step on; the keys and values of running texts are computed again."""
        sharded = self.generator.shard_params(params)
        with self._device:
            self.generator.params = sharded
            self._version += 1

    def init_decode_state(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        return None

    def prefill(self, *, params: Params, padded_tokens: DecodeCall, **kwargs: Any) -> tuple[DecodeCall, Prefix | None]:  # type: ignore[override]
        request = padded_tokens
        if request.over:
            return request, None
        try:
            with self._device:
                prefix = self._read(request)
            return request, jax.block_until_ready(prefix)  # an error of the device fails this request only
        except Exception as error:
            log.exception("prefill failed")
            request.fail(grpc.StatusCode.INTERNAL, f"prefill failed: {type(error).__name__}")
            return request, None

    def insert(self, prefix: tuple[DecodeCall, Prefix | None], decode_state: None, slot: int) -> None:  # type: ignore[override]
        request, keys_values = prefix
        self._requests[slot] = request
        if keys_values is not None:
            with self._fail_requests_on_error("insert"), self._device:
                self._put(keys_values, slot)

    def generate(self, params: Params, decode_state: None) -> tuple[None, engine_api.ResultTokens]:  # type: ignore[override]
        rows = np.zeros((self.max_concurrent_decodes, 3), np.int32)
        running = {slot: request for slot, request in self._requests.items() if not request.over}
        for slot in self._requests.keys() - running.keys():
            self._on_released(self._requests.pop(slot))
        if not running:
            return None, _result(rows)
        with self._fail_requests_on_error("step"):
            with self._device:
                for slot, request in running.items():
                    if request.version != self._version:
                        self._put(self._read(request), slot)
                assert self._slots is not None  # a running request was inserted
                self._slots, tokens = self.generator.step(self._slots)
            sampled = np.asarray(tokens)[list(running)].tolist()
            for (slot, request), token in zip(running.items(), sampled, strict=True):
                if token in self._stop:
                    request.remaining = 0
                    continue
                request.tokens.append(token)
                request.remaining -= 1
                rows[slot] = token, True, request.max_tokens - request.remaining
        return None, _result(rows)

    def _read(self, request: DecodeCall) -> Prefix:
        request.version = self._version
        return self.generator.prefill(self.generator.pad(request.tokens), len(request.tokens))

    def _put(self, prefix: Prefix, slot: int) -> None:
        self._slots = self.generator.insert(self._slots or self.generator.slots(), prefix, slot)

    @contextlib.contextmanager
    def _fail_requests_on_error(self, operation: str) -> Iterator[None]:
        """Fails every request in a slot on an error, which loses the keys and values of all slots."""
        try:
            yield
        except Exception as error:
            log.exception("%s failed", operation)
            self._slots = None
            for request in self._requests.values():
                request.fail(grpc.StatusCode.INTERNAL, f"{operation} failed: {type(error).__name__}")
