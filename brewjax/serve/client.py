"""The Python client of a brewjax server. Needs no JAX."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve import ranker_pb2_grpc

STARTUP_TIMEOUT_S = 300  # seconds for a server that is starting: it compiles its shapes first
RETRIED_BYTES = 1 << 26  # larger requests are not tried again; gRPC's own limit is far less than 500 items
# gRPC's own retries: with jitter, within the deadline, and not sooner than a full server asks for.
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

    Every call raises grpc.RpcError (`code()`, `details()`) where the server refuses, or the deadline passes.

    Args:
      address: "host:port".
      token: the bearer token, where the server asks for one; `reload` needs the server's admin token.
      tls: the connection is encrypted; `ca` is a PEM file to trust instead of the system's authorities.
      timeout: seconds for calls that name none.
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
            trusted = None
            if ca:
                with open(ca, "rb") as file:
                    trusted = file.read()
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted), options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._ranker = ranker_pb2_grpc.RankerStub(self._channel)
        self._metadata = [("authorization", f"Bearer {token}")] if token else None
        self._timeout = timeout

    def score(
        self, question: pb.Member | pb.Raw, top_k: int = 0, timeout: float | None = None, **fields: Any
    ) -> pb.ScoreResponse:
        """Ranks the items of a member, or of a `raw` prompt: the best first.

        Args:
          top_k: how many to return; 0: all.
          fields: of ScoreRequest: request_id, truncation, normalize_over.
        """
        return self._ranker.Score(_request(question, top_k=top_k, **fields), **self._call(timeout))

    def stream(
        self, question: pb.Member | pb.Raw, timeout: float | None = None, **fields: Any
    ) -> Iterator[pb.ScoreResponse]:
        """As `score` for lists of thousands: chunks as they finish, each ordered in itself, every item in one."""
        call = self._ranker.ScoreStream(_request(question, **fields), **self._call(timeout))
        try:
            yield from call
        finally:
            call.cancel()  # of whoever stopped listening

    def describe(self) -> pb.DescribeResponse:
        """The model, the tasks it knows, and the limits."""
        return self._ranker.Describe(pb.DescribeRequest(), **self._call(None), wait_for_ready=True)

    def reload(self, folder: str = "") -> str:
        """Has the server take up another checkpoint; returns its name and version."""
        return self._ranker.Reload(pb.ReloadRequest(folder=folder), **self._call(600.0)).model

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": self._timeout if timeout is None else timeout, "metadata": self._metadata}


def score_all(server: str, question: pb.Member | pb.Raw, token: str | None) -> tuple[np.ndarray, str]:
    """Probabilities [items, labels] in the order of the items, however many there are, and how the server came by them.

    Waits for a server that is starting. RuntimeError with the server's own words where it refuses.
    """
    try:
        with Client(server, token, timeout=STARTUP_TIMEOUT_S) as client:
            most = client.describe().limits.max_candidates
            began = time.perf_counter()
            responses = [client.score(question)] if len(question.items) <= most else list(client.stream(question))
            seconds = time.perf_counter() - began
    except grpc.RpcError as error:
        raise RuntimeError(f"{server}: {error.code().name}: {error.details()}") from None
    scores = {item.index: item.probabilities for response in responses for item in response.scores}
    usage = responses[0].usage
    how = (
        f"{responses[0].model}: {len(scores)} items in {seconds * 1000:.0f} ms; {usage.prefix_tokens} prefix tokens, "
        f"{usage.cached_tokens} cached; {usage.truncated_events} older events left out"
    )
    return np.array([scores[index] for index in range(len(scores))], np.float32), how


def raw(
    prefix: str | Sequence[int],
    items: Sequence[str | Sequence[int]],
    labels: Sequence[str | int],
    events: Sequence[str | Sequence[int]] = (),
) -> pb.Raw:
    """A prompt in words or tokens of your own: each item is read after the prefix and the events, and a label answers.

    Texts are turned into tokens one by one, so where you cut a text matters.
    """
    return pb.Raw(
        prefix=_text(prefix),
        events=map(_text, events),
        items=map(_text, items),
        labels=[label for label in labels if isinstance(label, str)],
        label_tokens=[label for label in labels if not isinstance(label, str)],
    )


def _text(text: str | Sequence[int]) -> pb.Text:
    return pb.Text(text=text) if isinstance(text, str) else pb.Text(tokens=pb.Tokens(ids=text))


def _request(question: pb.Member | pb.Raw, **fields: Any) -> pb.ScoreRequest:
    name = "member" if isinstance(question, pb.Member) else "raw"
    return pb.ScoreRequest(**{name: question}, **fields)
