"""`Retrieval`: embeds members, items and texts, and finds the nearest items in an index that callers change."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from brewjax.config import ConfigError
from brewjax.model.sharding import MeshConfig
from brewjax.retrieve.encoder import Encoder, truncate
from brewjax.retrieve.index import CONFIG, Hits, Id, Index, IndexConfig, VectorError
from brewjax.serve import ranker_pb2
from brewjax.serve import retriever_pb2 as pb
from brewjax.serve.batching import Batcher
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.config import ServeConfig
from brewjax.serve.members import RequestFacts, read_items, read_member, request_time
from brewjax.serve.refusals import MAX_ID
from brewjax.serve.service import Service, check_finite
from brewjax.serve.texts import Texts

BATCH = 256  # texts that are embedded, or queries that are searched for, at once
T = TypeVar("T")


class Query(NamedTuple):
    """One search: a vector, how many items, and which."""

    vector: np.ndarray
    k: int
    required: int
    banned: int
    exclude: frozenset[Id]


class Retrieval:
    """An encoder and, where there is one, an index of its vectors.

    Args:
      config: names their folders, and has the limits of requests.
      mesh: the devices of the encoder.
      device: is held by whatever computes on them.
      service: counts, times and logs requests, has the catalogues, and scores what is retrieved.
      encoder: that of the folder, where it is loaded already.

    Raises:
      ConfigError: the folder is no encoder's, or the index has vectors of another encoder.

    Attributes:
      model: name and version of the encoder.
      successor: what is served instead, from the moment on when it is set. Changes that are being made are made there
        too, so that what is acknowledged is in the index that is served.
    """

    def __init__(
        self,
        config: ServeConfig,
        mesh: MeshConfig,
        device: threading.Lock,
        service: Service,
        encoder: Encoder | None = None,
    ):
        folder = config.encoder or ""
        self.config, self._mesh, self._device, self._service = config, mesh, device, service
        self.encoder, self.model = encoder or Encoder.load(folder, mesh), Encoder.version(folder)
        self.successor: Retrieval | None = None
        self._num_requests, self._idle = 0, asyncio.Event()
        self._texts = Texts(self.encoder.bundle.tokenizer, config.special_tokens)
        self._embed = Batcher(self._embed_texts, BATCH)
        self._search = Batcher(self._search_index, BATCH)
        if encoder is None:
            check_finite(self.encoder.bundle)
        self.index = self._open_index(config) if config.index else None
        if encoder is None:
            self._embed_texts([self.encoder.bundle.tokenizer.with_bos([0])])  # compiles before the first request

    def _open_index(self, config: ServeConfig) -> Index:
        folder = Path(config.index or "")
        if not (folder / CONFIG).is_file():
            size = self.encoder.check_dimensions(None)
            return Index.create(folder, IndexConfig(dimensions=size, ids="text", model=self.model), self._device)
        model = IndexConfig.load(folder / CONFIG).model
        if model != self.model:
            made = f"of encoder {model}" if model else "that do not say of which encoder"
            raise config.error(f"{folder} has vectors {made}; this one is {self.model}: build it anew", "index")
        return Index(folder, self._device)

    def reopen(self, encoder: str | None, index: str | None) -> Retrieval:
        """Makes ready to serve other folders.

        Args:
          encoder: the folder of an encoder.
          index: the folder of an index of its vectors; None where there is none.

        Returns:
          What serves the folders: this, where they hold what is served; otherwise another, until whose requests this
          one serves on.

        Raises:
          ValueError: a folder cannot be read, or the index has vectors of another encoder.
        """
        config = self.config.model_copy(update={"encoder": encoder, "index": index})
        if index and not (Path(index) / CONFIG).is_file():
            raise ValueError(f"{index}: no index there")
        try:
            same = Encoder.version(encoder or "") == self.model
            if same and (self.index.is_at(Path(index)) if self.index and index else self.index is index):
                return self
            loaded = self.encoder if same else None
            return Retrieval(config, self._mesh, self._device, self._service, loaded)
        except (ConfigError, VectorError):
            raise
        except Exception as error:  # a broken folder can raise any of many
            raise ValueError(f"{encoder} cannot be read: {error}") from error

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Vectors of members, items, texts or tokens. Raises ValueError naming the field that is wrong."""
        async with self._request_scope("Embed", request.request_id) as request_id:
            self._check_count(len(request.inputs), "inputs")
            size = self.encoder.check_dimensions(request.dimensions or None)
            texts = await asyncio.to_thread(self._read_inputs, request.inputs)
            vectors = np.stack(await self._embed(texts))
            return pb.EmbedResponse(
                request_id=request_id,
                vectors=[pb.Vector(values=vector) for vector in truncate(vectors, size)],
                tokens=sum(map(len, texts)),
                model=self.model,
            )

    async def retrieve(self, request: pb.RetrieveRequest) -> pb.RetrieveResponse:
        """Finds the nearest items.

        Args:
          request: with a member, a text or a vector, and how many items.

        Returns:
          The items, the nearest first.

        Raises:
          ValueError: names the field that is wrong.
        """
        async with self._request_scope("Retrieve", request.request_id) as request_id:
            index = self._need_index()
            if not 0 < request.k <= self.config.max_retrieved:
                raise ValueError(f"k: {request.k:,}; give 1 to {self.config.max_retrieved:,}")
            hits = await self._find(request, await self._query_vector(request, index), request.exclude)
            return pb.RetrieveResponse(request_id=request_id, hits=hits, model=self.model)

    async def retrieve_and_score(
        self, request: pb.RetrieveAndScoreRequest, seconds: float | None = None
    ) -> pb.RetrieveAndScoreResponse:
        """The best of the nearest items, as the ranker orders them, for a member of the catalogue.

        Args:
          seconds: until the caller's deadline; None without one.

        Raises:
          ValueError: naming the field that is wrong.
        """
        async with self._request_scope("RetrieveAndScore", request.request_id) as request_id:
            index, member = self._need_index(), ranker_pb2.Member()
            member.CopyFrom(request.member)
            member.now.FromMicroseconds(request_time(member))  # one time, and one catalogue, for all that follows
            if not 0 < request.k <= self.config.max_candidates:
                raise ValueError(f"k: {request.k:,}; give 1 to {self.config.max_candidates:,}")
            catalogue = self._service.catalogue(member)
            if catalogue is None or not member.id:
                raise ValueError("member.id: give a member of the server's catalogue (set `catalogue`)")
            if member.items:
                raise ValueError("member.items: the index has them; use Score to rank given items")
            task = self._service.task(member)
            example = await asyncio.to_thread(catalogue.example, task, member)
            past = () if task.questions.repeats else catalogue.past_items(example)
            text = await asyncio.to_thread(self._read_member, _for_encoder(member), "member", catalogue)
            vector = truncate(np.stack(await self._embed([text])), self._size(index))[0]
            hits = await self._find(request, vector, [*request.exclude, *past])
            response = pb.RetrieveAndScoreResponse(request_id=request_id, encoder=self.model)
            if hits:
                member.items.extend(ranker_pb2.Item(id=hit.id) for hit in hits)
                question = ranker_pb2.ScoreRequest(request_id=request_id, member=member, top_k=request.top_k)
                scored = await self._service.score(question, seconds, catalogue)
                response.labels.extend(scored.labels)
                response.model = scored.model
                for score in scored.scores:
                    response.hits.add(
                        id=score.id, probabilities=score.probabilities, similarity=hits[score.index].score
                    )
            return response

    async def _find(
        self, request: pb.RetrieveRequest | pb.RetrieveAndScoreRequest, vector: np.ndarray, exclude: Iterable[str]
    ) -> list[pb.Hit]:
        """The nearest items of a vector within the request's filter."""
        left_out = frozenset(self._read_id(id_, "exclude") for id_ in exclude)
        query = Query(vector, request.k, request.required, request.banned, left_out)
        ((ids, scores),) = await self._search([query])
        return [pb.Hit(id=str(id_), score=score) for id_, score in zip(ids, scores.tolist(), strict=True)]

    async def upsert(self, request: pb.UpsertRequest) -> pb.UpsertResponse:
        """Adds or replaces items: all of the request's, or none. Raises ValueError naming the field that is wrong."""
        return await self._change(Retrieval._upsert, request)

    async def _upsert(self, request: pb.UpsertRequest) -> pb.UpsertResponse:
        arrival_time = time.monotonic()
        async with self._request_scope("Upsert", request.request_id) as request_id:
            index = self._need_index()
            self._check_count(len(request.items), "items")
            ids = [self._read_id(item.id, f"items[{n}].id") for n, item in enumerate(request.items)]
            texts, vectors = await asyncio.to_thread(self._read_contents, request.items, index)
            embedded = truncate(np.stack(await self._embed([*texts.values()])), self._size(index)) if texts else ()
            vectors |= dict(zip(texts, embedded, strict=True))
            bits = np.array([item.bits for item in request.items], np.int32)
            stacked = np.stack([vectors[n] for n in range(len(ids))])
            await asyncio.to_thread(index.upsert, ids, stacked, bits)
            content = "text" if texts else "vector"
            self._service.metrics.index_lag.labels(content).observe(time.monotonic() - arrival_time)
            return pb.UpsertResponse(request_id=request_id, items=len(index), model=self.model)

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """Takes items out."""
        return await self._change(Retrieval._delete, request)

    async def _delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        async with self._request_scope("Delete", request.request_id) as request_id:
            index = self._need_index()
            self._check_count(len(request.ids), "ids")
            ids = [self._read_id(id_, f"ids[{n}]") for n, id_ in enumerate(request.ids)]
            return pb.DeleteResponse(request_id=request_id, deleted=await asyncio.to_thread(index.delete, ids))

    async def _change(self, change: Callable[[Retrieval, Any], Awaitable[T]], request: Any) -> T:
        """Makes a change here, unless there is a successor; and there, if there is one by the time that it is made."""
        if not self.successor:
            response = await change(self, request)
            if not self.successor:
                return response
        return await self.successor._change(change, request)

    async def retire(self) -> None:
        """Waits until the requests are answered that began before there was a `successor`, and closes."""
        if self._num_requests:
            await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Waits for changes that are being written."""
        if self.index:
            await asyncio.to_thread(self.index.close)

    # --- reading requests

    @contextlib.asynccontextmanager
    async def _request_scope(self, method: str, request_id: str) -> AsyncIterator[str]:
        """Yields the request's id, made up when empty; raises TimeoutError after `timeout_seconds`."""
        limit = self.config.timeout_seconds
        with self._counted(), self._service.request_scope(method, request_id[:MAX_ID]):
            if len(request_id) > MAX_ID:
                raise ValueError(f"request_id: {len(request_id):,} characters; give at most {MAX_ID}")
            try:
                async with asyncio.timeout(limit):
                    yield request_id or uuid.uuid4().hex
            except TimeoutError:
                raise TimeoutError(f"not answered within {limit:g} seconds") from None

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1
            if not self._num_requests and self.successor:
                self._idle.set()

    def _check_count(self, count: int, field: str) -> None:
        if not 0 < count <= self.config.max_candidates:
            raise ValueError(f"{field}: {count:,} of them; give 1 to {self.config.max_candidates:,}")

    def _need_index(self) -> Index:
        if self.index is None:
            raise ValueError("this server has an encoder, but no index (set `index`)")
        return self.index

    def _read_inputs(self, inputs: Sequence[pb.Input]) -> list[list[int]]:
        return [self._read_input(entry, f"inputs[{n}]") for n, entry in enumerate(inputs)]

    def _read_input(self, entry: pb.Input, field: str) -> list[int]:
        match entry.WhichOneof("kind"):
            case "member":
                return self._read_member(entry.member, f"{field}.member")
            case "item":
                return self._read_item(entry.item, f"{field}.item")
            case "text":
                return self._read_text(entry.text, f"{field}.text")
            case "tokens":
                return self._read_tokens(entry.tokens.ids, f"{field}.tokens")
        raise ValueError(f"{field}: give member, item, text or tokens")

    def _read_contents(
        self, items: Sequence[pb.IndexedItem], index: Index
    ) -> tuple[dict[int, list[int]], dict[int, np.ndarray]]:
        """The texts of items to embed, and the vectors of the others, by their number."""
        texts: dict[int, list[int]] = {}
        vectors: dict[int, np.ndarray] = {}
        for n, item in enumerate(items):
            match item.WhichOneof("content"):
                case "vector":
                    vectors[n] = self._read_vector(item.vector, index, f"items[{n}].vector")
                case "item":
                    texts[n] = self._read_item(item.item, f"items[{n}].item")
                case "text":
                    texts[n] = self._read_text(item.text, f"items[{n}].text")
                case _:
                    raise ValueError(f"items[{n}]: give item, vector or text")
        return texts, vectors

    def _read_member(self, member: ranker_pb2.Member, field: str, catalogue: Catalogue | None = None) -> list[int]:
        task = self.encoder.task
        if member.task not in ("", task.name):
            raise ValueError(f"{field}.task: '{member.task}'; this encoder reads the history of task '{task.name}'")
        card = self.encoder.surface.card
        if member.id and not catalogue:
            catalogue = self._service.catalogue(member)
        if catalogue and (part := catalogue.dataset.card.differing_part(card)):
            raise ValueError(f"{field}.surface: the catalogue's '{part}' are not those of the encoder; name another")
        dataset, example, facts = read_member(card, task, member, catalogue)
        return self.encoder.sides(dataset, facts).member(example)

    def _read_item(self, item: pb.Attributes, field: str) -> list[int]:
        tables = read_items(self.encoder.surface.card, self.encoder.task, {field: item.values})
        return self.encoder.sides(tables, RequestFacts(tables)).items(np.zeros(1, int), int(time.time() * 1e6))[0]

    def _read_text(self, text: str, field: str) -> list[int]:
        tokenizer = self.encoder.bundle.tokenizer
        (tokens,) = self._texts.read([text], self.encoder.bundle.prompts.max_tokens, [field], begins=True)
        return self._check_tokens(tokenizer.with_bos(tokens) + tokenizer.eos if tokens else [], field)

    def _read_tokens(self, tokens: Sequence[int], field: str) -> list[int]:
        limit, size = self.encoder.bundle.prompts.max_tokens, self.encoder.bundle.model.vocab_size
        if len(tokens) > limit:
            raise ValueError(f"{field}: {len(tokens):,} tokens; at most {limit:,} are read")
        if tokens and max(tokens) >= size:
            raise ValueError(f"{field}: no token {max(tokens)}; the encoder knows {size:,}")
        return self._check_tokens([*tokens], field)

    def _check_tokens(self, tokens: list[int], field: str) -> list[int]:
        if not tokens:
            raise ValueError(f"{field}: empty")
        return tokens

    def _read_vector(self, vector: pb.Vector, index: Index, field: str) -> np.ndarray:
        values = np.array(vector.values, np.float32)
        if len(values) != self._size(index):
            raise ValueError(f"{field}: {len(values)} numbers; vectors of this index have {self._size(index)}")
        if not np.isfinite(values).all():
            raise ValueError(f"{field}: not all numbers are finite")
        return values

    def _read_id(self, id_: str, field: str) -> Id:
        if self._need_index().config.ids == "text":
            return id_
        try:
            return int(id_)
        except ValueError:
            raise ValueError(f"{field}: '{id_}'; ids of this index are whole numbers") from None

    async def _query_vector(self, request: pb.RetrieveRequest, index: Index) -> np.ndarray:
        match request.WhichOneof("query"):
            case "vector":
                return self._read_vector(request.vector, index, "vector")
            case "member":
                text = await asyncio.to_thread(self._read_member, request.member, "member")
            case "text":
                text = self._read_text(request.text, "text")
            case _:
                raise ValueError("query: give member, vector or text")
        return truncate(np.stack(await self._embed([text])), self._size(index))[0]

    # --- computing

    def _size(self, index: Index) -> int:
        return index.config.dimensions

    def _embed_texts(self, texts: Sequence[list[int]]) -> list[np.ndarray]:
        with self._device:
            return list(self.encoder.embed(texts))

    def _search_index(self, queries: Sequence[Query]) -> list[Hits]:
        """All queries in one scan, each with its own filter; each then gets its own k."""
        index, filtered = self._need_index(), [query for query in queries if query.required or query.banned]
        for query in filtered[:1]:  # a sample: this reads the bits of all rows
            share = index.share_admitted(query.required, query.banned)
            self._service.metrics.filter_share.observe(share)
        hits = index.search(
            np.stack([query.vector for query in queries]),
            max(query.k for query in queries),
            [query.required for query in queries],
            [query.banned for query in queries],
            [query.exclude for query in queries],
        )
        return [Hits(ids[: query.k], scores[: query.k]) for query, (ids, scores) in zip(queries, hits, strict=True)]


def _for_encoder(member: ranker_pb2.Member) -> ranker_pb2.Member:
    """The member without the ranker's task: the encoder reads the history of its own."""
    query = ranker_pb2.Member(id=member.id, surface=member.surface)
    if member.HasField("now"):
        query.now.CopyFrom(member.now)
    return query
