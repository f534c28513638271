"""A suite that is run while a model is trained."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from brewjax.cli import app
from brewjax.config import ConfigError
from brewjax.pipeline.recipe import Recipe
from brewjax.suite import watch as watch_module
from brewjax.suite.board import HEADLINE, make_board
from brewjax.suite.predictors import Model
from brewjax.suite.runs import read_entries, run
from brewjax.suite.watch import RESULTS, Watch, WatchConfig
from tests.pipeline.test_run import MODEL
from tests.suite.conftest import Fake, noisy

RECIPE = """\
name: films
dataset: ratings
tasks: [liked.yaml, watched.yaml]
model: model.yaml
tokenizer: {vocab_size: 400}
prompts: {max_tokens: 256}
train: {batch_size: 1, seq_len: 512, checkpoint_every_steps: 2, mesh: {data: 1}}
stages: {big: {do: sft, train: {steps: 4}}}
evaluate:
  max_examples: 5
  bootstrap: 10
  baseline_settings: 1
  watch: {suite: suite.yaml, every: 2, surfaces: [films]}
"""


@pytest.fixture
def watch(suite, tmp_path, monkeypatch) -> Watch:
    """A watch of models whose parameters are the share of noise in their answers."""
    (tmp_path / "big").mkdir()
    monkeypatch.setattr(watch_module, "Model", lambda folder, name: Fake(name, noisy(float(folder.read_text())), name))
    config = WatchConfig(suite="suite.yaml", every=10, tolerance=0.01)
    return Watch(config, tmp_path / "big", lambda params, path: path.write_text(str(params)))


def test_it_stops_what_gets_worse_twice_in_a_row(watch, suite, tmp_path):
    for step, noise in ((10, 0.8), (11, 1.0), (20, 0.3), (30, 0.95), (40, 0.3), (50, 0.9)):
        watch(step, lambda noise=noise: noise)
    with pytest.raises(ValueError, match=r"big: stopped at step 60, because it got worse than at step \d0"):
        watch(60, lambda: 0.9)
    results = [json.loads(line) for line in (tmp_path / "big" / RESULTS).read_text().splitlines()]
    assert [result["step"] for result in results] == [10, 20, 30, 40, 50, 60]
    assert {*results[0]["domains"]} == {"shopping", "films"}
    assert results[1]["mean"] > results[0]["mean"] > results[2]["mean"]
    assert read_entries(suite, "quick") == [], "what is half trained is not on the leaderboard"


def test_a_run_that_goes_on_from_a_checkpoint_writes_what_it_would_have_written(watch, tmp_path):
    for step in (10, 20, 30):
        watch(step, lambda: 0.5)
    written = (tmp_path / "big" / RESULTS).read_text()
    for step in (20, 30):
        watch(step, lambda: 0.5)
    assert (tmp_path / "big" / RESULTS).read_text() == written


@pytest.mark.long
def test_a_stage_is_watched_and_its_last_figures_are_those_of_its_model(suite, tmp_path):
    (tmp_path / "model.yaml").write_text(MODEL)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["run", "recipe.yaml"])
    assert result.exit_code == 0, result.output
    results = [json.loads(line) for line in (tmp_path / "runs/films/big" / RESULTS).read_text().splitlines()]
    assert [result["step"] for result in results] == [2, 4]
    (entry,) = run(suite, "quick", [Model(tmp_path / "runs/films/big/model", "big")], ["films"])
    (row,) = make_board(suite, "quick", [entry]).rows
    assert results[1]["domains"] == {"films": row.domains["films"][HEADLINE].value}
    before = (tmp_path / "runs/films/big" / RESULTS).read_text()
    assert CliRunner().invoke(app, ["run", "recipe.yaml", "--set", "evaluate.watch=null"]).exit_code == 0
    assert (tmp_path / "runs/films/big" / RESULTS).read_text() == before, "a watch changes nothing that is trained"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "none.yaml", "every": 2}, "none.yaml: no such file"),
        ({"suite": "suite.yaml", "every": 2, "surfaces": ["film"]}, "suite.yaml has no surface 'film'; did you mean"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_trained(suite, tmp_path, settings, message):
    (tmp_path / "model.yaml").write_text(MODEL)
    recipe = yaml.safe_load(RECIPE)
    recipe["evaluate"]["watch"] = settings
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused = CliRunner().invoke(app, ["run", "recipe.yaml", "--dry-run"])
    assert isinstance(refused.exception, ConfigError)
    assert message in str(refused.exception)
    assert Recipe.load("recipe.yaml").evaluate.watch == WatchConfig(**settings)
