"""Documents ranked for a query, by the clients that other systems have."""

import cohere
import numpy as np
import pytest

from brewjax.config import ConfigError
from brewjax.serve.client import raw
from brewjax.serve.config import RerankConfig
from tests.serve.serving import probabilities

QUERY, DOCUMENTS = "jobs for a nurse", ["nurse in Berlin", "cook", "nurse at Acme"]


@pytest.fixture
def relevance(client) -> np.ndarray:
    """Of each document, from the prompts that the setting describes."""
    items = [f"Document: {document}\nDoes the document answer the query?" for document in DOCUMENTS]
    return probabilities(client.score(raw(f"Query: {QUERY}\n", items, ["Yes", "No"])))[:, 0]


@pytest.mark.parametrize("client_class", [cohere.Client, cohere.ClientV2])
def test_coheres_client(server, relevance, client_class):
    reranker = client_class("any key", base_url=f"http://127.0.0.1:{server.http_port}")
    answer = reranker.rerank(model="any", query=QUERY, documents=DOCUMENTS, top_n=2)
    best = np.argsort(-relevance)[:2]
    assert [result.index for result in answer.results] == best.tolist()
    np.testing.assert_allclose([result.relevance_score for result in answer.results], relevance[best], atol=1e-6)


def test_documents_are_returned_as_jina_and_vllm_do(http, relevance):
    for path, default in (("/rerank", True), ("/v1/rerank", True), ("/v2/rerank", False)):
        for body, show in (({}, default), ({"return_documents": True}, True), ({"return_documents": False}, False)):
            documents = [DOCUMENTS[0], *({"text": document} for document in DOCUMENTS[1:])]
            results = http.post(path, json={"query": QUERY, "documents": documents} | body).json()["results"]
            assert [result["index"] for result in results] == np.argsort(-relevance).tolist()
            for result in results:
                assert result.get("document") == ({"text": DOCUMENTS[result["index"]]} if show else None)


def test_pairs_as_vllm_scores_them(http, relevance):
    def score(text_1: str | list[str], text_2: str | list[str]) -> list[float]:
        answer = http.post("/score", json={"text_1": text_1, "text_2": text_2}).raise_for_status().json()
        assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
        return [entry["score"] for entry in answer["data"]]

    np.testing.assert_allclose(score(QUERY, DOCUMENTS), relevance, atol=1e-6)
    np.testing.assert_allclose(score([QUERY] * 3, DOCUMENTS), relevance, atol=1e-6)
    np.testing.assert_allclose(score(QUERY, DOCUMENTS[1]), relevance[1:2], atol=1e-6)


def test_what_is_wrong_is_named(http):
    for path, body, message in (
        ("/rerank", {"query": "a", "documents": []}, "documents: 0 of them"),
        ("/rerank", {"query": "a"}, "documents: Field required"),
        ("/rerank", {"query": "a b " * 2000, "documents": ["b"]}, "query: "),
        ("/rerank", {"query": "a", "documents": ["b"], "top": 1}, "top: Extra inputs"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1: 2 texts, and text_2 has 1"),
        ("/score", {"text_1": [], "text_2": []}, "text_1: 0 texts"),
    ):
        answer = http.post(path, json=body)
        assert (answer.status_code, answer.json()["message"][: len(message)]) == (400, message)
    with pytest.raises(ConfigError, match=r"rerank.yaml:1: query: 'no place' has no \{query\}"):
        RerankConfig.parse("query: no place", "rerank.yaml")
