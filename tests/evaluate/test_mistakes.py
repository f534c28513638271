"""The prompts where a model was most wrong, and what facts are worth, on tables whose truth is known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import build_examples
from brewjax.evaluate.fact_worth import measure_facts
from brewjax.evaluate.mistakes import find_mistakes
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.results import compare
from tests.data.conftest import tokenizer  # noqa: F401 (a fixture)
from tests.tables import JOBS, with_column, write_dataset


@pytest.fixture(scope="module")
def examples(jobs, task):
    return [*build_examples(jobs, task, "train")]


@pytest.fixture(scope="module")
def comparison(task, examples):
    rng = np.random.default_rng(0)
    count = sum(len(example.candidates) for example in examples)
    tables = {
        name: from_examples(examples, np.stack([yes, 1 - yes], 1))
        for name, yes in (("model", rng.uniform(0.01, 0.99, count)), ("noise", rng.uniform(size=count)))
    }
    labels = np.concatenate([example.labels for example in examples])
    tables["knows"] = from_examples(examples, np.where(labels[:, None] == [0, 1], 0.9, 0.1))
    return compare(task, tables, bootstrap=0)


def test_the_least_probable_answer_comes_first_and_members_differ(comparison, jobs, task, examples, tokenizer):  # noqa: F811
    verbalizer = Verbalizer(jobs, Scales.fit(jobs, jobs.last_event_time), tokenizer, 1000)
    mistakes = find_mistakes(comparison, ["noise", "knows"], verbalizer, examples, "compact", count=3)
    table = comparison.predictions["model"]
    of_answer = np.stack(table["probabilities"].to_numpy())[np.arange(len(table)), table["label"].to_numpy()]
    worst = int(of_answer.argmin())
    assert mistakes[0].probability == pytest.approx(of_answer[worst])
    assert mistakes[0].member == jobs.member_id(table["member"][worst].as_py())
    assert mistakes[0].answer == task.words[table["label"][worst].as_py()]
    assert mistakes[0].title == jobs.item_name(table["item"][worst].as_py())
    assert mistakes[0].title in mistakes[0].text
    assert mistakes[0].text.startswith("Predict.")
    assert [(each.baseline, each.baseline_probability) for each in mistakes] == [("knows", pytest.approx(0.9))] * 3
    assert len({each.member for each in mistakes}) == 3
    probabilities = [each.probability for each in mistakes]
    assert probabilities == sorted(probabilities)


def test_without_baselines_there_is_none(comparison, jobs, examples, tokenizer):  # noqa: F811
    verbalizer = Verbalizer(jobs, Scales.fit(jobs, jobs.last_event_time), tokenizer, 1000)
    (mistake,) = find_mistakes(comparison, [], verbalizer, examples, "compact", count=1)
    assert mistake.baseline == ""
    assert np.isnan(mistake.baseline_probability)


def test_what_decides_is_worth_most(task, tmp_path):
    """Whoever sees a job whose salary is above the middle applies; so popular jobs are those."""

    def decide(events: pa.Table) -> pa.Table:
        high = [(job - 100) * 11 % JOBS > JOBS // 2 for job in events["item_id"].to_pylist()]
        return with_column("action", pa.array(np.where(high, "applied", "viewed")))(events)

    def pay(items: pa.Table) -> pa.Table:
        return with_column("salary", pa.array([30_000.0 + 1_000 * (job * 11 % JOBS) for job in range(JOBS)]))(items)

    dataset = Dataset.load(write_dataset(tmp_path, items=pay, events=decide))
    worths = measure_facts(dataset, task, [*build_examples(dataset, task, "train")])
    assert {worth.name for worth in worths[:2]} == {"items.salary", "items.popularity"}
    assert all(min(worth.log_loss, worth.gauc, worth.log_odds) > 0 for worth in worths[:2])
    assert [worth.log_loss for worth in worths] == sorted((worth.log_loss for worth in worths), reverse=True)
    assert {worth.name for worth in worths} >= {"items.popularity", "items.attention", "members.experience"}


def test_no_question_no_worth(jobs, task):
    assert measure_facts(jobs, task, []) == []
