"""One model of the union of jobs, posts and people of the simulated network, whose prompts hold one history of all."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.data.records.loader import load_batches
from brewjax.data.simulate.network import simulate_network
from brewjax.data.tables.dataset import Dataset
from brewjax.paths import CONFIGS
from tests.pipeline.test_run import MODEL, in_process

TASKS = CONFIGS / "tasks" / "network" / "union"
SEQ_LEN = 512
RECIPE = f"""\
name: network
dataset: network
tasks: [{TASKS}/applies.yaml]
model: model.yaml
tokenizer: {{vocab_size: 900}}
prompts: {{styles: {{compact: 1, key-value: 1}}, score_style: compact, max_tokens: {SEQ_LEN}}}
train: {{steps: 2, batch_size: 1, seq_len: {SEQ_LEN}, mesh: {{data: 1}}}}
evaluate: {{max_examples: 2, bootstrap: 2, baseline_settings: 1}}
stages:
  big: {{do: sft, data: {{max_examples: 40}}}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A user's folder after `brewjax run recipe.yaml`."""
    folder = tmp_path_factory.mktemp("user")
    simulate_network(folder / "network", 100, seed=3, months=2)
    for name, text in {"model": MODEL, "recipe": RECIPE}.items():
        (folder / f"{name}.yaml").write_text(text)
    done = in_process(folder, "run", "recipe.yaml")
    assert done.exit_code == 0, done.output
    return folder


def test_the_history_that_is_trained_on_is_of_all_datasets(trained):
    run = trained / "runs" / "network"
    tokenizer = Bundle.load(run / "big" / "model").tokenizer
    batches = itertools.islice(load_batches(run / "data-big" / "applies", 1, SEQ_LEN, seed=0), 40)
    text = "".join(tokenizer.hf.decode(batch.tokens[0]) for batch in batches)
    for words in ("has applied to the job", "has liked the post", "has accepted the invitations of the person"):
        assert words in text
    assert "Will the member apply to the following job" in text


def test_a_models_folder_knows_the_union_and_what_it_includes(trained):
    bundle = Bundle.load(trained / "runs" / "network" / "big" / "model")
    union = Dataset.load(trained / "network")
    surface = bundle.surface_of(union)
    assert surface.card == union.card
    assert surface.card.origins == union.card.origins
    assert surface.scales.fits(union)
    names = [union.card.name, *(f"network-{name}-seed-3" for name in ("jobs", "posts", "people"))]
    assert [data.dataset for data in bundle.training.data] == names


def test_a_task_of_another_of_its_datasets_is_judged_and_ranked(trained):
    """Of people, whom training never asked about."""
    model, connects = "runs/network/big/model", str(TASKS / "connects.yaml")
    judged = in_process(trained, "evaluate", model, "network", connects, "--max-examples", "2", "--out", "judged")
    assert judged.exit_code == 0, judged.output
    assert "scales are fitted to this one" not in judged.stderr
    union, rows = Dataset.load(trained / "network"), pq.read_table(trained / "judged" / "connects.model.parquet")
    assert {union.item_id(row).partition(".")[0] for row in rows["item"].to_pylist()} == {"people"}
    ranked = in_process(trained, "score", model, "--dataset", "network", "--task", connects, "--member", "7")
    assert ranked.exit_code == 0, ranked.output
    assert "[people." in ranked.stdout
    assert "[jobs." not in ranked.stdout
