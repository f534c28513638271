"""A model of a folder on the suite: scores are kept and depend on nothing else; ties; what it was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.training import TrainedOn, Training
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.suite.contamination import ContaminationError
from brewjax.suite.gate import MAX_TWIN_GAP
from brewjax.suite.predictors import Model
from brewjax.suite.questions import frozen_questions
from brewjax.suite.runs import predictions_folder, run
from tests.data.conftest import tokenizer  # noqa: F401 (a fixture)
from tests.tiny import MODEL, params


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:  # noqa: F811
    model = MODEL.model_copy(update={"vocab_size": tokenizer.vocab_size})
    bundle = Bundle(model, params(model), tokenizer, PromptConfig(max_tokens=300))
    path = tmp_path_factory.mktemp("model") / "model"
    bundle.save(path)
    return path


def predictions(suite) -> dict[str, bytes]:
    return {path.name: path for path in predictions_folder(suite, "quick").glob("*.parquet")}


def test_a_model_is_scored_once_and_to_the_bit_whatever_else_is_scored(suite, folder):
    (entry,) = run(suite, "quick", [Model(folder, "tiny")])
    assert entry.twin_gap < MAX_TWIN_GAP
    before = {name: pq.read_table(path) for name, path in predictions(suite).items()}
    assert len(before) == 5
    model = Model(folder, "tiny")
    run(suite, "quick", [model])
    assert model._scorer is None, "nothing was left to score"
    for path in predictions(suite).values():
        path.unlink()
    for surface in ("films", "shop"):
        run(suite, "quick", [Model(folder, "tiny")], surfaces=[surface])
    after = {name: pq.read_table(path) for name, path in predictions(suite).items()}
    assert all(after[name].equals(table) for name, table in before.items())


def shop_questions(suite) -> tuple[Dataset, Task, list[RankingExample], Dataset]:
    dataset, (surface_task,) = suite.load_surface("shop")
    questions = frozen_questions(suite, "quick", dataset, surface_task)
    return dataset, surface_task.task, questions.examples, dataset


def test_a_model_says_what_it_was_trained_on_and_another_budget_is_another_model(suite, folder, tmp_path):
    bundle = Bundle.load(folder)
    trained = Training(data=(TrainedOn(dataset="shop", tables="", until=0, tasks=("buys",)),))
    Bundle(bundle.model, bundle.params, bundle.tokenizer, PromptConfig(max_tokens=200), training=trained).save(
        tmp_path / "trained"
    )
    model = Model(tmp_path / "trained", "trained")
    assert model.training == Bundle.load(tmp_path / "trained").training == trained
    assert model.identity != Model(folder, "tiny").identity
    with pytest.raises(ContaminationError, match=r"shop/buys: .* 'shop', of which tier T3"):
        run(suite, "quick", [model])


def test_probabilities_are_rounded_so_that_equal_prompts_tie(suite, folder):
    """One prompt at two places of a row differs in the seventh decimal, which is no order."""
    probabilities, _ = Model(folder, "tiny").predict(*shop_questions(suite))
    assert (probabilities == np.round(probabilities, 6)).all()
    assert len(np.unique(probabilities)) > 1
