"""google-jetstream 0.2.2 at arm's length: its `Engine` over our decoder; `jetstream.py` has the rest.

Nothing but these two modules knows of JetStream. What it does to a process that serves, and what is done about it here:

- It imports seqio, and so TensorFlow (18 s, 0.7 GB), for tokenizers that are not used: `_import_alone`.
- It sets the root logger to DEBUG and logs every step: `_import_alone`, and a logger of its own.
- It calls `jax.tree_map`, which is gone: `orchestrator.delete_pytree`.
- It kills the process when one of its threads raises: the engine that it drives (`DrivenEngine`) raises nothing, a
  request that fails fails alone; what its own threads raise is logged, and the thread goes on (`jetstream.Driver`).
- It never bounds its queue, checks no token, cuts long prompts silently, runs what was cancelled to the end, and turns
  tokens into text one by one, which breaks characters of several bytes: `jetstream.Decoding` does these itself.
- It has no end: `jetstream.Decoding.drain`.
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

__all__ = ["BrewEngine", "BrewTokenizer", "DecodeCall", "DrivenEngine", "jetstream_pb2_grpc", "orchestrator", "pb"]

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
            ids = self._tokenizer.with_bos(ids)
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

    def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
        return self.generator.insert(decode_state, prefix, slot)

    def generate(self, params: Params, decode_state: DecodeState) -> tuple[DecodeState, engine_api.ResultTokens]:
        """A token in every slot. It waits for it: what fails, fails here."""
        slots, tokens = self.generator.step(decode_state)
        drawn = np.asarray(tokens)
        return slots, _result(np.stack([drawn, np.ones_like(drawn), np.asarray(slots.num_sampled)], 1))

    def init_decode_state(self, *args: Any, **kwargs: Any) -> DecodeState:
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


class DecodeCall:
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


class DrivenEngine(BrewEngine):
    """The engine that the driver has: it raises nothing, and knows whose request is in which slot.

    Its "tokens" are a `DecodeCall`, its prefix a request with its prefix, and it keeps the decode state itself, which a
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
        released: Callable[[DecodeCall], None],
    ):
        super().__init__(generator, tokenizer)
        self._device, self._released = device, released
        self._stop = BrewTokenizer(tokenizer, generator).stop_tokens
        self._requests: dict[int, DecodeCall] = {}  # by slot
        self._slots: DecodeState | None = None
        self._version = 0

    def load(self, params: Params) -> None:
        """Other weights, from the next step on; texts that are running are read again with them."""
        placed = self.generator.shard_params(params)
        with self._device:
            self.generator.params = placed
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
            return request, jax.block_until_ready(prefix)  # what fails, fails here, and alone
        except Exception as error:
            log.exception("prefill failed")
            request.fail(grpc.StatusCode.INTERNAL, f"prefill failed: {type(error).__name__}")
            return request, None

    def insert(self, prefix: tuple[DecodeCall, Prefix | None], decode_state: None, slot: int) -> None:  # type: ignore[override]
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

    def _read(self, request: DecodeCall) -> Prefix:
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
