"""A recipe from tables to report on the small jobs dataset, through the command line as a user would."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from brewjax.cli import app
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.config import ModelConfig
from brewjax.paths import locked
from tests.tables import write_dataset

TASK = """\
name: apply
instruction: Predict whether the member applies to the job in the "Question".
history: {actions: [viewed, applied], max_events: 8}
questions: {question: Will the member apply to the following job, actions: [viewed, applied], candidates_per_prompt: 8}
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - {word: "No", value: 0, match: {action: viewed}}
split: {validation: 60%, test: 80%}
"""
MODEL = "{name: smallest, d_model: 16, layers: 2, heads: 2, kv_heads: 2, head_dim: 8, d_ff: 16}"
BASE = """\
name: jobs
dataset: jobs
tasks: [apply.yaml]
model: model.yaml
tokenizer: {vocab_size: 600}
prompts: {styles: {compact: 1, sectioned: 1}, max_tokens: 512}
train: {steps: 4, batch_size: 2, seq_len: 512, checkpoint_every_steps: 2, mesh: {data: 1}}
evaluate: {max_examples: 5, bootstrap: 10, baseline_settings: 1, budgets: [400, 200]}
"""
STAGES = """\
stages:
  text: {do: pretrain}
  big: {do: sft}
  aligned: {do: align, train: {lora: {rank: 2}}}
  ladder:
    do: ladder
    init_from: big
    rungs:
      half: {prune: {d_ff: 0.5, examples: 20}}
      quarter: {prune: {kv_heads: 1, examples: 20}, train: {steps: 2}}
  turbo: {do: quantize, calibrate: 5}
"""


def brewjax(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "brewjax", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, check=False
    )


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """As `brewjax`, without waiting for the end: a process to be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "brewjax", *arguments],
        cwd=folder,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def in_process(folder: Path, *arguments: str, stdin: str = "") -> Result:
    """As `brewjax`, without starting Python and JAX again. An error is not yet a message."""
    with contextlib.chdir(folder):
        return CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "200", "JAX_NUM_CPU_DEVICES": "1"})


def distill(model: str, out: str, teacher: str) -> list[str]:
    """The verb, for a step."""
    return [
        "distill", model, out, "--dataset", "jobs", "--task", "apply.yaml",
        "--set", f"teacher={teacher}", "--set", "train={steps: 1, batch_size: 1, seq_len: 512}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder after `brewjax run recipe.yaml`."""
    folder = tmp_path_factory.mktemp("user")
    write_dataset(folder / "jobs")
    for name, text in {"apply": TASK, "model": MODEL, "recipe": BASE + STAGES}.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "maybe.yaml").write_text(TASK.replace('"Yes"', "Perhaps"))
    first = brewjax(folder, "run", "recipe.yaml")
    assert first.returncode == 0, first.stdout + first.stderr
    return folder


@pytest.fixture
def workdir(folder, monkeypatch) -> Path:
    """The folder, as the current one."""
    monkeypatch.chdir(folder)
    return folder


def test_a_recipe_leaves_a_model_predictions_and_a_report(folder):
    run = folder / "runs" / "jobs"
    for stage, steps in {"text": 4, "big": 4, "aligned": 4, "half": 4, "quarter": 2}.items():
        assert len((run / stage / "metrics.jsonl").read_text().splitlines()) == steps
    report = (run / "report" / "report.md").read_text()
    for name in ("text", "half-pruned", "quarter", "turbo"):
        assert (run / f"evaluate-{name}" / "apply.parquet").exists()
        assert f"| {name} |" in report
    assert "LightGBM" in report
    budgets = [row.split("|")[1:4] for row in report[report.index("What a history is worth") :].splitlines()[4:6]]
    (small, large) = ([float(cell) for cell in row] for row in budgets)
    assert (small[0], large[0]) == (200, 400)
    assert small[1] < large[1], "more events fit"
    assert small[2] < large[2] < 400, "and take more tokens"
    assert (run / "report" / "report.html").exists()


def test_the_ladder_goes_down_to_the_sizes_asked(folder):
    sizes = {
        name: ModelConfig.load(folder / "runs" / "jobs" / name / "model" / "model.yaml")
        for name in ("big", "half", "quarter")
    }
    actual = {name: (size.d_ff, size.kv_heads, size.heads) for name, size in sizes.items()}
    assert actual == {"big": (16, 2, 2), "half": (8, 2, 2), "quarter": (8, 1, 1)}


def test_a_plan_is_printed_and_nothing_is_done(folder):
    printed = in_process(folder, "run", "recipe.yaml", "--out", "runs/other", "--dry-run")
    assert printed.exit_code == 0, printed.output
    for name in ("text", "quarter-pruned", "turbo"):
        assert name in printed.stdout
    assert not (folder / "runs" / "other").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dataset=elsewhere"], "elsewhere: no such folder"),
        (["tasks=[nowhere.yaml]"], "nowhere.yaml: no such file"),
        (["tasks=[apply.yaml, apply.yaml]"], "two tasks are named 'apply'"),
        (["train.mesh={data: 3}"], "--set train.mesh={data: 3}: train.mesh: mesh data=3"),
        (["stages.big.train.batch_size=3", "stages.big.train.mesh={data: 2}"], "stages.big.train.mesh: mesh data=2"),
        (["evaluate.mesh={data: 5}"], "--set evaluate.mesh={data: 5}: evaluate.mesh: mesh data=5"),
        (["stages.big.data={mix: {weights: {apple: 2}}}"], "stages.big.data.mix.weights.apple: no source 'apple'"),
        (["stages.aligned.data={tasks: [b]}"], "stages.aligned.data.tasks.0: no task 'b'"),
        (
            ["stages.text.data={general_text: nowhere}"],
            "stages.text.data.general_text: nowhere: no .txt or .jsonl files",
        ),
        (["stages.ladder.rungs.half.prune.d_ff=17"], "stages.ladder.rungs.half.prune.d_ff: 17 are more than the 16"),
    ],
)
@pytest.mark.parametrize("dry", [True, False], ids=["dry", "run"])
def test_what_would_stop_a_run_is_found_before_anything_is_written(folder, settings, message, dry):
    sets = [word for setting in settings for word in ("--set", setting)]
    refused = in_process(folder, "run", "recipe.yaml", "--out", "runs/refused", *sets, *["--dry-run"] * dry)
    assert refused.exit_code != 0
    assert message in str(refused.exception)
    assert not (folder / "runs" / "refused").exists()


def test_two_runs_into_one_folder_are_refused(folder):
    with locked(folder / "runs" / "jobs"):
        refused = brewjax(folder, "run", "recipe.yaml")
    assert refused.returncode == 2
    assert "runs/jobs: process" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_is_done_is_not_done_again(folder):
    again = brewjax(folder, "run", "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == again.stdout.count(": ") == 23


def test_other_settings_never_continue_or_overwrite_a_training_run(folder):
    weights = (folder / "runs/jobs/big/stage.json").read_bytes()
    refused = brewjax(folder, "run", "recipe.yaml", "--set", "train.seed=1")
    assert refused.returncode == 2
    assert "runs/jobs/text: made from other data or settings" in refused.stderr
    assert (folder / "runs/jobs/big/stage.json").read_bytes() == weights


@pytest.mark.long
def test_killed_in_the_middle_of_every_stage_it_ends_as_if_nothing_had_happened(folder):
    killed = 0
    for step in ("data-text", "text", "big", "aligned", "half-pruned", "half", "evaluate-half", "turbo"):
        record = folder / "runs" / "killed" / step / "stage.json"
        running = start(folder, "run", "recipe.yaml", "--out", "runs/killed")
        while not record.exists() and running.poll() is None:
            time.sleep(0.01)
        if step in ("text", "big", "half"):  # with a checkpoint
            while not list((record.parent / "checkpoints").glob("[0-9]*")) and running.poll() is None:
                time.sleep(0.01)
        running.kill()
        assert running.wait() == -signal.SIGKILL, running.stderr.read().decode()
        killed += "seconds" not in json.loads(record.read_text())
    assert killed >= 5  # the quickest may have been done by then
    last = brewjax(folder, "run", "recipe.yaml", "--out", "runs/killed")
    assert last.returncode == 0, last.stderr
    for name in ("aligned", "turbo"):
        tables = [
            pq.read_table(folder / "runs" / run / f"evaluate-{name}" / "apply.parquet") for run in ("jobs", "killed")
        ]
        assert tables[0].equals(tables[1])


def test_a_stage_is_a_verb_too(workdir, refuse):
    smaller = in_process(
        workdir, "prune", "runs/jobs/big/model", "runs/verb", "--dataset", "jobs", "--task", "apply.yaml",
        "--set", "layers=1", "--set", "examples=20",
    )  # fmt: skip
    assert smaller.exit_code == 0, smaller.output
    assert ModelConfig.load(workdir / "runs/verb/prune/model/model.yaml").layers == 1
    quantised = in_process(workdir, "quantize", "runs/verb/prune/model", "runs/verb/turbo")
    assert quantised.exit_code == 0, quantised.output
    refused = refuse(*distill("runs/verb/prune/model", "runs/verb2", teacher="big"))
    assert "stages.distill.teacher: no stage 'big' before it, and no model there" in refused


@pytest.mark.long
def test_a_teacher_with_another_tokenizer_is_refused(workdir, refuse):
    shutil.copytree(workdir / "runs/jobs/big/model", workdir / "foreign")
    Tokenizer.byte_level().save(workdir / "foreign" / "tokenizer")
    foreign = distill("runs/jobs/half/model", "runs/verb3", teacher="foreign")
    message = "stages.distill.teacher: the tokenizer of foreign is not this recipe's"
    assert message in refuse(*foreign)
    # Nor where all that comes before was done with another.
    done = brewjax(workdir, *distill("runs/jobs/half/model", "runs/verb3", teacher="runs/jobs/big/model"))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(workdir / "runs/verb3/distill")
    assert message in refuse(*foreign)


def test_a_member_is_ranked_and_a_prompt_answered(folder):
    arguments = ["--dataset", "jobs", "--task", "apply.yaml", "--member", "m7", "--top", "3"]
    ranked = in_process(folder, "score", "runs/jobs/turbo/model", *arguments)
    assert ranked.exit_code == 0, ranked.output
    assert "P(Yes)" in ranked.stdout
    prompt = {"preamble": "A nurse.\n", "events": [], "questions": ["Nurse\n", "Cook\n"], "labels": ["Yes", "No"]}
    answered = in_process(folder, "score", "runs/jobs/turbo/model", "--prompt", "-", stdin=json.dumps(prompt))
    assert answered.exit_code == 0, answered.output
    assert "Nurse" in answered.stdout
    assert "Cook" in answered.stdout


def test_a_new_task_needs_a_file_and_nothing_else(folder):
    (folder / "long_look.yaml").write_text(
        TASK.replace("name: apply", "name: long_look")
        .replace("action: applied}", "seconds: [0]}", 1)
        .replace("match: {seconds: [0]}", "match: {action: applied}")
    )
    judged = in_process(folder, "evaluate", "runs/jobs/turbo/model", "jobs", "long_look.yaml")
    assert judged.exit_code == 0, judged.output
    assert "long_look" in judged.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "recipe.yaml", "--set", "train.stepz=3"], "unknown key 'stepz'; did you mean 'steps'?"),
        (["run", "recipe.yaml", "--set", "dataset=elsewhere"], "elsewhere: no such folder"),
        (["run", "recipe.yaml", "--set", "model=elsewhere.yaml"], "elsewhere.yaml: no such file"),
        (["data", "check", "elsewhere"], "elsewhere: no such folder"),
        (["score", "runs/jobs/turbo/model"], "give --prompt, or --dataset, --task and --member"),
        (["score", "elsewhere", "--prompt", "-"], "stdin:1: not valid JSON"),
        (
            ["evaluate", "runs/jobs/turbo/model", "jobs", "maybe.yaml"],
            "maybe.yaml:6: labels.0.word: label word 'Perhaps' is",
        ),
        (["prompt", "jobs", "apply.yaml", "--member", "nobody"], "no member 'nobody'; ids look like 'm0', 'm1'"),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback(workdir, refuse, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    assert message in refuse(*arguments)
