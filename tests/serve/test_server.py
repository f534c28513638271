"""A real client against a real server."""

import grpc
import numpy as np
import pytest
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

from brewjax.data.tasks.examples import example_at
from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.generate import Generator
from brewjax.serve import Client
from brewjax.serve.client import raw
from brewjax.serve.config import DecodeConfig
from brewjax.serve.requests import request_from_example
from tests.serve.serving import CONFIG, draw, probabilities, running


@pytest.mark.parametrize("count", [1, 50, 500])
def test_every_way_to_ask_gives_the_same_scores(client, http, alone, count):
    prefix, items = draw(count, count)
    labels = [5, 9, 7]
    expected = alone.score_encoded([EncodedPrompt([prefix], items, labels, [None] * count, "dense")])[0]
    one_by_one = [EncodedPrompt([prefix], [item], labels, [None], "dense") for item in items]
    np.testing.assert_allclose(expected, np.concatenate(alone.score_encoded(one_by_one)), atol=1e-5)
    cold, hot = (client.score(raw(prefix, items, labels)) for _ in range(2))
    assert (cold.usage.cached_tokens, hot.usage.cached_tokens) == (0, 200)
    body = {"query": prefix, "items": items, "label_token_ids": labels, "apply_softmax": True}
    over_http = http.post("/v1/score", json=body).raise_for_status().json()
    for scores in (probabilities(cold), probabilities(hot), over_http["scores"]):
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert over_http["usage"]["cached_tokens"] == 200
    order = [item.index for item in cold.scores]
    assert order == np.argsort(-probabilities(cold)[:, 0], kind="stable").tolist()
    top = client.score(raw(prefix, items, labels), top_k=3)
    assert [item.index for item in top.scores] == [item.index for item in hot.scores[:3]]


def test_the_service_says_a_member_as_evaluation_does(client, bundle, dataset, tasks):
    for task in tasks:
        example = example_at(dataset, task, 7)
        prompt = bundle.verbalizer(dataset, task).prompt(task, example, bundle.prompts.score_style)
        response = client.score(request_from_example(dataset, task, example), request_id="mine")
        expected = bundle.scorer([bundle.encode(prompt)]).score(prompt)
        np.testing.assert_allclose(probabilities(response), expected, atol=1e-5)
        assert list(response.labels) == list(task.words)
        assert response.request_id == "mine"
        assert response.usage.truncated_events == prompt.num_truncated_events
        assert response.scores[0].id == str(100 + example.candidates[response.scores[0].index])


def test_jetstreams_decode_is_on_the_same_port(model_folder, bundle, alone):
    generation = DecodeConfig(slots=2, context=64)
    config = CONFIG.model_copy(update={"decode": True, "generation": generation})
    prefix, items = draw(0, 40)
    expected = alone.score_encoded([EncodedPrompt([prefix], items, [5, 9], [None] * 40, "dense")])[0]
    generator = Generator(bundle.model, bundle.params, slots=1, context=64)
    (generated,) = generator.generate([bundle.tokenizer.bos + prefix[:20]], 12)
    with running(model_folder, config) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        request = jetstream_pb2.DecodeRequest(
            token_content=jetstream_pb2.DecodeRequest.TokenContent(token_ids=prefix[:20]), max_tokens=12
        )
        responses = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(request)
        with Client(f"127.0.0.1:{server.port}") as client:  # while it says something
            for _ in range(5):
                np.testing.assert_allclose(probabilities(client.score(raw(prefix, items, [5, 9]))), expected, atol=1e-5)
        heard = [token for each in responses for token in each.stream_content.samples[0].token_ids]
    assert heard == generated
