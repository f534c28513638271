"""A recipe that trains an encoder: data, training, recall beside the baselines, and mistakes named."""

from __future__ import annotations

import json

import pytest

from brewjax.config import ConfigError
from brewjax.pipeline.check import check_run
from brewjax.pipeline.context import Run
from brewjax.pipeline.recipe import Recipe
from brewjax.pipeline.stages import run_recipe
from brewjax.retrieve.encoder import Encoder
from brewjax.train.metrics_writer import METRICS, read_metrics
from tests.pipeline.test_run import BASE, MODEL, TASK
from tests.tables import write_dataset


@pytest.fixture
def make_recipe(tmp_path, monkeypatch):
    """Makes a recipe with one contrastive stage, in a folder with all that it names."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "jobs")
    (tmp_path / "apply.yaml").write_text(TASK)
    (tmp_path / "model.yaml").write_text(MODEL)
    return lambda stage: Recipe.parse(f"{BASE}stages:\n  encoder: {{do: contrastive, {stage}}}\n")


@pytest.mark.long
def test_a_recipe_leaves_an_encoder_and_its_recall(make_recipe, tmp_path, capsys):
    recipe = make_recipe("data: {item_instruction: 'A {item}.'}, loss: {dimensions: [8], pooling: last}")
    run_recipe(recipe, tmp_path / "run")
    encoder = Encoder.load(tmp_path / "run" / "encoder" / "model")
    assert encoder.config.item_instruction == "A {item}."
    assert (encoder.config.task, encoder.config.dimensions, encoder.config.pooling) == ("apply", (8,), "last")
    rows = json.loads((tmp_path / "run" / "evaluate-encoder" / "recall.json").read_text())
    assert {row["method"] for row in rows} >= {"encoder", "popularity", "item-kNN"}
    assert "Recall@100" in capsys.readouterr().out


@pytest.mark.long
def test_an_encoder_trains_on_what_an_earlier_one_found(make_recipe, tmp_path, capsys):
    """The data's step waits for the encoder, is made once, and is made again for another encoder."""
    stages = (
        "data: {positives: 4}}\n  mined: {do: contrastive, data: {positives: 4, mined_negatives: {encoder: encoder}}"
    )
    run_recipe(make_recipe(stages), tmp_path / "run")
    counts = [json.loads((tmp_path / "run" / f"data-{name}" / "apply" / "counts.json").read_text()) for name in STAGES]
    assert counts[1]["negatives"] > counts[0]["negatives"]
    assert counts[1]["positives"] == counts[0]["positives"]
    Encoder.load(tmp_path / "run" / "mined" / "model")
    capsys.readouterr()
    run_recipe(make_recipe(stages), tmp_path / "run")
    assert "data-mined: done before" in capsys.readouterr().out


@pytest.mark.long
def test_an_encoder_learns_from_a_ranker(make_recipe, tmp_path, capsys):
    """The data's step waits for the ranker, whose scores of mined negatives are in the records too."""
    stages = (
        "data: {positives: 4}}\n  big: {do: sft, from_scratch: true}\n  distilled: {do: contrastive, "
        "init_from: encoder, loss: {ranker_weight: 0.5}, "
        "data: {positives: 4, mined_negatives: {encoder: encoder}, ranker: big}"
    )
    run_recipe(make_recipe(stages), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "distilled" / METRICS)
    assert all(row["divergence"] > 0 for row in rows)
    assert not any("divergence" in row for row in read_metrics(tmp_path / "run" / "encoder" / METRICS))
    steps = [path.parent.name for path in sorted(tmp_path.glob("run/*/stage.json"), key=lambda x: x.stat().st_mtime)]
    assert steps.index("big") < steps.index("data-distilled") < steps.index("distilled")
    capsys.readouterr()
    run_recipe(make_recipe(stages), tmp_path / "run")
    assert "data-distilled: done before" in capsys.readouterr().out


STAGES = ("encoder", "mined")


def test_only_an_encoder_can_mine(make_recipe):
    with pytest.raises(ConfigError, match=r"no contrastive stage 'nope' before it, and no encoder there"):
        make_recipe("data: {mined_negatives: {encoder: nope}}")


def test_only_a_ranker_can_rank(make_recipe):
    for ranker in ("nope", "first"):
        message = rf"no stage '{ranker}' before it whose model ranks, and no such model there"
        with pytest.raises(ConfigError, match=message):
            make_recipe(
                f"data: {{}}}}\n  first: {{do: contrastive}}\n  last: {{do: contrastive, data: {{ranker: {ranker}}}"
            )


def test_what_cannot_be_trained_is_refused_before_it_begins(make_recipe, tmp_path):
    recipe = make_recipe("data: {task: nope}, loss: {dimensions: [99]}")
    with pytest.raises(ConfigError, match=r"no task 'nope'; tasks: apply"):
        check_run(Run(recipe, tmp_path / "run"))
    recipe = make_recipe("loss: {dimensions: [99]}")
    with pytest.raises(ConfigError, match=r"99 is not less than the model's d_model, 16"):
        check_run(Run(recipe, tmp_path / "run"))
