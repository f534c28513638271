"""Whatever is asked beside it, in whatever order and form, an item's scores are the same."""

import concurrent.futures
from typing import Any

import grpc
import jax
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

from brewjax.data.tasks.examples import example_at
from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.params import bind
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.client import raw
from brewjax.serve.requests import request_from_example
from tests.serve.serving import LABELS, ask, draw, expected, probabilities
from tests.tiny import pack


def compilations(client, http) -> tuple[int, float]:
    line = next(line for line in http.get("/metrics").text.splitlines() if line.startswith("brewjax_compilations "))
    return client.describe().compilations, float(line.split()[1])


def test_permuting_items_permutes_scores_and_changing_one_changes_no_other(client):
    prefix, items = draw(1, 60)
    before = probabilities(client.score(raw(prefix, items, LABELS)))
    order = np.random.default_rng(0).permutation(60)
    permuted = probabilities(client.score(raw(prefix, [items[at] for at in order], LABELS)))
    np.testing.assert_allclose(permuted, before[order], atol=1e-5)
    items[17] = [8, 8, 8]
    after = probabilities(client.score(raw(prefix, items, LABELS)))
    unchanged = np.arange(60) != 17
    np.testing.assert_allclose(after[unchanged], before[unchanged], atol=1e-5)
    assert abs(after[17] - before[17]).max() > 1e-3


def test_scores_are_the_same_among_many_and_nothing_compiles(client, http, alone, bundle, dataset, tasks):
    members = [
        request_from_example(dataset, tasks[row % 2], example_at(dataset, tasks[row % 2], row)) for row in (5, 6, 7)
    ]
    of_members = [probabilities(client.score(member)) for member in members]
    questions = [ask(seed % 4, 1 + 7 * seed, prefix=150 * (seed % 4)) for seed in range(16)]
    of_questions = [expected(alone, question) for question in questions]
    long = ask(99, 3000)
    of_long = expected(alone, long)
    before = compilations(client, http)
    assert before[0] == before[1] > 0

    def over_http(question: pb.Raw) -> np.ndarray:
        body = {
            "query": list(question.prefix.tokens.ids),
            "items": [list(item.tokens.ids) for item in question.items],
            "label_token_ids": LABELS,
            "apply_softmax": True,
        }
        return np.array(http.post("/v1/score", json=body).raise_for_status().json()["scores"])

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        streamed = pool.submit(lambda: list(client.stream(long)))
        futures = [
            pool.submit(lambda request=request: probabilities(client.score(request)))
            for request in [*members, *questions]
        ]
        futures += [pool.submit(over_http, question) for question in questions]
        pool.submit(client.score, questions[3], normalize_over="VOCABULARY")
    assert len(streamed.result()) > 1
    np.testing.assert_allclose(probabilities(*streamed.result()), of_long, atol=1e-5)
    for future, right in zip(futures, [*of_members, *of_questions, *of_questions], strict=True):
        np.testing.assert_allclose(future.result(), right, atol=1e-5)
    assert compilations(client, http) == before


def test_over_the_vocabulary_it_is_the_softmax_of_all_logits(client, http, bundle):
    prefix, items = draw(3, 6, prefix=20)
    prompt = EncodedPrompt([prefix], items, LABELS, [None] * len(items), "dense")
    decoder = bind(bundle.model, bundle.params)
    hidden = decoder(*jax.tree.map(lambda field: field[None], pack([prompt], 128)))
    logits = decoder.logits(hidden[0, prompt.ends])
    right = np.exp(jax.nn.log_softmax(logits))[:, LABELS]
    actual = probabilities(client.score(raw(prefix, items, LABELS), normalize_over="VOCABULARY"))
    np.testing.assert_allclose(actual, right, atol=1e-6, rtol=1e-4)
    body = {"query": prefix, "items": items, "label_token_ids": LABELS, "apply_softmax": False}
    np.testing.assert_allclose(http.post("/v1/score", json=body).json()["scores"], right, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("prefix", "events", "events_left", "prefix_left"),
    [(224, 8, 8, 224), (224, 11, 8, 224), (225, 8, 7, 225), (1024, 3, 0, 1024), (1100, 3, 0, 1024)],
)
def test_the_oldest_goes_first_where_a_prompt_is_too_long(client, bundle, prefix, events, events_left, prefix_left):
    """For a context of 1024, with events of 100 tokens; the beginning of a sequence stays."""
    random, (bos,) = np.random.default_rng(0), bundle.tokenizer.bos
    start = [bos, *random.integers(3, 300, prefix - 1).tolist()]
    history = random.integers(3, 300, (events, 100)).tolist()
    items = draw(0, 3)[1]
    response = client.score(raw(start, items, LABELS, history), truncation="TRUNCATE")
    usage = response.usage
    assert (usage.truncated_events, usage.truncated_tokens) == (events - events_left, prefix - prefix_left)
    assert usage.prefix_tokens == prefix_left + 100 * events_left
    truncated = [bos, *start[1 + prefix - prefix_left :]]
    same = client.score(raw(truncated, items, LABELS, history[events - events_left :]), truncation="REJECT")
    np.testing.assert_allclose(probabilities(response), probabilities(same), atol=1e-6)
    if usage.truncated_events or usage.truncated_tokens:
        for policy in ("REJECT", "TRUNCATION_UNSPECIFIED"):
            with pytest.raises(
                grpc.RpcError, match=r"raw: (more than )?[\d,]+ tokens before the items; at most 1,024 are read"
            ):
                client.score(raw(start, items, LABELS, history), truncation=policy)


def test_a_member_with_too_long_a_history_is_cut_unless_that_is_refused(client, dataset, tasks):
    member = request_from_example(dataset, tasks[0], example_at(dataset, tasks[0], 7))
    for event in member.history:
        event.item["title"].text = "very " * 20 + event.item["title"].text
    cut = client.score(member).usage.truncated_events
    assert 0 < cut < len(member.history)
    with pytest.raises(
        grpc.RpcError, match=f"member.history: the oldest {cut} events do not fit; set truncation to TRUNCATE"
    ):
        client.score(member, truncation="REJECT")


def test_top_k_are_the_best(client):
    question = ask(5, 40)
    client.score(question)  # both of the next go on from the cached prefix: not a bit is different
    everything, best = client.score(question), client.score(question, top_k=7)
    assert [(item.index, item.probabilities) for item in best.scores] == [
        (item.index, item.probabilities) for item in everything.scores[:7]
    ]
    first = [item.probabilities[0] for item in everything.scores]
    assert first == sorted(first, reverse=True)
    assert len(client.score(question, top_k=1_000).scores) == 40
    with pytest.raises(grpc.RpcError, match="top_k: not for ScoreStream"):
        list(client.stream(question, top_k=7))


def test_a_prefix_may_be_empty_and_an_item_a_single_text(client, http, bundle):
    response = client.score(raw([], [[7, 8], [9]], LABELS))
    alone = client.score(raw([], [[9]], LABELS))
    np.testing.assert_allclose(probabilities(response)[1:], probabilities(alone), atol=1e-5)
    single = http.post("/v1/score", json={"query": "a", "items": "b c", "label_token_ids": LABELS}).json()
    listed = http.post("/v1/score", json={"query": "a", "items": ["b c"], "label_token_ids": LABELS}).json()
    np.testing.assert_allclose(single["scores"], listed["scores"], atol=1e-6)
    over_rpc = client.score(raw("a", ["b c"], LABELS), normalize_over="VOCABULARY")
    np.testing.assert_allclose(single["scores"], probabilities(over_rpc), atol=1e-6)


def test_over_http_as_sglang_does(client, http):
    """What SGLang's tests send: no items, empty ones, repeated labels, more labels than a pass has, newer fields."""
    query, items = draw(4, 3, prefix=20)
    labels = list(range(3, 50))

    def scores(**body: Any) -> np.ndarray:
        response = http.post("/v1/score", json={"query": query, "items": items, "label_token_ids": LABELS} | body)
        return np.array(response.raise_for_status().json()["scores"])

    assert scores(items=[]).tolist() == []
    with_empty = scores(items=[[], *items])
    np.testing.assert_allclose(with_empty[1:], scores(), atol=1e-6)
    np.testing.assert_allclose(with_empty[:1], scores(query=query[:-1], items=[query[-1:]]), atol=1e-6)
    np.testing.assert_allclose(scores(label_token_ids=[7, 5, 7]), scores(label_token_ids=[7, 5])[:, [0, 1, 0]])
    many = scores(label_token_ids=labels)
    np.testing.assert_allclose(many[:, [0, 46]], scores(label_token_ids=[3, 49]), atol=1e-6)
    softmax = scores(label_token_ids=labels, apply_softmax=True, temperature=2, return_pooled_hidden_states=False)
    np.testing.assert_allclose(softmax, np.sqrt(many) / np.sqrt(many).sum(axis=1, keepdims=True), rtol=1e-4)
    over_labels = probabilities(client.score(raw(query, items, labels)))
    np.testing.assert_allclose(over_labels, many / many.sum(axis=1, keepdims=True), rtol=1e-4)
    with pytest.raises(grpc.RpcError, match=r"raw\.labels: 47 of them; give at most 32 to ScoreStream"):
        list(client.stream(raw(query, items, labels)))


def test_query_and_items_are_one_text_to_the_tokenizer_as_sglang_has_them(client, http, bundle):
    query, items = "for a nurse in Ber", ["lin", "", "gamo, Italy", "\n"]
    tokenizer = bundle.tokenizer
    alone, *joined = map(tokenizer.with_bos, tokenizer.encode([query, *(query + item for item in items)], begins=True))
    assert joined[0][: len(alone)] != alone  # the tokens of "Berlin" are not those of "Ber" and "lin"
    expected = [
        probabilities(client.score(raw(ids[:-1], [ids[-1:]], LABELS), normalize_over="VOCABULARY"))[0] for ids in joined
    ]
    body = {"query": query, "items": items, "label_token_ids": LABELS}
    together, apart = (
        http.post("/v1/score", json=body | {"joint": joint}).raise_for_status().json()["scores"]
        for joint in (True, False)
    )
    np.testing.assert_allclose(together, expected, atol=1e-6)
    assert http.post("/v1/score", json=body).json()["scores"] == together
    assert abs(np.subtract(apart, expected)).max() > 1e-4
    for question, message in (
        (raw([7], ["a"], LABELS, joint=True), "raw.joint: only for texts"),
        (raw("a", ["a"], LABELS, ["b"], joint=True), "raw.joint: only for texts, without events"),
        (raw("a" * 8_000, ["a"] * 501, LABELS, joint=True), "raw.joint: the prefix is read again with each item"),
    ):
        with pytest.raises(grpc.RpcError, match=message):
            client.score(question)


def test_a_delimiter_lies_between_the_query_and_each_item_as_in_sglangs_multi_item_mode(
    server, client, http, bundle, monkeypatch
):
    delimiter, query, items = 9, "for a nurse in Ber", ["lin", "gamo"]
    setting = server.service.config.model_copy(update={"item_delimiter": delimiter})
    monkeypatch.setattr(server.service, "config", setting)
    body = {"query": query, "items": items, "label_token_ids": LABELS}
    (prefix,) = bundle.tokenizer.encode([query], begins=True)
    prefix = [*bundle.tokenizer.with_bos(prefix), delimiter]
    expected = client.score(raw(prefix, items, LABELS), normalize_over="VOCABULARY")
    scores = http.post("/v1/score", json=body).raise_for_status().json()["scores"]
    np.testing.assert_allclose(scores, probabilities(expected), atol=1e-6)


def test_over_http_members_are_ranked_as_over_grpc(client, http, dataset, tasks):
    member = request_from_example(dataset, tasks[0], example_at(dataset, tasks[0], 7))
    body = MessageToDict(pb.ScoreRequest(member=member, top_k=3, request_id="r1"), preserving_proto_field_name=True)
    answer = http.post("/v1/rank", json=body, headers={"grpc-timeout": "30S"}).json()
    over_grpc = client.score(member, top_k=3)
    for item, same in zip(answer["scores"], over_grpc.scores, strict=True):
        assert item["index"] == same.index
        np.testing.assert_allclose(item["probabilities"], same.probabilities, atol=1e-6)
    assert (answer["request_id"], answer["model"]) == ("r1", over_grpc.model)
    assert http.get("/v1/models").json()["data"][0]["id"] == over_grpc.model
    for changed, headers, status, message in (
        ({"member": {"task": "no", "items": [{}]}}, {}, 400, "member.task: no task 'no'"),
        ({"membr": {}}, {}, 400, 'the body: Message type "brewjax.ranker.v1.ScoreRequest" has no field named "membr"'),
        ({}, {"grpc-timeout": "soon"}, 400, "grpc-timeout: give a number and a unit"),
        ({}, {"grpc-timeout": "1n"}, 504, "not answered within 1e-09 seconds"),
    ):
        refused = http.post("/v1/rank", json=body | changed, headers=headers)
        assert (refused.status_code, refused.json()["message"][: len(message)]) == (status, message)


@pytest.mark.parametrize("texts", [True, False])
def test_items_are_read_first_where_that_is_asked(client, http, texts):
    query, items = ("for a nurse", ["Acme ", "Berlin "]) if texts else ([7, 8], [[9], [10, 11]])
    body = {"query": query, "items": items, "label_token_ids": LABELS, "item_first": True, "apply_softmax": True}
    scores = http.post("/v1/score", json=body).json()["scores"]
    joined = raw("" if texts else [], [item + query for item in items], LABELS)
    np.testing.assert_allclose(scores, probabilities(client.score(joined)), atol=1e-6)
    body["query"] = [7] if texts else "for a nurse"
    mixed = http.post("/v1/score", json=body)
    assert mixed.status_code == 400
    assert mixed.json()["message"].startswith("items: with item_first")
