"""A small made-up job site, and a model of it, for the notebooks. What is done is not done again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from brewjax import Recipe
from brewjax.data.tables.dataset import write_tables
from brewjax.pipeline.stages import run_recipe

FOLDER = Path(__file__).parents[1] / "build/notebooks"
DATASET, TASK, RUN = FOLDER / "jobs", FOLDER / "apply.yaml", FOLDER / "run"
FIELDS = ("nurse", "teacher", "cook", "driver")
MEMBERS, ITEMS, EVENTS = 200, 60, 24
SEEKING, REMOTE = 1.5, 1.5  # log-odds of an application: what there is to learn

CARD = """
name: jobs
members:
  attributes:
    - {column: position, kind: text}
    - {column: seeking, kind: category}
items:
  noun: job
  plural: jobs
  attributes:
    - {column: title, kind: text}
    - {column: place, kind: category}
    - {column: salary, kind: number, percentile: true}
events:
  actions:
    viewed: {past: has viewed}
    applied: {past: has applied to}
"""
APPLY = """
name: apply
instruction: Here is what a member did on a job site. Do they apply to the job in the "Question"?
history: {actions: [viewed], max_events: 8}
questions: {question: Will the member apply to the following job, actions: [applied, viewed]}
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - {word: "No", value: 0, match: {action: viewed}}
split: {validation: 80%, test: 90%}
"""
RECIPE = {
    "name": "jobs",
    "dataset": str(DATASET),
    "tasks": [str(TASK)],
    "model": str(FOLDER / "model.yaml"),
    "tokenizer": {"vocab_size": 600},
    "prompts": {"max_tokens": 320},
    "train": {"batch_size": 2, "seq_len": 512, "optimizer": {"learning_rate": 0.003, "warmup": 20}},
    "evaluate": {"max_examples": 50},
    "stages": {
        "big": {"do": "sft", "train": {"steps": 200}},
        "pruned": {"do": "prune", "d_ff": 0.5},
        "small": {"do": "distill", "teacher": "big", "train": {"steps": 60}},
        "encoder": {"do": "contrastive", "init_from": "big", "train": {"steps": 80, "seq_len": 1024}},
    },
}
MODEL = {"name": "jobs", "d_model": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "d_ff": 192}


def make_tables() -> Path:
    """Writes the dataset. Whether a member is actively seeking, and whether a job is remote, decide about applications,
    and nothing else does: so a reader knows what the reasons should be."""
    rng = np.random.default_rng(0)
    DATASET.mkdir(parents=True, exist_ok=True)
    position, field = rng.integers(len(FIELDS), size=MEMBERS), rng.integers(len(FIELDS), size=ITEMS)
    active, remote = rng.random(MEMBERS) < 0.5, rng.random(ITEMS) < 0.5
    members = pa.table(
        {
            "member_id": np.arange(MEMBERS),
            "position": [FIELDS[index] for index in position],
            "seeking": np.where(active, "actively", "passively").tolist(),
        }
    )
    items = pa.table(
        {
            "item_id": np.arange(ITEMS),
            "title": [f"{FIELDS[index]} wanted" for index in field],
            "place": np.where(remote, "remote", "on site").tolist(),
            "salary": rng.integers(30, 90, ITEMS) * 1000,
        }
    )
    rows = []
    for member in range(MEMBERS):
        for hour, item in enumerate(rng.permutation(ITEMS)[:EVENTS]):
            odds = SEEKING * (1 if active[member] else -1) + REMOTE * (1 if remote[item] else -1)
            applies = rng.random() < 1 / (1 + np.exp(-odds))
            rows.append((member, item, "applied" if applies else "viewed", 1_700_000_000 + hour * 3600 + member))
    member_id, item_id, action, time = zip(*rows, strict=True)
    events = pa.table(
        {
            "member_id": member_id,
            "item_id": item_id,
            "action": action,
            "time": pa.array(time).cast(pa.timestamp("s")),
        }
    )
    write_tables(DATASET, members=members, items=items, events=events)
    (DATASET / "dataset.yaml").write_text(CARD)
    TASK.write_text(APPLY)
    return DATASET


def train(until: str = "evaluate-big") -> Path:
    """Runs the recipe up to a step, such as "evaluate-small", and returns the folder of the run."""
    if not (DATASET / "dataset.yaml").exists():
        make_tables()
    (FOLDER / "model.yaml").write_text(yaml.safe_dump(MODEL))
    run_recipe(Recipe.of(RECIPE, "notebooks/jobs.py"), RUN, allow_code_mismatch=True, until=until)
    return RUN
