"""Vectors are the encoder's, their map keeps what two dimensions can, and calibration is that of the predictions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

import brewjax
from brewjax.data.tasks.examples import example_at
from brewjax.explore.calibration import Calibration
from brewjax.explore.embeddings import RARE, UNKNOWN, Embeddings
from brewjax.retrieve.encoder import Encoder, EncoderConfig


@pytest.fixture(scope="module")
def encoder(bundle) -> Encoder:
    return Encoder(bundle, EncoderConfig(dimensions=(8,)))


@pytest.fixture(scope="module")
def model(encoder, jobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "model"
    encoder.save(folder)
    return brewjax.open(folder, jobs)


def test_vectors_are_those_of_the_encoder(model, encoder, jobs):
    items = model.embed()
    assert len(items) == len(jobs.items)
    rows, time = np.array([37, 2]), jobs.last_event_time + 1
    expected = encoder.embed_items(jobs, rows, time)
    np.testing.assert_allclose(model.embed("items", [137, "102"]).vectors, expected, atol=1e-5)
    assert items.table().loc["137"].to_numpy() == pytest.approx(expected[0], abs=1e-5)
    assert "Zookeeper" in items.names[items.ids.index("137")]
    members = model.embed("members", ["m5"], dimensions=8)
    example = example_at(jobs, encoder.task, jobs.member_row("m5"))
    np.testing.assert_allclose(members.vectors, encoder.embed_members(jobs, [example], 8), atol=1e-5)


def test_a_map_keeps_what_two_dimensions_can():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(40, 2)) @ np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    names = tuple(f"job {number}" for number in range(40))
    rows = pa.table({"field": ["nurse"] * 20 + ["cook"] * 19 + [None], "skills": [["a", "b"]] * 39 + [[]]})
    embeddings = Embeddings(names, names, plane.astype(np.float32), rows)
    points, share = embeddings.project()
    assert share == pytest.approx(1)
    distance = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(distance(points), distance(plane), atol=1e-5)
    figure = embeddings.plot("field")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nurse", "cook", UNKNOWN]
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert 5 < len(labels) < 40  # those that there is room for
    assert len(embeddings.plot("skills").legends[0].get_texts()) == 2
    assert not embeddings.plot().legends
    with pytest.raises(ValueError, match="no column 'feild'; did you mean 'field'"):
        embeddings.plot("feild")


def test_rare_categories_share_a_colour():
    values = [f"v{number}" for number in range(12) for _ in range(20 - number)]
    names = tuple(map(str, range(len(values))))
    embeddings = Embeddings(names, names, np.eye(len(values), 4, dtype=np.float32), pa.table({"kind": values}))
    legend = [text.get_text() for text in embeddings.plot("kind").legends[0].get_texts()]
    assert (legend[0], len(legend)) == (RARE, 9)


def test_one_vector_is_a_map_too():
    one_vector = Embeddings(("a",), ("a",), np.ones((1, 4), np.float32), pa.table({"kind": ["x"]}))
    assert one_vector.project()[0].tolist() == [[0, 0]]


def test_a_ranker_does_not_embed(explorer):
    with pytest.raises(ValueError, match=r"no encoder.yaml in the model's folder"):
        explorer.embed()


def test_wrong_ids_are_named(model):
    with pytest.raises(ValueError, match="no member 'x'"):
        model.embed("members", ["x"])
    with pytest.raises(ValueError, match="no job '7'"):
        model.embed("items", ["7"])


def test_calibration_is_that_of_the_predictions(explorer, jobs, task):
    calibration = explorer.calibration("apply", max_examples=10)
    assert calibration.label == "Yes"
    assert (np.diff(calibration.predicted) > 0).all()
    assert calibration.questions.sum() > 10
    assert len(calibration.table()) == len(calibration.questions) <= 10
    gap = np.abs(calibration.predicted - calibration.observed) @ calibration.questions / calibration.questions.sum()
    assert calibration.error == pytest.approx(gap)
    assert f"{calibration.error:.3f}" in repr(calibration)
    assert calibration.plot().axes[0].get_xlabel() == "probability of “Yes”"


def test_a_plot_of_calibration_has_intervals():
    half = np.array([0.5])
    calibration = Calibration("model, task", "Yes", half, half, np.array([100]), 0.0)
    assert calibration.errors == pytest.approx([0.098])
    assert dataclasses.replace(calibration, questions=np.array([400])).errors == pytest.approx([0.049])
