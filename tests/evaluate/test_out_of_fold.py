"""Soft labels from another ranker: out of fold, or from a table of predictions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brewjax.config import ConfigError
from brewjax.data.tasks.examples import build_examples
from brewjax.evaluate import out_of_fold
from brewjax.evaluate.baselines import LightGBM
from brewjax.evaluate.features import Features
from brewjax.evaluate.out_of_fold import PredictionTable, predict_out_of_fold


def test_no_ranker_predicts_members_it_was_trained_on(jobs, task, monkeypatch):
    """Features here are the member's row alone, so that what trees were trained on can be seen."""
    examples = list(build_examples(jobs, task, "train"))
    members = np.concatenate([np.full((len(e.candidates), 1), e.member, np.float32) for e in examples])
    monkeypatch.setattr(out_of_fold, "build_features", lambda *_: Features(["member"], members, []))
    trained: list[set[float]] = []

    class Remembers:
        def predict_features(self, task, values):
            assert not trained[-1] & {*values.ravel()}
            return np.full((len(values), 2), 0.5)

    def fit(task, train, validation, settings):
        trained.append({*train[0].values.ravel(), *validation[0].values.ravel()})
        return Remembers()

    monkeypatch.setattr(LightGBM, "fit_features", fit)
    predicted = predict_out_of_fold(jobs, task, examples)
    assert len(trained) == 3
    assert [p.shape for p in predicted] == [(len(example.candidates), 2) for example in examples]


def test_a_table_of_predictions_is_looked_up_by_member_item_and_time(jobs, task, tmp_path):
    (example, *_) = build_examples(jobs, task, "train")
    rows = example.exposures[:1]
    table = pa.table(
        {
            "member_id": [jobs.member_id(example.member)],
            "item_id": [int(jobs.item_id(example.candidates[0]))],
            "time": jobs.events["time"].take(pa.array(rows)).combine_chunks(),
            "Yes": [0.3],
            "No": [0.9],
        }
    )
    pq.write_table(table, tmp_path / "scores.parquet")
    (soft,) = PredictionTable(jobs, task, tmp_path / "scores.parquet").look_up([example])
    np.testing.assert_allclose(soft[0], [0.25, 0.75])
    np.testing.assert_array_equal(soft[1:], np.eye(2)[example.labels[1:]], "without a row the answer is certain")


def test_a_table_without_a_label_word_is_refused(jobs, task, tmp_path):
    pq.write_table(pa.table({"member_id": ["m1"], "item_id": [100]}), tmp_path / "scores.parquet")
    with pytest.raises(ConfigError, match="no column time, Yes, No; there are: member_id, item_id"):
        PredictionTable(jobs, task, tmp_path / "scores.parquet")
