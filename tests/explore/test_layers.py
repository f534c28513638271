"""Layer by layer: the last one is the score, and attention is what the mask allows and the planted weights say."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def context(explorer):
    return explorer.context("m5", items=3)


def test_the_last_layer_is_the_score(context):
    layers = context.layers(context.item_ids[1])
    assert len(layers.log_odds) == context.bundle.model.layers + 1
    assert layers.log_odds[-1] == pytest.approx(context.log_odds[1], abs=1e-5)
    assert layers.log_odds[0] != pytest.approx(layers.log_odds[-1], abs=1e-3)
    assert f"{layers.log_odds[-1]:+.2f}" in repr(layers)


def test_attention_adds_up_to_one_over_the_pieces(context):
    layers = context.layers(context.item_ids[1])
    model = context.bundle.model
    assert layers.attention.shape == (model.layers, model.heads, len(context.text.events) + 2)
    assert layers.attention.sum(-1) == pytest.approx(1, abs=1e-5)
    assert layers.pieces[-1] == "the question"
    assert len(layers.table()) == len(layers.pieces)
    of_heads = layers.heads(1)
    assert of_heads["head 2"].sort_values().tolist() == pytest.approx(sorted(layers.attention[0, 1]))
    assert of_heads["piece"].iloc[0] == layers.pieces[layers.attention[0].mean(0).argmax()]


def test_uniform_attention_is_seen_as_such(planted, context):
    layers = planted.context("m5", items=3).layers(context.item_ids[1])
    sizes = np.array([piece.tokens for piece in context.change(items=[context.item_ids[1]]).prompt().pieces()])
    assert layers.attention == pytest.approx(np.broadcast_to(sizes / sizes.sum(), layers.attention.shape), abs=1e-5)
    assert layers.log_odds[0] == pytest.approx(0, abs=1e-6)  # the cause is seen by attention only
    assert layers.log_odds[1] > 0.5
