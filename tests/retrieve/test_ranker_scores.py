"""A ranker's scores of records' items: those that it gives each alone; made once, and read into records."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records import example_table
from brewjax.data.records.contrastive import ContrastiveConfig, MinedNegatives, choose_items, contrastive_records
from brewjax.data.records.example_table import ExampleTable
from brewjax.data.records.provenance import training_examples
from brewjax.data.tables.partition import WHOLE
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.task import NegativesConfig
from brewjax.evaluate.ranker_scores import score_records
from brewjax.evaluate.ranking import rank
from tests.data.conftest import moment
from tests.retrieve.conftest import PROMPTS

MINED = MinedNegatives(encoder="of the test", count=2)
CONFIG = ContrastiveConfig(max_examples=40, positives=4, hard_negatives=3, mined_negatives=MINED, ranker="of the test")


def mined(example):
    """Items that are no candidates too."""
    return np.arange(5) + example.member % 7


@pytest.fixture(scope="module")
def ranker(make_encoder):
    return make_encoder().bundle


@pytest.fixture(scope="module")
def split_task(task):
    return task.model_copy(update={"split": type(task.split)(validation="60%", test="80%")})


@pytest.fixture(scope="module")
def folder(ranker, jobs, split_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_table, "PART", 15)
        score_records(ranker, jobs, split_task, CONFIG, mined, folder)
    return folder


def test_they_are_those_that_the_ranker_gives(ranker, jobs, split_task, folder):
    table, verbalizer, seen = ExampleTable(folder), ranker.verbalizer(jobs, split_task), 0
    for example in training_examples(jobs, split_task, CONFIG, WHOLE):
        items, num_positives = choose_items(example, split_task, CONFIG, mined)
        log_odds = table.look_up(example)
        assert len(log_odds) == len(items)
        if not num_positives:
            assert np.isnan(log_odds).all()
            continue
        unknown = np.full(len(items), -1)
        question = dataclasses.replace(example, candidates=items, labels=unknown, exposures=unknown)
        of_best = rank(ranker, verbalizer, split_task, question).probabilities[:, 0].astype(np.float64)
        np.testing.assert_allclose(log_odds, np.log(of_best / (1 - of_best)), atol=2e-4)
        seen += len(items)
    assert seen > 20


def test_records_have_them_in_the_order_of_their_items(jobs, tokenizer, split_task, folder):
    verbalizer = Verbalizer(jobs, Scales.fit(jobs, moment(200)), tokenizer, PROMPTS.max_tokens)
    table = ExampleTable(folder)
    scores = {(e.member, e.cutoff_time): table.look_up(e) for e in training_examples(jobs, split_task, CONFIG, WHOLE)}
    records = list(contrastive_records(verbalizer, split_task, PROMPTS, CONFIG, WHOLE, mined, table.look_up))
    assert records
    for record, origin in records:
        assert record.log_odds == scores[record.member, origin["cutoff_time"]].tolist()
        (part,) = record.split(sum(map(len, record.texts[:3])))
        assert part.log_odds == record.log_odds[:2]


def test_scoring_goes_on_where_it_was_interrupted_to_the_bit(ranker, jobs, split_task, folder, monkeypatch):
    monkeypatch.setattr(example_table, "PART", 15)
    parts = sorted(folder.iterdir())
    assert len(parts) > 1
    before, times = [path.read_bytes() for path in parts], [path.stat().st_mtime_ns for path in parts]
    parts[1].unlink()
    score_records(ranker, jobs, split_task, CONFIG, mined, folder)
    assert [path.read_bytes() for path in parts] == before
    assert [n for n, path in enumerate(parts) if path.stat().st_mtime_ns != times[n]] == [1]


def test_sampled_negatives_are_asked_about_where_a_ranker_answers(jobs, split_task):
    sampled = split_task.questions.model_copy(update={"sampled_negatives": NegativesConfig(label="No", per_event=3)})
    sampled_task = split_task.model_copy(update={"questions": sampled})
    without = CONFIG.model_copy(update={"ranker": None})
    for example in training_examples(jobs, sampled_task, CONFIG, WHOLE):
        items, positives = choose_items(example, sampled_task, CONFIG)
        assert len(choose_items(example, sampled_task, without)[0]) == positives
        assert len(items) > positives
