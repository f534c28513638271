"""What went wrong in other suites of evaluation, each as a test, by its number there."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from brewjax.config import ConfigError
from brewjax.data.tasks.examples import RankingExample, build_examples
from brewjax.data.tasks.questions import split_period
from brewjax.suite.board import HEADLINE, make_board
from brewjax.suite.questions import FrozenQuestions, draw_questions, frozen_questions, questions_path
from brewjax.suite.runs import read_predictions, run, score
from brewjax.suite.suite import Draw, Suite
from tests.suite.conftest import LIKED, Fake, noisy, right


def questions_of(suite: Suite, surface: str, index: int = 0) -> FrozenQuestions:
    dataset, tasks = suite.load_surface(surface)
    return frozen_questions(suite, "quick", dataset, tasks[index])


def rows_of(examples: list[RankingExample]) -> list[tuple]:
    return [
        (example.member, example.cutoff_time, *example.candidates.tolist(), *example.labels.tolist())
        for example in examples
    ]


def test_lm_evaluation_harness_2598_a_limit_draws_a_sample_and_not_the_first(suite):
    dataset, (surface_task,) = suite.load_surface("shop")
    everything = [example.request for example in build_examples(dataset, surface_task.task, "test")]
    samples = [
        {
            example.request
            for example in draw_questions(dataset, surface_task.task, Draw(questions=40, lists=8), 8, seed)
        }
        for seed in (1, 2)
    ]
    assert all(len(requests) == 10 for requests in samples)
    assert samples[0] != samples[1]
    assert all(requests - set(everything[:20]) for requests in samples), "none of the later ones"


def test_lm_evaluation_harness_3882_the_error_of_a_mean_is_that_of_the_very_mean(suite):
    run(suite, "quick", [Fake("noisy", noisy(0.9))])
    row = make_board(suite, "quick").rows[0]
    shop, films = (row.domains[domain][HEADLINE] for domain in ("shopping", "films"))
    liked, watched = (row.tasks[name][HEADLINE] for name in ("films/liked", "films/watched"))
    assert films.value == pytest.approx((liked.value + watched.value) / 2)
    np.testing.assert_allclose(films.resamples, (liked.resamples + watched.resamples) / 2)
    mean = row.mean[HEADLINE]
    assert mean.value == pytest.approx((shop.value + films.value) / 2)
    assert mean.error == pytest.approx(1.96 * np.std((shop.resamples + films.resamples) / 2, ddof=1))
    assert mean.error < (shop.error + films.error) / 2, "domains are independent, and their errors do not add up"


def test_lighteval_994_the_cache_knows_the_length_of_the_history(suite):
    questions, fake = questions_of(suite, "films"), Fake("fake", right)
    files = {score(suite, "quick", fake, questions, past_events) for past_events in (None, 0, 3)}
    assert len(files) == 3
    num_past = [
        set(
            read_predictions(suite, "quick", score(suite, "quick", fake, questions, past))[0][
                "num_past_events"
            ].to_pylist()
        )
        for past in (0, 3)
    ]
    assert num_past == [{0}, {3}]


def test_recbole_2117_drawn_candidates_keep_their_labels(suite):
    questions = questions_of(suite, "films", 1)
    assert questions.task.questions.sampled_negatives
    labels = {}
    for example in build_examples(questions.dataset, questions.task, "test", suite.seed):
        for item, label in zip(example.candidates.tolist(), example.labels.tolist(), strict=True):
            labels[example.member, example.cutoff_time, item] = label
    for example in questions.examples:
        for item, label in zip(example.candidates.tolist(), example.labels.tolist(), strict=True):
            assert labels[example.member, example.cutoff_time, item] == label


def test_recbole_2077_negatives_are_the_same_in_every_run(suite):
    first = rows_of(questions_of(suite, "films", 1).examples)
    again = rows_of(questions_of(suite, "films", 1).examples)
    dataset, tasks = suite.load_surface("films")
    path = questions_path(suite, "quick", tasks[1])
    path.unlink()
    assert first == again == rows_of(frozen_questions(suite, "quick", dataset, tasks[1]).examples)


def test_recbole_252_a_task_whose_lists_have_one_answer_is_refused(suite, tmp_path):
    (tmp_path / "liked.yaml").write_text(
        LIKED.replace("match: {stars: [4, 5]}", "match: {member_id: {max: 14}}").replace(
            "match: {stars: [1, 2, 3]}", "match: {member_id: {above: 14}}"
        )
    )
    with pytest.raises(ConfigError, match=r"liked.yaml:\d+: split: no list of the test period has different answers"):
        questions_of(suite, "films")


def test_implicit_348_whoever_is_compared_has_answered_the_same_lists(suite):
    run(suite, "quick", [Fake("first", right), Fake("second", noisy(0.5))])
    first, second = make_board(suite, "quick").rows
    for name in first.tasks:
        tables = [read_predictions(suite, "quick", row.entry.predictions[name])[0] for row in (first, second)]
        assert tables[0].drop(["probabilities"]).equals(tables[1].drop(["probabilities"]))


@pytest.mark.parametrize(("surface", "index"), [("shop", 0), ("films", 0), ("films", 1)])
def test_cornac_708_no_prompt_holds_what_comes_after_it(suite, surface, index):
    questions = questions_of(suite, surface, index)
    dataset = questions.dataset
    for example in questions.examples:
        assert (dataset.event_time[example.history] < example.cutoff_time).all()
        assert (dataset.event_time[example.exposures] >= example.cutoff_time).all()


def test_mteb_5208_rows_within_the_noise_share_a_group(suite):
    run(suite, "quick", [Fake("a", noisy(0.6, 1)), Fake("b", noisy(0.6, 2)), Fake("random", noisy(1.0))])
    board = make_board(suite, "quick")
    groups = dict(zip((row.name for row in board.rows), board.groups, strict=True))
    assert groups["a"] == groups["b"] == 1
    assert groups["random"] == 2


def test_mteb_1921_a_model_with_missing_tasks_is_not_ranked(suite):
    run(suite, "quick", [Fake("whole", noisy(0.9))])
    run(suite, "quick", [Fake("part", right)], surfaces=["shop"])
    board = make_board(suite, "quick")
    assert [row.name for row in board.rows] == ["whole", "part"]
    assert len(board.groups) == 1
    part = board.row("part")
    assert part.missing == ["films/liked", "films/watched"]
    assert not part.mean


def test_mteb_5228_versions_of_the_data_are_never_mixed(suite, tmp_path):
    run(suite, "quick", [Fake("old", right)])
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "shop", copy)
    events = pq.read_table(copy / "events.parquet")
    pq.write_table(events.slice(0, len(events) - 4), copy / "events.parquet")
    (tmp_path / "shop").unlink()
    copy.rename(tmp_path / "shop")
    with pytest.raises(ConfigError, match=r"version 1, were frozen from another tables; .* raise the task's 'version'"):
        run(suite, "quick", [Fake("new", right)])
    text = (tmp_path / "suite.yaml").read_text().replace("buys.yaml, tier: T3", "buys.yaml, tier: T3, version: 2")
    (tmp_path / "suite.yaml").write_text(text)
    raised = Suite.load("suite.yaml")
    run(raised, "quick", [Fake("new", right)])
    board = make_board(raised, "quick")
    assert board.row("old").missing == ["shop/buys"]
    assert not board.row("new").missing


def test_llm2vec_122_scores_do_not_depend_on_what_else_is_scored(suite):
    whole, part = Fake("whole", noisy(0.7)), Fake("part", noisy(0.7))
    run(suite, "quick", [whole])
    for surface in ("films", "shop"):
        run(suite, "quick", [part], surfaces=[surface])
    first, second = (make_board(suite, "quick").row(name) for name in ("whole", "part"))
    for name in first.tasks:
        tables = [read_predictions(suite, "quick", row.entry.predictions[name])[0] for row in (first, second)]
        assert tables[0].equals(tables[1])


@pytest.mark.parametrize(("surface", "index"), [("shop", 0), ("films", 0), ("films", 1)])
def test_helm_2362_no_question_is_of_the_validation_period(suite, surface, index):
    questions = questions_of(suite, surface, index)
    begins, _ = split_period(questions.dataset, questions.task, "test")
    assert all(example.cutoff_time >= begins for example in questions.examples)


def test_autoformer_104_every_question_is_answered_the_last_ones_too(suite):
    fake = Fake("fake", right)
    run(suite, "quick", [fake])
    for surface, index in (("shop", 0), ("films", 0), ("films", 1)):
        questions = questions_of(suite, surface, index)
        (row,) = make_board(suite, "quick").rows
        table, _, _ = read_predictions(suite, "quick", row.entry.predictions[questions.name])
        assert len(table) == sum(len(example.candidates) for example in questions.examples)
        assert table["item"].to_pylist() == [*itertools.chain(*(e.candidates.tolist() for e in questions.examples))]
