"""What a plan says of memory."""

import pytest

from brewjax.pipeline import dry_run
from brewjax.pipeline.context import Run
from brewjax.pipeline.recipe import Recipe

MODEL = "{name: a, d_model: 1024, layers: 8, heads: 8, kv_heads: 8, head_dim: 128, d_ff: 4096, param_dtype: %s}"
RECIPE = """
name: a
dataset: jobs
tasks: [apply.yaml]
model: %s
tokenizer: {vocab_size: 32000}
train: {steps: 1, batch_size: 1, seq_len: 2048}
stages:
  big: {do: sft}
  aligned: {do: align}
  adapted: {do: align, train: {lora: {rank: 1}}}
"""


@pytest.mark.parametrize(("dtype", "at_rest"), [("float32", 4), ("bfloat16", 2)])
def test_training_takes_float32_and_frozen_models_what_they_are_at_rest(tmp_path, monkeypatch, dtype, at_rest):
    monkeypatch.setattr(dry_run, "_measure_flops", lambda: 1e9)
    (tmp_path / "model.yaml").write_text(MODEL % dtype)
    run = Run(Recipe.parse(RECIPE % (tmp_path / "model.yaml")), tmp_path / "out")
    columns = {column.header: list(column.cells) for column in dry_run.plan_table(run).columns}
    parameters = 32000 * 1024 + 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024) + 1024
    adapters = 8 * (4 * 2 * 1024 + 3 * (1024 + 4096))
    expected = [16 * parameters, (16 + at_rest) * parameters, at_rest * parameters + 16 * adapters]
    assert columns["memory, GB"] == [f"{size / 1e9:.2f}" for size in expected]
