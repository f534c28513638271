"""How a server leaves: callers are told first, and nobody's request is lost."""

import asyncio
import concurrent.futures
import http.client
import json
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve import ranker_pb2_grpc
from brewjax.serve.client import raw
from tests.serve.serving import CONFIG, eventually, running

states = health_pb2.HealthCheckResponse
QUESTION = raw([7] * 100, [[8]] * 20, [5, 9])
BODY = json.dumps({"query": [7] * 100, "items": [[8]] * 20, "label_token_ids": [5, 9]}).encode()
CALLERS = 32


@pytest.mark.long
def test_nothing_is_lost_under_load_while_a_server_leaves(server, model_folder):
    """Its callers go by its health, as balancers do, and are served by another one from then on."""
    config = CONFIG.model_copy(update={"lame_duck_seconds": 60, "token_buckets": (256,), "max_candidate_tokens": 256})
    with running(model_folder, config) as leaving:
        first, done = threading.Event(), threading.Event()
        first.set()
        answered = [0, 0]  # by the one that stays, by the one that leaves
        closing = 0

        def watch() -> None:
            channel = grpc.insecure_channel(f"127.0.0.1:{leaving.port}")
            for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                if response.status != health_pb2.HealthCheckResponse.SERVING:
                    first.clear()
                    channel.close()
                    return

        def watch_to_the_end() -> list[int]:
            with grpc.insecure_channel(f"127.0.0.1:{leaving.port}") as channel:
                responses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                return [response.status for response in responses]

        def over_grpc() -> None:
            channels = [grpc.insecure_channel(f"127.0.0.1:{endpoint.port}") for endpoint in (server, leaving)]
            while not done.is_set():
                target = int(first.is_set())
                assert ranker_pb2_grpc.RankerStub(channels[target]).Score(pb.ScoreRequest(raw=QUESTION)).scores
                answered[target] += 1

        def over_http() -> None:
            nonlocal closing
            connections = [
                http.client.HTTPConnection("127.0.0.1", endpoint.http_port) for endpoint in (server, leaving)
            ]
            while not done.is_set():
                target = int(first.is_set())
                connections[target].request("POST", "/v1/score", BODY, {"content-type": "application/json"})
                response = connections[target].getresponse()
                assert response.status == 200, response.read()
                response.read()
                closing += response.getheader("connection") == "close"
                answered[target] += 1

        with concurrent.futures.ThreadPoolExecutor(CALLERS + 2) as pool:
            calls = [pool.submit(over_http if number % 2 else over_grpc) for number in range(CALLERS)]
            pool.submit(watch)
            watched = pool.submit(watch_to_the_end)
            eventually(lambda: answered[1] > CALLERS)
            hurry = asyncio.Event()
            stopping = asyncio.run_coroutine_threadsafe(leaving.stop(hurry), leaving.loop)
            check_lame_duck(leaving)
            eventually(lambda: not first.is_set() and answered[0] > CALLERS)
            leaving.loop.call_soon_threadsafe(hurry.set)
            assert stopping.result(leaving.config.drain_seconds - 5)  # though its health is watched
            assert watched.result(60) == [states.SERVING, states.NOT_SERVING]
            done.set()
            for call in calls:
                call.result()
        assert closing, "no answer said that its connection is closed"


def check_lame_duck(leaving) -> None:
    """It is not ready, alive, and answers."""
    connection = http.client.HTTPConnection("127.0.0.1", leaving.http_port)
    for path, status in (("/readyz", 503), ("/health", 503), ("/livez", 200), ("/metrics", 200)):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert (response.status, response.getheader("connection")) == (status, "close")
    with grpc.insecure_channel(f"127.0.0.1:{leaving.port}") as channel:
        assert ranker_pb2_grpc.RankerStub(channel).Score(pb.ScoreRequest(raw=QUESTION)).scores
