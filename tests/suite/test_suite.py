"""The suite on predictors whose scores are known, its cache, its gate and its refusals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from brewjax.bundle.training import TrainedOn, Training
from brewjax.cli_suite import app
from brewjax.config import ConfigError
from brewjax.data.simulate.network import simulate_network
from brewjax.data.tables.card import CARD
from brewjax.data.tables.dataset import Dataset, dataset_names, hash_dataset
from brewjax.evaluate.predictions import scores, true_values
from brewjax.paths import CONFIGS
from brewjax.suite import gate
from brewjax.suite.board import HEADLINE, make_board, member_weights
from brewjax.suite.contamination import ContaminationError, check_model
from brewjax.suite.page import write_page
from brewjax.suite.predictors import ORACLE, Oracle, baselines
from brewjax.suite.questions import cut_history, first_moments, frozen_questions
from brewjax.suite.runs import predictions_folder, read_predictions, run
from brewjax.suite.suite import Suite
from tests.suite.conftest import SUITE, Fake, noisy, right


def ranked_pairs(score: np.ndarray, value: np.ndarray, lists: np.ndarray) -> float:
    """AUC in list by its definition: every pair of a list, one by one; lists count by their questions."""
    shares, weights = [], []
    for each in set(lists.tolist()):
        rows = np.flatnonzero(lists == each)
        pairs = [(a, b) for a in rows for b in rows if value[a] > value[b]]
        if pairs:
            shares.append(np.mean([(score[a] > score[b]) + (score[a] == score[b]) / 2 for a, b in pairs]))
            weights.append(len(rows))
    return float(np.average(shares, weights=weights))


def test_a_fake_model_gets_exactly_its_score_on_every_task(suite):
    fakes = [
        Fake("right", right),
        Fake("wrong", lambda example: 1 - right(example)),
        Fake("constant", lambda example: np.full(len(example.candidates), 0.5)),
        Fake("noisy", noisy(0.9)),
    ]
    run(suite, "quick", fakes)
    board = make_board(suite, "quick")
    for name, expected in (("right", 1.0), ("wrong", 0.0), ("constant", 0.5)):
        assert {task: metrics[HEADLINE].value for task, metrics in board.row(name).tasks.items()} == {
            "shop/buys": expected,
            "films/liked": expected,
            "films/watched": expected,
        }
        assert board.row(name).mean[HEADLINE].value == expected
    for task in board.tasks:
        table, _, _ = read_predictions(suite, "quick", board.row("noisy").entry.predictions[task.name])
        expected = ranked_pairs(scores(table, task.task), true_values(table, task.task), table["list"].to_numpy())
        assert board.row("noisy").tasks[task.name][HEADLINE].value == pytest.approx(expected, abs=1e-12)


def test_kept_and_fresh_runs_agree_to_the_bit_and_only_new_models_are_asked(suite):
    fake = Fake("noisy", noisy(0.9))
    run(suite, "quick", [fake])
    before = {path.name: path.read_bytes() for path in predictions_folder(suite, "quick").iterdir()}
    num_questions = fake.questions
    run(suite, "quick", [fake])
    assert fake.questions == num_questions
    for path in predictions_folder(suite, "quick").iterdir():
        path.unlink()
    run(suite, "quick", [fake])
    assert before == {path.name: path.read_bytes() for path in predictions_folder(suite, "quick").iterdir()}
    run(suite, "quick", [Fake("noisy", noisy(0.9), version=2)])
    assert len([*predictions_folder(suite, "quick").iterdir()]) == 2 * len(before)


def test_a_killed_run_goes_on(suite):
    class Killed(Fake):
        def predict(self, dataset, task, examples, visible):
            if task.name == "watched":
                raise KeyboardInterrupt
            return super().predict(dataset, task, examples, visible)

    killed, fake = Killed("fake", right), Fake("fake", right)
    with pytest.raises(KeyboardInterrupt):
        run(suite, "quick", [killed])
    run(suite, "quick", [fake])
    assert killed.questions > 0
    alone = Fake("alone", right)
    run(suite, "quick", [alone])
    assert fake.questions == alone.questions - killed.questions


@pytest.mark.long
def test_workers_change_nothing(suite):
    run(suite, "quick", baselines()[:2])
    before = {path.name: path.read_bytes() for path in predictions_folder(suite, "quick").glob("*.json")}
    values = {row.name: row.mean[HEADLINE].value for row in make_board(suite, "quick").rows}
    for path in predictions_folder(suite, "quick").iterdir():
        path.unlink()
    run(suite, "quick", baselines()[:2], workers=2)
    assert before == {path.name: path.read_bytes() for path in predictions_folder(suite, "quick").glob("*.json")}
    assert values == {row.name: row.mean[HEADLINE].value for row in make_board(suite, "quick").rows}


def test_models_are_measured_by_the_oracle_where_the_truth_is_known(suite, tmp_path):
    simulate_network(tmp_path / "network", 150)
    tasks = f"[{{file: {CONFIGS / 'tasks/network/applies.yaml'}, tier: T3, past_events: [5]}}]"
    surface = f"  jobs: {{dataset: network/jobs, domain: network, tasks: {tasks}}}\n"
    text = SUITE.replace("quick: {questions: 40, lists: 8}", "quick: {questions: 200, lists: 40}")
    suite = Suite.parse(text + surface, "suite.yaml")
    oracle = Oracle()
    run(suite, "quick", [oracle, Fake("constant", lambda example: np.full(len(example.candidates), 0.5))])
    board = make_board(suite, "quick")
    assert set(board.row(ORACLE).tasks) == {"jobs/applies"}
    assert not board.row(ORACLE).mean, "it has no place"
    assert board.row(ORACLE).tasks["jobs/applies"][HEADLINE].value > 0.6
    assert board.row("constant").share_of(board.row(ORACLE), "network").value == 0
    assert board.row(ORACLE).share_of(board.row(ORACLE), "network").value == 1
    assert "share of the oracle" in write_page(board).read_text()


def test_baselines_know_what_is_to_be_known(suite):
    run(suite, "quick", baselines())
    rows = [row for row in make_board(suite, "quick").rows if row.name != ORACLE]  # which knows no such table
    value = {row.name: row.tasks["shop/buys"][HEADLINE].value for row in rows}
    assert value["own past"] > 0.8 > 0.6 > value["popularity"]
    assert value["fact regression"] > 0.75
    assert value["LightGBM"] > 0.7


def test_a_cold_start_cuts_the_same_members_and_leaves_no_trace(suite):
    dataset, tasks = suite.load_surface("films")
    questions = frozen_questions(suite, "quick", dataset, tasks[0])
    cut = cut_history(questions, 3)
    moments = [(example.member, example.cutoff_time) for example in questions.examples]
    first_examples = [questions.examples[index] for index in first_moments(moments)]
    assert [example.member for example in cut.examples] == [example.member for example in first_examples]
    for before, after in zip(first_examples, cut.examples, strict=True):
        assert after.num_past_events == len(after.history) == 3
        assert after.candidates.tolist() == before.candidates.tolist()
        times = cut.dataset.event_time
        assert (np.diff(times[after.history]) >= 0).all()
        start, end = cut.dataset.member_offsets[after.member : after.member + 2]
        assert (times[start:end] < after.cutoff_time).sum() == 3
        assert cut.dataset.event_item[after.exposures].tolist() == dataset.event_item[before.exposures].tolist()


# --- contamination


def trained(dataset: Dataset, until: int, *tasks: str, name: str = "") -> Training:
    data = TrainedOn(
        dataset=name or dataset.card.name, tables=hash_dataset(dataset.path), until=until, tasks=tasks or ("liked",)
    )
    return Training(data=(data,))


def test_a_planted_leak_is_refused(suite):
    fake = Fake("leaky", right)
    films, (liked, _) = suite.load_surface("films")
    validation, test = liked.task.boundaries(films)
    fake.training = trained(films, test + 1)
    with pytest.raises(ContaminationError, match=r"films/liked: .* trained on 'ratings' until .* test period begins"):
        run(suite, "quick", [fake])
    assert fake.questions == 0
    fake.training = trained(films, validation)
    run(suite, "quick", [fake])
    assert fake.questions > 0


def test_what_a_union_includes_has_been_seen(suite):
    """By a model that was trained on the union; `Run.training` lists the names."""
    Path("union").mkdir()
    (Path("union") / CARD).write_text("name: all\ninclude: {films: ../ratings, shop: ../shop}\n")
    names = dataset_names(Path("union"))
    assert [name for name, _ in names] == ["all", "ratings", "shop"]
    training = Training(data=tuple(TrainedOn(dataset=n, tables=t, until=0, tasks=("liked",)) for n, t in names))
    with pytest.raises(ContaminationError, match=r"shop/buys: .* tier T3 \(held out\) allows nothing"):
        check_model(suite, training, ["shop"])


def test_a_held_out_surface_must_not_have_been_seen_by_any_name(suite):
    fake = Fake("leaky", right)
    shop = Dataset.load("shop")
    fake.training = trained(shop, 0, name="another name")
    with pytest.raises(ContaminationError, match=r"shop/buys: .* tier T3 \(held out\) allows nothing"):
        run(suite, "quick", [fake])


def test_a_new_task_on_known_tables_must_not_have_been_trained(suite, tmp_path):
    (tmp_path / "suite.yaml").write_text(SUITE.replace("may_train_on: tasks", "may_train_on: tables"))
    suite, films = Suite.load("suite.yaml"), Dataset.load("ratings")
    fake = Fake("leaky", right)
    fake.training = trained(films, 0, "liked")
    with pytest.raises(ContaminationError, match=r"the task 'liked', of which tier T1"):
        run(suite, "quick", [fake])
    fake.training = trained(films, 0, "other")
    run(suite, "quick", [fake])


# --- the gate


def test_the_gate_takes_what_is_not_worse_and_says_why_not(suite):
    run(suite, "quick", [Fake("good", noisy(0.6)), Fake("same", noisy(0.6, 1)), Fake("bad", noisy(1.0))])
    assert gate.accept(suite, "quick", "good").accepted
    assert gate.accept(suite, "quick", "same").accepted
    refused = gate.accept(suite, "quick", "bad")
    assert not refused.accepted
    assert "the mean is" in refused.reasons[0]
    assert [each["entry"]["name"] for each in gate.history(suite, "quick")] == ["good", "same"]
    assert "same" in write_page(make_board(suite, "quick")).read_text()
    with pytest.raises(ValueError, match="no model 'nobody' on the leaderboard"):
        gate.accept(suite, "quick", "nobody")


def test_the_gate_wants_ties_exact_and_every_task(suite):
    class Untied(Fake):
        def predict(self, dataset, task, examples, visible):
            probabilities, cost = super().predict(dataset, task, examples, visible)
            return probabilities + np.arange(len(probabilities))[:, None] * [1e-5, -1e-5], cost

    run(suite, "quick", [Untied("untied", noisy(0.6))])
    run(suite, "quick", [Fake("part", right)], surfaces=["shop"])
    assert "asked twice gets scores 1.0e-05 apart" in gate.accept(suite, "quick", "untied").reasons[0]
    assert gate.accept(suite, "quick", "part").reasons == ["films/liked is missing", "films/watched is missing"]


def test_a_domain_that_falls_is_found_among_many_by_holm():
    assert gate.holm([0.001, 0.04, 0.03, 0.9]) == [True, False, False, False]
    assert gate.holm([0.01, 0.02, 0.02]) == [True, True, True]
    assert gate.holm([1.0]) == [False]


# --- the bootstrap, and the file


def test_resamples_are_of_members_alone_whatever_else_is_asked():
    members = np.arange(1, 400, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 % 2**61)
    weights = member_weights(members, "films", 0, 300)
    assert (weights[:, ::-1] == member_weights(members[::-1].copy(), "films", 0, 300)).all()
    assert weights.mean() == pytest.approx(1, abs=0.02)
    assert weights.var() == pytest.approx(1, abs=0.05)
    assert (weights != member_weights(members, "news", 0, 300)).any()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tier: T3", "tier: T4", r"suite.yaml:7: surfaces.shop.tasks.0.tier: no tier 'T4'; there are: T1, T3"),
        ("domain: shopping", "area: shopping", "unknown key 'area'"),
        (", full: {questions: 80, lists: 16}", "", "'full' is missing"),
        ("watched.yaml", "liked.yaml", "a task 'liked' is there already"),
    ],
)
def test_a_wrong_file_is_refused_by_line_and_key(suite, tmp_path, old, new, message):
    (tmp_path / "suite.yaml").write_text(SUITE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        Suite.load("suite.yaml").load_surface("films")


def test_the_page_refers_to_nothing_outside_itself(suite):
    run(suite, "quick", [Fake("a", noisy(0.8)), *baselines()[:1]])
    page = write_page(make_board(suite, "quick")).read_text()
    assert "http" not in page
    assert "popularity" in page
    assert "cold start" in page


def test_the_command_line_shows_compares_and_accepts(suite):
    run(suite, "quick", [Fake("good", noisy(0.5)), Fake("bad", noisy(1.0))])
    run(suite, "quick", [Fake("part", right)], surfaces=["shop"])

    def shown(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*arguments, "--suite", "suite.yaml"])
        return result.exit_code, " ".join(result.output.split())

    code, output = shown("show")
    assert code == 0
    assert "part (2" in output, "tasks are missing"
    assert output.endswith("leaderboard: runs/suites/small/quick/board.html")
    code, output = shown("compare", "bad", "good", "--prompts", "2")
    assert code == 0
    assert output.count("; it was") == 2
    assert re.search(r"films \.\d+ 1\.000 -0\.\d+ ±0\.\d+ down", output)
    assert shown("compare", "bad", "nobody")[0] == 2
    assert shown("compare", "bad", "part")[0] == 2
    assert shown("accept", "good") == (0, "accepted: good")
    code, output = shown("accept", "bad")
    assert code == 1
    assert "not accepted: the mean is" in output
