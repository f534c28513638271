"""Temperatures: what is fitted, unchanged in a model's folder, and applied wherever it scores."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.bundle.bundle import Bundle
from brewjax.data.tasks.examples import build_examples, example_at
from brewjax.evaluate import calibration
from brewjax.evaluate.calibration import calibrate, fit_temperature, robust_temperature
from brewjax.evaluate.metrics import log_loss
from brewjax.evaluate.predict import TaskExamples, predict
from brewjax.scoring.scorer import normalize_over_labels
from tests.bundle.test_bundle import TASK, bundle  # noqa: F401 (fixture)
from tests.data.conftest import jobs, tokenizer  # noqa: F401 (fixtures)


@hypothesis.given(st.floats(0.2, 5), st.integers(2, 4), st.integers(0, 100))
@hypothesis.settings(deadline=None, max_examples=30)
def test_the_temperature_of_a_model_that_is_too_sure_or_not_sure_enough_is_found(temperature, labels, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(20_000, labels))
    right = (np.cumsum(normalize_over_labels(logits), axis=1) < rng.random((len(logits), 1))).sum(axis=1)
    too_sure = normalize_over_labels(logits * temperature)
    assert fit_temperature(too_sure, right) == pytest.approx(temperature, rel=0.2)


@hypothesis.given(st.integers(1, 30), st.integers(0, 1000))
@hypothesis.settings(deadline=None, max_examples=30)
def test_it_never_makes_the_loss_on_its_own_examples_worse(questions, seed):
    rng = np.random.default_rng(seed)
    probabilities = normalize_over_labels(rng.normal(size=(questions, 2)) * 3)
    right, ones = rng.integers(0, 2, questions), np.ones(questions)
    calibrated = normalize_over_labels(np.log(probabilities), fit_temperature(probabilities, right))
    assert log_loss(calibrated, right, ones) <= log_loss(probabilities, right, ones) + 1e-4


def test_a_calibrated_model_is_left_alone_more_often_than_not_and_a_bad_one_never():
    rng, unchanged, mended = np.random.default_rng(0), 0, 0
    for _ in range(20):
        logits, example = rng.normal(size=(300, 2)), np.arange(300) // 3
        right = (np.cumsum(normalize_over_labels(logits), axis=1) < rng.random((300, 1))).sum(axis=1)
        unchanged += robust_temperature(normalize_over_labels(logits), right, example) == 1
        mended += robust_temperature(normalize_over_labels(logits * 4), right, example) > 2
    assert unchanged >= 10
    assert mended == 20


def test_a_model_keeps_its_temperatures_and_scores_with_them(bundle, jobs, tmp_path, monkeypatch):  # noqa: F811
    examples = list(build_examples(jobs, TASK, "validation"))
    monkeypatch.setattr(calibration, "robust_temperature", lambda *_: 3.0)
    calibrated = calibrate(bundle, [TaskExamples(jobs, TASK, examples, "jobs")])
    temperature = calibrated.surface().temperatures["apply"]
    assert temperature == 3.0
    calibrated.save(tmp_path / "model")
    loaded = Bundle.load(tmp_path / "model")
    assert loaded.surface().temperatures == {"apply": temperature}

    asked_of = [TaskExamples(jobs, TASK, list(build_examples(jobs, TASK, "test"))[:3])]
    plain, scored = (
        np.array(predict(model, asked_of)[0].table["probabilities"].to_pylist()) for model in (bundle, loaded)
    )
    np.testing.assert_allclose(scored, normalize_over_labels(np.log(plain), temperature), atol=1e-6)
    example = example_at(jobs, TASK, 5)
    prompts = [model.verbalizer(jobs, TASK).prompt(TASK, example, "compact") for model in (bundle, loaded)]
    plain, scored = (model.score(prompt) for model, prompt in zip((bundle, loaded), prompts, strict=True))
    np.testing.assert_allclose(scored, normalize_over_labels(np.log(plain), temperature), atol=1e-6)


def test_a_task_without_examples_keeps_the_temperature_of_one(bundle, jobs):  # noqa: F811
    examples = list(build_examples(jobs, TASK, "validation"))[:2]
    renamed = TASK.model_copy(update={"name": "renamed"})
    tasks = [TaskExamples(jobs, TASK, examples, "jobs"), TaskExamples(jobs, renamed, [], "jobs")]
    assert list(calibrate(bundle, tasks).surface().temperatures) == ["apply"]
