"""Recipes: who goes on from whom, what stages share, and ladders spelled out."""

from __future__ import annotations

import pytest
import yaml

from brewjax.config import ConfigError
from brewjax.model.config import ModelConfig
from brewjax.pipeline.context import Run
from brewjax.pipeline.recipe import Recipe, load_plan
from brewjax.pipeline.stages import steps

BASE = {
    "name": "jobs",
    "dataset": "jobs",
    "tasks": ["apply.yaml"],
    "model": "model.yaml",
    "tokenizer": {"vocab_size": 600},
    "prompts": {"max_tokens": 256},
    "train": {"steps": 100, "batch_size": 2, "seq_len": 512, "optimizer": {"learning_rate": 0.01, "warmup": 5}},
}
SFT = {"do": "sft", "data": {"max_examples": 7}}


def recipe(stages: dict, **changed: object) -> Recipe:
    return Recipe.parse(yaml.safe_dump(BASE | changed | {"stages": stages}, sort_keys=False))


def test_a_stage_goes_on_from_the_one_before_and_says_what_differs():
    stages = recipe(
        {
            "big": SFT | {"train": {"steps": 7, "optimizer": {"warmup": 1}}},
            "aligned": {"do": "align"},
            "other": {"do": "sft", "init_from": "big"},
            "random": {"do": "sft", "from_scratch": True},
        }
    ).stages
    assert [stage.init_from for stage in stages.values()] == [None, "big", "big", None]
    assert (stages["big"].train.steps, stages["aligned"].train.steps) == (7, 100)
    assert (stages["big"].train.optimizer.learning_rate, stages["big"].train.optimizer.warmup) == (0.01, 1)


LADDER = {
    "do": "ladder",
    "rungs": {
        "half": {"prune": {"d_ff": 0.5}},
        "quarter": {"prune": {"d_ff": 0.5, "method": "magnitude"}, "train": {"steps": 50}},
    },
    "distill": {"loss": {"kd_weight": 0.5}},
}


def test_a_ladder_stands_for_its_stages():
    stages = recipe({"big": SFT, "ladder": LADDER, "turbo": {"do": "quantize"}}).stages
    assert {name: (stage.do, stage.init_from) for name, stage in stages.items()} == {
        "big": ("sft", None),
        "half-pruned": ("prune", "big"),
        "half": ("distill", "half-pruned"),
        "quarter-pruned": ("prune", "half"),
        "quarter": ("distill", "quarter-pruned"),
        "turbo": ("quantize", "quarter"),
    }
    for name, count in {"half": 100, "quarter": 50}.items():
        assert (stages[name].teacher, stages[name].loss.kd_weight, stages[name].train.steps) == ("big", 0.5, count)
        assert stages[name].data == stages["big"].data


def test_a_ladder_is_compared_with_other_ways_to_its_last_size():
    compare = LADDER | {"compare": ["direct", "sft", "fresh"]}
    stages = recipe({"big": SFT, "ladder": compare, "turbo": {"do": "quantize"}}).stages
    assert stages["turbo"].init_from == "quarter"
    assert (stages["direct-pruned"].init_from, stages["direct-pruned"].match_sizes_of) == ("big", "quarter")
    assert stages["direct-pruned"].method == "magnitude"
    assert (stages["direct"].do, stages["direct"].teacher, stages["direct"].train.steps) == ("distill", "big", 150)
    assert [
        stages[name].init_from for name in ("sft-half-pruned", "sft-half", "sft-quarter-pruned", "sft-quarter")
    ] == [
        "big",
        "sft-half-pruned",
        "sft-half",
        "sft-quarter-pruned",
    ]
    fresh = stages["fresh"]
    assert (fresh.do, fresh.init_from, fresh.from_scratch, fresh.train.steps) == ("sft", "quarter", True, 250)


def test_pruning_like_another_stage_takes_its_sizes():
    stage = recipe({"big": SFT, "ladder": LADDER | {"compare": ["direct"]}}).stages["direct-pruned"]
    like = ModelConfig(name="q", d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, d_ff=10)
    big = like.model_copy(update={"layers": 3, "heads": 4, "kv_heads": 2, "d_ff": 40})
    assert stage.config(like).target(big) == like


def test_a_plan_is_that_of_the_first_stage_that_trains(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE | {"stages": {"big": SFT | {"train": {"steps": 7}}}}, sort_keys=False))
    assert load_plan(path, ["stages.big.train.batch_size=4"]).train.model_dump()["steps"] == 7
    assert load_plan(path, ["stages.big.train.batch_size=4"]).train.batch_size == 4


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": SFT | {"init_from": "b"}}, "stages.a.init_from: no stage 'b' before it, and no model there"),
        ({"a": SFT, "b": {"do": "distill", "teacher": "c"}}, "stages.b.teacher: no stage 'c' before it"),
        (
            {"a": SFT, "b": {"do": "quantize"}, "c": SFT},
            "stages.c.init_from: 'b' is quantised, for serving; go on from",
        ),
        ({"a": SFT, "b": {"do": "distill"}}, "stages.b.teacher: missing; this key is needed"),
        ({"a": {"do": "sfd"}}, "'pretrain', 'sft', 'align'"),
        ({"a": SFT, "b": {"do": "prune"}}, "give at least one of layers, kv_heads, d_ff and experts"),
        ({"a": {"do": "align"}}, "stages.a: there is no model to go on from"),
        ({"report": SFT}, "the name 'report' is taken"),
        ({"half": SFT, "ladder": LADDER}, "the name 'half' is taken"),
        ({"a": SFT | {"train": {"seq_len": 100}}}, "a prompt must fit in a row"),
        ({"a": SFT | {"trane": {}}}, "unknown key 'trane'; did you mean 'train'?"),
        ({}, "at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(stages, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("?", r"\?")):
        recipe(stages)


def test_preparing_depends_on_the_tokenizer_of_the_model_gone_on_from(tmp_path):
    (tmp_path / "apply.yaml").touch()
    made_of = []
    for name, text in (("one", "{}"), ("same", "{}"), ("other", "{ }")):
        folder = tmp_path / name
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.json").write_text(text)
        (folder / "model.yaml").write_text(
            "{name: m, d_model: 8, layers: 1, heads: 1, kv_heads: 1, head_dim: 8, d_ff: 8}"
        )
        surfaces = {"jobs": {"dataset": "jobs", "tasks": [str(tmp_path / "apply.yaml")]}}
        made = recipe({"a": SFT}, model=str(folder), tokenizer=None, dataset=None, tasks=[], surfaces=surfaces)
        plan = steps(Run(made, tmp_path / "out"))
        made_of.append([step.settings for step in plan])
    assert made_of[0] == made_of[1]  # wherever the same model lies
    assert made_of[0][0] != made_of[2][0]


LINES = """\
name: jobs
dataset: jobs
tasks: [apply.yaml]
model: model.yaml
tokenizer: {vocab_size: 600}
train: {steps: 10, batch_size: 2, seq_len: 1024}
stages:
  big:
    do: sft
  ladder:
    do: ladder
    rungs:
      half: {prune: {d_ff: 0.5}}
      quarter:
        prune: {d_ff: 0.5}
        train:
          steps: 5
  turbo:
    do: quantize
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "do: quantize",
            "do: sft\n    init_from: nowhere",
            "r.yaml:20: stages.turbo.init_from: no stage 'nowhere' before it",
        ),
        ("half: {prune: {d_ff:", "half: {prune: {d_fff:", "r.yaml:13: stages.ladder.rungs.half.prune.d_fff"),
        ("steps: 5", "steps: many", "r.yaml:17: stages.ladder.rungs.quarter.train.steps: expected a whole number"),
        ("steps: 5", "step: 5", "r.yaml:17: stages.ladder.rungs.quarter.train.step: unknown key 'step'"),
        ("do: sft", "do: sft\n    train: {lora: {rank: 2}}", "r.yaml:10: stages.big.train.lora: adapters of a model"),
        ("seq_len: 1024", "seq_len: 1", "r.yaml:6: train.seq_len: expected more than 1, found 1"),
        ("[apply.yaml]", "[]", "r.yaml:3: tasks: "),
        ("turbo:", "../turbo:", "stages.../turbo: "),
        ("turbo:", "evaluate-big:", "r.yaml:18: stages.evaluate-big: the name 'evaluate-big' is taken"),
        ("name: jobs", "name: ../jobs", "r.yaml:1: name: expected a text that fits"),
        ("train: {steps: 10, batch_size: 2, seq_len: 1024}", "train: 5", "r.yaml:6: train: expected keys and values"),
        ("rungs:", "rung:", "r.yaml:12: stages.ladder.rung: unknown key 'rung'; did you mean 'rungs'?"),
    ],
)
def test_a_mistake_is_blamed_on_its_line(old, new, message):
    assert old in LINES
    with pytest.raises(ConfigError) as error:
        Recipe.parse(LINES.replace(old, new, 1), "r.yaml")
    assert message in str(error.value)


def test_a_config_inside_a_recipe_knows_its_line():
    read = Recipe.parse(LINES, "r.yaml")
    model = ModelConfig(name="m", d_model=16, layers=3, heads=4, kv_heads=2, head_dim=8, d_ff=40)
    wide = read.stages["half-pruned"].model_copy(update={"d_ff": 50.0})
    with pytest.raises(ConfigError, match=r"r\.yaml:13: stages\.ladder\.rungs\.half\.prune\.d_ff: 50 are more than"):
        wide.target(model)
    assert "r.yaml:8: stages.big.data.mix.weights: no" in str(read.stages["big"].data.mix.error("no", "weights"))
    assert "r.yaml:13: stages.ladder.rungs.half.data.mix.weights: no" in str(
        read.stages["half"].data.mix.error("no", "weights")
    )


def test_a_tokenizer_belongs_to_a_config_and_not_to_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="give 'tokenizer' where 'model' is a file"):
        recipe({"a": SFT}, tokenizer=None)
    with pytest.raises(ConfigError, match="none where it is a folder"):
        recipe({"a": SFT}, model=str(tmp_path))
