"""The floor that a model must clear."""

from __future__ import annotations

import numpy as np
import pytest

from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import build_examples
from brewjax.evaluate.regression import FactRegression
from tests.data.conftest import Event


def test_it_finds_what_a_stated_number_says(jobs_with, task):
    """Members apply to jobs that pay well, and the salary is stated."""
    rng = np.random.default_rng(0)
    pay = [(i * 11) % 40 for i in range(40)]  # as in tests/tables.py
    events = []
    for day in range(100):
        for member in range(8):
            item = int(rng.integers(40))
            known = item % 7 != 5
            applies = known and rng.random() < pay[item] / 40
            events.append(Event(member, item, "applied" if applies else "viewed", day + member / 10))
    dataset = jobs_with(events)
    train, test = (list(build_examples(dataset, task, split)) for split in ("train", "test"))
    scales = Scales.fit(dataset, task.boundaries(dataset)[0])
    predicted = FactRegression.fit(dataset, task, train, scales).predict(dataset, task, test)
    np.testing.assert_allclose(predicted.sum(axis=1), 1)
    items = np.concatenate([example.candidates for example in test])
    known = items % 7 != 5
    well_paid = np.array(pay)[items] >= 20
    assert predicted[known & well_paid, 0].mean() > 0.5 > predicted[known & ~well_paid, 0].mean()
    assert predicted[~known, 0].mean() < 0.2, "an unknown salary is a value of its own"


def test_without_questions_it_says_so(jobs, task):
    with pytest.raises(ValueError, match="no question in the train split"):
        FactRegression.fit(jobs, task, [], Scales(until=0, quantiles={}))
