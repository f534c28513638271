from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from brewjax.evaluate.budgets import PrefixSize, budget_curve
from brewjax.evaluate.fact_worth import FactWorth
from brewjax.evaluate.mistakes import Mistake
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.report import TaskDetails, describe_agreements, print_models, print_results, write_report
from brewjax.evaluate.results import OVERALL, Agreement, ModelSummary, agreements, compare
from tests.evaluate.conftest import informed_predictions, make_examples


@pytest.fixture(scope="module")
def comparisons(task, three_label_task):
    two = make_examples(np.random.default_rng(0), 200)
    three = make_examples(np.random.default_rng(0), 50, labels=3)
    return [
        compare(
            task,
            {
                "brewjax": informed_predictions(np.random.default_rng(1), two, noise=0.2),
                "LightGBM": informed_predictions(np.random.default_rng(2), two, noise=3),
                "popularity": from_examples(two, np.full((800, 2), 0.5)),
            },
            bootstrap=20,
        ),
        compare(
            three_label_task,
            {name: from_examples(three, np.full((200, 3), 1 / 3)) for name in ("brewjax", "LightGBM", "popularity")},
            bootstrap=20,
        ),
    ]


MODELS = [
    ModelSummary("brewjax", "sft", 1_234_567, 4_938_268, 61.0, 2.5e6, 700.0),
    ModelSummary("LightGBM", "distilled from brewjax", 123_456, 123_456, 30.0, 5e5, 2_000.0),
]


@pytest.fixture(scope="module")
def report(comparisons, task, tmp_path_factory):
    informed, uninformed = (comparisons[0].predictions[name] for name in ("brewjax", "popularity"))
    folder = tmp_path_factory.mktemp("run")
    losses = [{"step": step, "loss": 1 / step, "tokens": 64} for step in range(1, 99)]
    facts = {"dataset": "jobs", "commit": "b1ab86c"}
    shown = ["brewjax", "LightGBM", "popularity"]
    details = {
        "apply": TaskDetails(
            (Mistake("m7", "Nurse & <co>", "Yes", 0.031, "LightGBM", 0.412, "Predict.\n<job>"),),
            (FactWorth("items.popularity", 0.05, 0.0123, 1.5),),
            budget_curve(task, {96: (uninformed, PrefixSize(0.5, 54)), 320: (informed, PrefixSize(11, 270))}, 20),
        )
    }
    write_report(folder / "report", "Jobs & <more>", comparisons, MODELS, shown, facts, {"sft": losses}, details)
    return folder / "report"


def test_the_page_needs_nothing_from_outside(report):
    page = (report / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"(src|href)\s*=[^\"']", page)
    assert not re.search(r"<script [^>]|<link|@import|url\((?!#)|fetch\(|import ", page)
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_says_everything(report):
    page = (report / "report.html").read_text()
    for text in ("<h2>apply</h2>", "<h2>three</h2>", "Jobs &amp; &lt;more&gt;", "b1ab86c", "training loss", "over 100"):
        assert text in page
    assert page.count("<svg") == 2 * 3 + 1 + 1 + 1  # of each task three; of one its budgets; cost; losses


def test_points_and_bars_have_titles(report):
    page = (report / "report.html").read_text()
    assert len(re.findall(r"<use [^>]*><title>brewjax, [^:<]+ past events: \d\.\d+ \(", page)) == 5 + 5
    assert len(re.findall(r"<use [^>]*><title>brewjax: predicted \d\.\d+, observed \d\.\d+, \d+ questions", page)) >= 10
    assert page.count("<g><title>LightGBM, distilled from brewjax: 30 seconds</title>") == 1
    assert "<title>brewjax: 0." in page  # of its size
    assert "<title>step 50: " in page
    assert 'id="tips-' not in page


def test_mistakes_and_facts_are_shown(report):
    page, text = ((report / f"report.{suffix}").read_text() for suffix in ("html", "md"))
    assert "m7, Nurse &amp; &lt;co&gt;: the answer was Yes, with probability\n0.031 (LightGBM: 0.412)" in page
    assert "<pre>Predict.\n&lt;job&gt;</pre>" in page
    assert "| items.popularity | -0.0500 | +0.0123 | +1.5000 |" in text
    assert "- m7, Nurse & <co>: the answer was Yes, with probability 0.031 (LightGBM: 0.412)" in text
    assert page.count("was most wrong</h3>") == 1  # a task without details has none


def test_budgets_are_compared_with_the_smallest(report, comparisons):
    page, text = ((report / f"report.{suffix}").read_text() for suffix in ("html", "md"))
    best = comparisons[0].results["brewjax"][OVERALL].metrics["gauc"]
    assert re.search(r"\| 96 \| 0\.5 \| 54 \| 0\.500 \(0\.500 to 0\.500\) \|  \|", text)
    assert re.search(rf"\| 320 \| 11\.0 \| 270 \| {best.value:.3f} \(.*\) \| \+{best.value - 0.5:.3f} \(", text)
    assert f"<title>budget of 320 tokens, 11.0 events: {best.value:.3f}" in page
    assert page.count("What a history is worth") == 1  # a task without budgets has none


def test_budgets_with_other_questions_are_not_subtracted(task, comparisons):
    table = comparisons[0].predictions["brewjax"]
    few, all_ = budget_curve(task, {50: (table.slice(0, 400), PrefixSize(0, 9)), 99: (table, PrefixSize(1, 20))}, 20)
    assert few.gain is None
    assert all_.gain is None


def test_every_model_has_a_row(report):
    text = (report / "report.md").read_text()
    for model in MODELS:
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {model.name} | {model.how} |"))
        assert f"{model.parameters:,} | {model.weight_bytes / 1e6:,.1f}" in row


def test_the_best_is_bold_in_markdown(report):
    text = (report / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| brewjax | **"))
    assert re.fullmatch(r"\| brewjax \|( \*\*\d\.\d{3}\*\* \(\d\.\d{3} to \d\.\d{3}\) \|){2}.*", row)
    assert "## three" in text
    assert "- brewjax minus LightGBM: AUC in list +0." in text


def test_tasks_that_ask_for_opposite_things_are_told_apart(task):
    examples = make_examples(np.random.default_rng(3), 50)
    predicted = informed_predictions(np.random.default_rng(4), examples)
    opposite = from_examples(examples, np.stack(predicted["probabilities"].to_numpy())[:, ::-1])
    opposite_task = task.model_copy(update={"name": "dismissed"})
    comparisons = [compare(task, {"brewjax": predicted}), compare(opposite_task, {"brewjax": opposite})]
    assert agreements(comparisons) == [Agreement(("apply", "dismissed"), {"brewjax": pytest.approx(-1)})]
    assert describe_agreements(comparisons, ["brewjax"]) == [
        "apply and dismissed: Spearman of the scores brewjax -1.000"
    ]


def test_a_table_for_the_terminal(comparisons):
    console = Console(file=io.StringIO(), width=100)
    print_results(comparisons[0], console)
    text = console.file.getvalue()
    for part in ("apply: 800 questions to 20 members", "NDCG@10", "popularity", "11-100", "0.500 ±0.000"):
        assert part in text


def test_all_models_fit_a_narrow_terminal(comparisons):
    console = Console(file=io.StringIO(), width=80)
    print_models(comparisons, MODELS, console)
    text = console.file.getvalue()
    for model in MODELS:
        (row,) = (line for line in text.splitlines() if model.name in line)
        assert f"{model.parameters / 1e6:.1f}M" in row
    assert "…" not in text


def test_no_questions_no_loss_curve_no_crash(task, tmp_path):
    empty = compare(task, {"brewjax": from_examples([], np.zeros((0, 2)))})
    write_report(tmp_path, "Nothing", [empty], MODELS[:1], ["brewjax"], {}, {"sft": []}, {})
    assert "| brewjax | – | – | – | – |" in (tmp_path / "report.md").read_text()  # noqa: RUF001
