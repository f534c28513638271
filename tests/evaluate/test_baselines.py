from __future__ import annotations

import sys

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from brewjax.data.tasks.examples import build_examples
from brewjax.evaluate.baselines import LightGBM, popularity
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.results import OVERALL, compare
from tests.data.conftest import Event
from tests.evaluate.test_features import ask


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Trees this small wait longer for a second thread than they work, the more so where tests run side by side."""
    pytest.importorskip("lightgbm")
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def taste(jobs_with):
    """A thousand events in which members apply to jobs of their own company (four jobs each), with 10% noise."""
    rng = np.random.default_rng(0)
    events = []
    for day in np.sort(rng.uniform(0, 100, 1000)):
        member, item = int(rng.integers(8)), int(rng.integers(40))
        likes = (item // 4 % 4 == member % 4) ^ (rng.random() < 0.1)
        events.append(Event(member, item, "applied" if likes else "viewed", float(day), float(rng.exponential(30))))
    return jobs_with(events)


@pytest.fixture(scope="module")
def splits(taste, task):
    return {split: list(build_examples(taste, task, split)) for split in ("train", "validation", "test")}


def auc_of(task, examples, probabilities) -> float:
    table = from_examples(examples, probabilities)
    return compare(task, {"it": table}, bootstrap=2).results["it"][OVERALL].metrics["auc"].value


def test_popularity_is_the_smoothed_frequency_before_the_cut(jobs_with, task):
    dataset = jobs_with([
        Event(0, 1, "applied", 1), Event(1, 1, "applied", 2), Event(2, 1, "viewed", 3),
        Event(0, 2, "viewed", 4), Event(1, 1, "viewed", 5), Event(3, 1, "viewed", 6),
    ])  # fmt: skip
    examples = [ask(5, [1, 2, 7], 5)]  # of day 5 and later nothing is known
    prior = (2 + 1) / (4 + 2)
    predicted = popularity(dataset, task, train=[], examples=examples)
    smoothing = 1  # nothing to choose it by
    expected = [(2 + smoothing * prior) / (3 + smoothing), (0 + smoothing * prior) / (1 + smoothing), prior]
    np.testing.assert_allclose(predicted[:, 0], expected)
    np.testing.assert_allclose(predicted.sum(axis=1), 1)


def test_popularity_chooses_its_smoothing(taste, task, splits):
    """Items tell nothing here once the prior is known, so a strong prior is nearly as good as can be."""
    predicted = popularity(taste, task, splits["train"], splits["test"])
    assert predicted[:, 0].std() < 0.1


def test_popularity_with_sampled_negatives_counts_events(jobs_with, sampled_task):
    rng = np.random.default_rng(0)
    draw = lambda: min(int(rng.exponential(4)), 39)  # noqa: E731 (the first items are the popular ones)
    dataset = jobs_with([Event(m, draw(), "applied", float(day)) for day in range(60) for m in range(8)])
    questions = sampled_task.questions.model_copy(update={"repeats": True})
    sampled_task = sampled_task.model_copy(update={"questions": questions})
    train = list(build_examples(dataset, sampled_task, "train"))
    test = list(build_examples(dataset, sampled_task, "test"))
    predicted = popularity(dataset, sampled_task, train, test)
    np.testing.assert_allclose(predicted.sum(axis=1), 1)
    assert auc_of(sampled_task, test, predicted) > 0.75
    positive = np.concatenate([example.labels for example in test]) == 0
    assert predicted[:, 0].mean() == pytest.approx(positive.mean(), abs=0.1)  # calibrated
    one_moment = popularity(dataset, sampled_task, train, [ask(0, list(range(40)), 59)])[:, 0]
    counts = np.bincount(dataset.event_item[dataset.event_time < ask(0, [0], 59).cutoff_time], minlength=40)
    assert (np.diff(one_moment[np.argsort(counts)]) > -1e-12).all()


def test_lightgbm_learns_taste_that_popularity_cannot_see(taste, task, splits):
    model = LightGBM.fit(taste, task, splits["train"], splits["validation"], settings=3)
    predicted = model.predict(taste, task, splits["test"])
    np.testing.assert_allclose(predicted.sum(axis=1), 1)
    assert auc_of(task, splits["test"], predicted) > 0.8
    assert auc_of(task, splits["test"], popularity(taste, task, splits["train"], splits["test"])) < 0.65
    again = LightGBM.fit(taste, task, splits["train"], splits["validation"], settings=3)
    np.testing.assert_array_equal(predicted, again.predict(taste, task, splits["test"]))
    assert again.settings == model.settings


def test_lightgbm_takes_the_setting_with_the_lowest_validation_loss(taste, task, splits):
    fits = [LightGBM.fit(taste, task, splits["train"], splits["validation"], settings=n) for n in (1, 4)]
    assert fits[1].validation_loss <= fits[0].validation_loss


def test_lightgbm_of_three_labels_one_never_seen(taste, three_label_task, splits):
    model = LightGBM.fit(taste, three_label_task, splits["train"], splits["validation"], settings=1)
    predicted = model.predict(taste, three_label_task, splits["test"])
    assert predicted.shape[1] == 3
    np.testing.assert_allclose(predicted.sum(axis=1), 1)
    assert predicted[:, 2].max() < 0.01
    assert auc_of(three_label_task, splits["test"], predicted) > 0.8


def test_lightgbm_needs_questions_to_learn_from(taste, task, splits):
    with pytest.raises(ValueError, match="task apply: no question in the validation split"):
        LightGBM.fit(taste, task, splits["train"], [])


def test_without_lightgbm_the_extra_is_named(taste, task, splits, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ImportError, match=r"pip install 'brewjax\[baselines\]'"):
        LightGBM.fit(taste, task, splits["train"], splits["validation"])
