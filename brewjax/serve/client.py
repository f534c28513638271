"""The Python client of a brewjax server. Needs no JAX."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

import brewjax.serve.ranker_pb2 as pb
import brewjax.serve.ranker_pb2_grpc as ranker_pb2_grpc
from brewjax.serve import retriever_pb2, retriever_pb2_grpc

STARTUP_TIMEOUT_S = 300  # for a server that is starting: it compiles its shapes first
RETRIED_BYTES = 1 << 26  # larger requests are not retried; gRPC's own limit is below a request of 500 items
# gRPC's own retries: with jitter, within the deadline, and no sooner than a full server asks for.
RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": pb.DESCRIPTOR.services_by_name["Ranker"].full_name}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}


class Client:
    """A connection to a server; also a context manager.

        >>> question = raw("Member: a nurse. ", ["Nurse? ", "Cook? ", "Baker? "], labels=["Yes", "No"])
        >>> with Client(address) as client:  # "localhost:9000"
        ...     response = client.score(question, top_k=2)
        >>> len(response.scores), len(response.scores[0].probabilities)  # the best two, a probability for each label
        (2, 2)

    Every call raises grpc.RpcError (`code()`, `details()`) if the server refuses it or the deadline passes.

    Args:
      address: "host:port".
      token: the bearer token, if the server needs one; `reload` needs the server's admin token.
      tls: whether the connection is encrypted.
      ca: PEM file of the authorities to trust instead of the system's; implies `tls`.
      timeout: seconds for calls without a timeout of their own.
    """

    def __init__(
        self, address: str, token: str | None = None, tls: bool = False, ca: str | None = None, timeout: float = 60.0
    ):
        options = [
            ("grpc.service_config", json.dumps(RETRIES)),
            ("grpc.max_receive_message_length", -1),
            ("grpc.per_rpc_retry_buffer_size", RETRIED_BYTES),
        ]
        if tls or ca:
            authorities = None
            if ca:
                with open(ca, "rb") as file:
                    authorities = file.read()
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authorities), options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._ranker = ranker_pb2_grpc.RankerStub(self._channel)
        self._retriever = retriever_pb2_grpc.RetrieverStub(self._channel)
        self._metadata = [("authorization", f"Bearer {token}")] if token else None
        self._timeout = timeout

    def score(
        self, question: pb.Member | pb.Raw, top_k: int = 0, timeout: float | None = None, **fields: Any
    ) -> pb.ScoreResponse:
        """Ranks the items of a member, or of a `raw` prompt.

        Args:
          question: the member (see `request_from_example`) or the raw prompt.
          top_k: how many of the best items to return; 0 returns all.
          timeout: seconds; the client's by default.
          fields: other fields of ScoreRequest: request_id, truncation, normalize_over.

        Returns:
          the scores, best first, with the probability of each label.
        """
        return self._ranker.Score(_request(question, top_k=top_k, **fields), **self._call_options(timeout))

    def stream(
        self, question: pb.Member | pb.Raw, timeout: float | None = None, **fields: Any
    ) -> Iterator[pb.ScoreResponse]:
        """Scores lists of thousands, as `score`, in chunks that come as they finish.

        Args:
          question: a member with candidates, or a raw prefix with items.
          timeout: seconds; the client's by default.
          fields: other fields of ScoreRequest: request_id, truncation, normalize_over.

        Returns:
          An iterator of responses: each is sorted in itself, and every item is in one of them.
        """
        yield from _responses(self._ranker.ScoreStream(_request(question, **fields), **self._call_options(timeout)))

    def describe(self) -> pb.DescribeResponse:
        """Asks the server for its model, its tasks and its limits; waits for a server that is starting.

        Returns:
          The description.
        """
        return self._ranker.Describe(pb.DescribeRequest(), **self._call_options(None), wait_for_ready=True)

    def reload(self, folder: str = "", encoder: str = "", index: str = "") -> pb.ReloadResponse:
        """Makes the server load another checkpoint, encoder and index, all or none; needs the server's admin token.

        Args:
          folder: the model's, on the server's machine; by default the one that it was started with.
          encoder: an encoder's, likewise.
          index: of an index with the encoder's vectors, likewise.

        Returns:
          Names and versions of the model and the encoder that are served from then on.
        """
        request = pb.ReloadRequest(folder=folder, encoder=encoder, index=index)
        return self._ranker.Reload(request, **self._call_options(600.0))

    def upsert_items(self, items: Sequence[pb.Row], timeout: float | None = None, **fields: Any) -> pb.ChangeResponse:
        """Adds items to the catalogue, or replaces them; needs the server's admin token.

        Args:
          items: each with all that is known of it.
          timeout: seconds; the client's by default.
          fields: other fields of UpsertItemsRequest: request_id, surface.

        Returns:
          The response, when the items are in the server's store of changes.
        """
        request = pb.UpsertItemsRequest(items=items, **fields)
        return self._ranker.UpsertItems(request, **self._call_options(timeout))

    def upsert_members(
        self, members: Sequence[pb.Row], timeout: float | None = None, **fields: Any
    ) -> pb.ChangeResponse:
        """Adds members to the catalogue, or replaces them, as `upsert_items` does items.

        Args:
          members: each with all that is known of it.
          timeout: seconds; the client's by default.
          fields: other fields of UpsertMembersRequest: request_id, surface.

        Returns:
          The response, when the members are in the server's store of changes.
        """
        request = pb.UpsertMembersRequest(members=members, **fields)
        return self._ranker.UpsertMembers(request, **self._call_options(timeout))

    def record_events(
        self, events: Sequence[pb.RecordedEvent], timeout: float | None = None, **fields: Any
    ) -> pb.ChangeResponse:
        """Adds events to the catalogue; needs the server's admin token.

        Args:
          events: each with member, item, action and time; one that is there already is not counted twice.
          timeout: seconds; the client's by default.
          fields: other fields of RecordEventsRequest: request_id, surface.

        Returns:
          The response, when the events are in the server's store of changes.
        """
        request = pb.RecordEventsRequest(events=events, **fields)
        return self._ranker.RecordEvents(request, **self._call_options(timeout))

    def embed(
        self, inputs: Sequence[retriever_pb2.Input], timeout: float | None = None, **fields: Any
    ) -> retriever_pb2.EmbedResponse:
        """Computes vectors of members, items, texts or tokens.

        Args:
          inputs: each with one of `member`, `item`, `text` and `tokens`.
          timeout: seconds; the client's by default.
          fields: other fields of EmbedRequest: request_id, dimensions.

        Returns:
          A vector of length 1 for each input, in their order.
        """
        request = retriever_pb2.EmbedRequest(inputs=inputs, **fields)
        return self._retriever.Embed(request, **self._call_options(timeout))

    def retrieve(
        self, query: pb.Member | str | Sequence[float], k: int, timeout: float | None = None, **fields: Any
    ) -> retriever_pb2.RetrieveResponse:
        """Finds the k nearest items for a member, a text or a vector.

        Args:
          query: what items are compared with.
          k: how many items.
          timeout: seconds; the client's by default.
          fields: other fields of RetrieveRequest: request_id, required, banned, exclude.

        Returns:
          The items by id, the nearest first.
        """
        request = retriever_pb2.RetrieveRequest(k=k, **fields)
        if isinstance(query, pb.Member):
            request.member.CopyFrom(query)
        elif isinstance(query, str):
            request.text = query
        else:
            request.vector.values.extend(query)
        return self._retriever.Retrieve(request, **self._call_options(timeout))

    def retrieve_and_score(
        self, member: pb.Member, k: int, top_k: int = 0, timeout: float | None = None, **fields: Any
    ) -> retriever_pb2.RetrieveAndScoreResponse:
        """Retrieves items for a member, and puts them in the ranker's order.

        Args:
          member: of the server's catalogue, named by `id`, with the task to score.
          k: how many items are retrieved.
          top_k: how many of them, the best, are returned; 0 for all.
          timeout: seconds; the client's by default.
          fields: other fields of RetrieveAndScoreRequest: request_id, required, banned, exclude.

        Returns:
          The items by id, the best first.
        """
        request = retriever_pb2.RetrieveAndScoreRequest(member=member, k=k, top_k=top_k, **fields)
        return self._retriever.RetrieveAndScore(request, **self._call_options(timeout))

    def upsert(
        self, items: Sequence[retriever_pb2.IndexedItem], timeout: float | None = None
    ) -> retriever_pb2.UpsertResponse:
        """Adds items to the index, or replaces them; needs the server's admin token.

        Args:
          items: ids with vectors, or with what the server's encoder makes vectors of.
          timeout: seconds; the client's by default.

        Returns:
          The response, when the change is on the server's disk.
        """
        (response,) = self.upsert_stream([items], self._timeout if timeout is None else timeout)
        return response

    def delete(self, ids: Sequence[str], timeout: float | None = None) -> int:
        """Takes items out of the index; needs the server's admin token.

        Args:
          ids: of the items.
          timeout: seconds; the client's by default.

        Returns:
          How many of them were there.
        """
        (deleted,) = self.delete_stream([ids], self._timeout if timeout is None else timeout)
        return deleted

    def upsert_stream(
        self, batches: Iterable[Sequence[retriever_pb2.IndexedItem]], timeout: float | None = None
    ) -> Iterator[retriever_pb2.UpsertResponse]:
        """Adds or replaces the items of many batches, as fast as the server takes them, and no faster.

        Args:
          batches: are taken from it a few at a time, ahead of the server.
          timeout: seconds for all of them; without one the stream may stay open for good.

        Returns:
          An iterator of responses: the n-th, when the n-th batch is on the server's disk and found.
        """
        requests = (retriever_pb2.UpsertRequest(items=items) for items in batches)
        yield from _responses(self._retriever.Upsert(requests, timeout=timeout, metadata=self._metadata))

    def delete_stream(self, batches: Iterable[Sequence[str]], timeout: float | None = None) -> Iterator[int]:
        """Takes the items of many batches out of the index, as `upsert_stream` puts them in.

        Args:
          batches: of ids.
          timeout: seconds for all of them; without one the stream may stay open for good.

        Returns:
          An iterator over how many items of each batch were there.
        """
        requests = (retriever_pb2.DeleteRequest(ids=ids) for ids in batches)
        for response in _responses(self._retriever.Delete(requests, timeout=timeout, metadata=self._metadata)):
            yield response.deleted

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call_options(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": self._timeout if timeout is None else timeout, "metadata": self._metadata}


def _responses(call: Any) -> Iterator[Any]:
    try:
        yield from call
    finally:
        call.cancel()  # if the caller stopped iterating


def score_all(server: str, question: pb.Member | pb.Raw, token: str | None) -> tuple[np.ndarray, str]:
    """Scores any number of items, by one call or a stream; waits for a server that is starting.

    Args:
      server: its gRPC address, HOST:PORT.
      question: the member or the prompt, with its items.
      token: the server's bearer token; None where it asks for none.

    Returns:
      float32 probabilities [items, labels] in the order of the items, and a line about time, model and cache.

    Raises:
      RuntimeError: with the server's own words, if it refuses.
    """
    with _server_words(server), Client(server, token, timeout=STARTUP_TIMEOUT_S) as client:
        max_candidates = client.describe().limits.max_candidates
        start_time = time.perf_counter()
        fits = len(question.items) <= max_candidates
        responses = [client.score(question)] if fits else list(client.stream(question))
        seconds = time.perf_counter() - start_time
    scores = {item.index: item.probabilities for response in responses for item in response.scores}
    usage = responses[0].usage
    summary = (
        f"{responses[0].model}: {len(scores)} items in {seconds * 1000:.0f} ms; {usage.prefix_tokens} prefix tokens, "
        f"{usage.cached_tokens} cached; {usage.truncated_events} older events left out"
    )
    return np.array([scores[index] for index in range(len(scores))], np.float32), summary


def retrieve_and_rank(server: str, member: pb.Member, k: int, token: str | None) -> tuple[list[str], np.ndarray, str]:
    """Retrieves items of the server's index for a member of its catalogue and ranks them; waits for a server that is
    starting.

    Args:
      server: HOST:PORT.
      member: with an id of the catalogue.
      k: how many items are retrieved.
      token: the server's, if it wants one.

    Returns:
      The ids of the items, the best first; float32 probabilities [items, labels]; and a line about time and models.

    Raises:
      RuntimeError: with the server's own words, if it refuses.
    """
    with _server_words(server), Client(server, token, timeout=STARTUP_TIMEOUT_S) as client:
        client.describe()
        start_time = time.perf_counter()
        response = client.retrieve_and_score(member, k)
        seconds = time.perf_counter() - start_time
    probabilities = np.array([hit.probabilities for hit in response.hits], np.float32)
    summary = f"{response.encoder} found {len(response.hits)}, {response.model} ranked them: {seconds * 1000:.0f} ms"
    return [hit.id for hit in response.hits], probabilities, summary


@contextlib.contextmanager
def _server_words(server: str) -> Iterator[None]:
    """Raises a refusal in the server's own words."""
    try:
        yield
    except grpc.RpcError as error:
        raise RuntimeError(f"{server}: {error.code().name}: {error.details()}") from None


def raw(
    prefix: str | Sequence[int],
    items: Sequence[str | Sequence[int]],
    labels: Sequence[str | int],
    events: Sequence[str | Sequence[int]] = (),
    joint: bool = False,
) -> pb.Raw:
    """A prompt of the caller's own text or tokens.

    Each text is tokenised by itself, so it matters where a text is split, unless `joint`.

    Args:
      prefix: instruction and profile, or everything that the items share.
      items: the candidates; each is read after the prefix and the events, and scored at its last token.
      labels: words of one token each, or token ids; the probability of the first one orders the items.
      events: the history, oldest first; the oldest are the first to be truncated.
      joint: the tokenizer reads the prefix and each item as one text; for texts, without events.

    Returns:
      What `Client.score` and `Client.stream` take.
    """
    return pb.Raw(
        prefix=_text(prefix),
        events=map(_text, events),
        items=map(_text, items),
        labels=[label for label in labels if isinstance(label, str)],
        label_tokens=[label for label in labels if not isinstance(label, str)],
        joint=joint,
    )


def _text(text: str | Sequence[int]) -> pb.Text:
    return pb.Text(text=text) if isinstance(text, str) else pb.Text(tokens=pb.Tokens(ids=text))


def _request(question: pb.Member | pb.Raw, **fields: Any) -> pb.ScoreRequest:
    name = "member" if isinstance(question, pb.Member) else "raw"
    return pb.ScoreRequest(**{name: question}, **fields)
