"""Soft labels from another ranker: out of fold, or from a table of predictions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brewjax.config import ConfigError
from brewjax.data.tasks.examples import build_examples
from brewjax.evaluate.baselines import LightGBM
from brewjax.evaluate.out_of_fold import PredictionTable, predict_out_of_fold


def test_no_ranker_predicts_members_it_was_trained_on(jobs, task, monkeypatch):
    examples = list(build_examples(jobs, task, "train"))
    trained: list[set[int]] = []

    class Remembers:
        def predict(self, dataset, task, examples):
            assert not trained[-1] & {example.member for example in examples}
            return np.full((sum(len(example.candidates) for example in examples), 2), 0.5)

    def fit(dataset, task, train, validation, settings):
        trained.append({example.member for example in [*train, *validation]})
        return Remembers()

    monkeypatch.setattr(LightGBM, "fit", fit)
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
