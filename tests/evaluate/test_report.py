from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.report import print_results, write_report
from brewjax.evaluate.results import compare
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
        compare(three_label_task, {"brewjax": from_examples(three, np.full((200, 3), 1 / 3))}, bootstrap=20),
    ]


@pytest.fixture(scope="module")
def report(comparisons, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    losses = folder / "metrics.jsonl"
    losses.write_text(
        "".join(json.dumps({"step": step, "loss": 1 / step, "tokens": 64}) + "\n" for step in range(1, 99))
    )
    write_report(folder / "report", "Jobs & <more>", comparisons, {"dataset": "jobs", "commit": "b1ab86c"}, losses)
    return folder / "report"


def test_the_page_needs_nothing_from_outside(report):
    page = (report / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"(src|href)\s*=[^\"']", page)
    assert not re.search(r"<script|<link|@import|url\((?!#)", page)
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_says_everything(report):
    page = (report / "report.html").read_text()
    for text in ("<h2>apply</h2>", "<h2>three</h2>", "Jobs &amp; &lt;more&gt;", "b1ab86c", "training loss", "over 100"):
        assert text in page
    assert page.count("<svg") == 5


def test_the_best_is_bold_in_markdown(report):
    text = (report / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| brewjax"))
    assert re.fullmatch(r"\| brewjax \|( \*\*\d\.\d{3}\*\* \(\d\.\d{3} to \d\.\d{3}\) \|){2}.*", row)
    assert "## three" in text
    assert "- brewjax against LightGBM: AUC +0." in text


def test_a_table_for_the_terminal(comparisons):
    console = Console(file=io.StringIO(), width=100)
    print_results(comparisons[0], console)
    text = console.file.getvalue()
    for part in ("apply: 800 questions to 20 members", "NDCG@10", "popularity", "11-100", "0.500 ±0.000"):
        assert part in text


def test_no_questions_no_loss_curve_no_crash(task, tmp_path):
    empty = compare(task, {"brewjax": from_examples([], np.zeros((0, 2)))})
    write_report(tmp_path, "Nothing", [empty], {}, tmp_path / "none.jsonl")
    assert "| brewjax | – | – | – | – |" in (tmp_path / "report.md").read_text()  # noqa: RUF001
