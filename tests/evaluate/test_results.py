from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from brewjax.evaluate.metrics import auc
from brewjax.evaluate.predictions import from_examples, probabilities, scores, true_values
from brewjax.evaluate.results import OVERALL, SLICES, compare, evaluate
from tests.evaluate.conftest import informed_predictions, make_examples


def test_predictions_have_a_row_per_question(task):
    examples = make_examples(np.random.default_rng(0), 5)
    predicted = np.random.default_rng(1).dirichlet([1, 1], 20)
    table = from_examples(examples, predicted)
    assert table["example"].to_pylist() == np.repeat(np.arange(5), 4).tolist()
    assert table["item"].to_pylist() == np.concatenate([e.candidates for e in examples]).tolist()
    np.testing.assert_allclose(probabilities(table, task), predicted, atol=1e-7)
    np.testing.assert_allclose(scores(table, task), predicted[:, 0], atol=1e-7)
    assert true_values(table, task).tolist() == [1 - label for label in table["label"].to_pylist()]


def test_predictions_refuse_what_cannot_be_judged():
    [example] = make_examples(np.random.default_rng(0), 1)
    good = np.full((4, 2), 0.5)
    with pytest.raises(ValueError, match="4 questions in the examples, but 3 rows"):
        from_examples([example], good[:3])
    bad = good.copy()
    bad[2] = [0.9, 0.3]
    with pytest.raises(ValueError, match=r"row 2: expected probabilities that sum to 1, found \[0.9, 0.3\]"):
        from_examples([example], bad)
    unknown = dataclasses.replace(example, labels=np.array([0, -1, 1, 0]))
    with pytest.raises(ValueError, match="row 1: the question has no known label"):
        from_examples([unknown], good)


def test_every_slice_has_its_questions(task):
    examples = make_examples(np.random.default_rng(0), 300)
    results = evaluate(informed_predictions(np.random.default_rng(1), examples), task, bootstrap=20)
    assert list(results) == list(SLICES)
    for name, past in {"0": 0, "1-5": 3, "6-10": 8, "11-100": 50, "over 100": 200}.items():
        chosen = [example for example in examples if example.num_past_events == past]
        assert results[name].rows == 4 * len(chosen)
        assert results[name].members == len({example.member for example in chosen})
        alone = evaluate(informed_predictions(np.random.default_rng(1), examples).filter(
            np.repeat([example.num_past_events == past for example in examples], 4)), task, bootstrap=20)  # fmt: skip
        for metric, estimate in results[name].metrics.items():
            assert estimate.value == alone[OVERALL].metrics[metric].value
            assert estimate.interval[0] < estimate.value < estimate.interval[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [0, 1])
def test_too_little_to_judge_is_no_crash(task, count):
    examples = [
        dataclasses.replace(example, num_past_events=0) for example in make_examples(np.random.default_rng(0), count)
    ]
    results = evaluate(from_examples(examples, np.full((4 * count, 2), 0.5)), task, bootstrap=5)
    assert results["6-10"].rows == 0
    for result in results.values():
        for estimate in result.metrics.values():
            assert np.isnan(estimate.interval).all()  # one member cannot be resampled
    assert np.isnan(results[OVERALL].metrics["log_loss"].value) == (count == 0)


def test_values_below_zero_can_be_ranked(three_label_task):
    examples = make_examples(np.random.default_rng(0), 50, labels=3)
    labels = np.concatenate([example.labels for example in examples])
    perfect = evaluate(from_examples(examples, np.eye(3)[labels]), three_label_task, bootstrap=5)
    assert perfect[OVERALL].metrics["ndcg@10"].value == pytest.approx(1)
    assert perfect[OVERALL].metrics["auc"].value == 1


def test_the_interval_covers_the_truth_where_members_differ(task):
    """A question's score and answer lean the same way for all questions of a member: rows are not independent."""

    def draw(rng: np.random.Generator, members: int):
        member = np.repeat(np.arange(members), 12)
        lean = rng.normal(size=members)[member]
        labels = (lean + rng.normal(size=len(member)) < 0).astype(int)
        yes = 1 / (1 + np.exp(-lean - rng.normal(size=len(member))))
        return member, labels, yes

    _, labels, yes = draw(np.random.default_rng(0), 20_000)
    truth = float(auc(yes, 1.0 - labels, np.ones(len(yes))))
    template = make_examples(np.random.default_rng(0), 1)[0]
    covered = 0
    for seed in range(100):
        _, labels, yes = draw(np.random.default_rng(1 + seed), 50)
        examples = [
            dataclasses.replace(template, member=m, candidates=np.arange(12), labels=labels[12 * m : 12 * m + 12])
            for m in range(50)
        ]
        table = from_examples(examples, np.stack([yes, 1 - yes], axis=1))
        low, high = evaluate(table, task, bootstrap=100, seed=seed)[OVERALL].metrics["auc"].interval
        covered += low <= truth <= high
    assert covered >= 88


def test_the_paired_difference_is_sharper_than_the_intervals(task):
    rng = np.random.default_rng(0)
    examples = make_examples(rng, 300)
    better = informed_predictions(np.random.default_rng(1), examples)
    both = compare(task, {"brewjax": better, "again": better, "noisier": _noisier(better, task, examples)})
    assert both.difference("auc", "again").interval == (0, 0)
    lead = both.difference("auc", "noisier")
    value = lambda name: both.results[name][OVERALL].metrics["auc"].value  # noqa: E731
    assert lead.value == value("brewjax") - value("noisier") > 0
    assert lead.error < both.results["brewjax"][OVERALL].metrics["auc"].error
    assert both.best("auc") == "brewjax"
    assert both.best("log_loss") == "brewjax"


def _noisier(table, task, examples):
    predicted = probabilities(table, task)
    yes = np.clip(predicted[:, 0] + 0.1 * np.random.default_rng(5).normal(size=len(predicted)), 0, 1)
    return from_examples(examples, np.stack([yes, 1 - yes], axis=1))


def test_only_answers_to_the_same_questions_are_compared(task):
    examples = make_examples(np.random.default_rng(0), 10)
    table = informed_predictions(np.random.default_rng(1), examples)
    renamed_members = informed_predictions(
        np.random.default_rng(1), [dataclasses.replace(e, member=3) for e in examples]
    )
    with pytest.raises(ValueError, match=r"row \d+ has list -\d+ in one and -4 in the other"):
        compare(task, {"brewjax": table, "popularity": renamed_members})
    with pytest.raises(ValueError, match="40 and 39 questions"):
        compare(task, {"brewjax": table, "popularity": table.slice(1)})
