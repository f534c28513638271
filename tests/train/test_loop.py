"""Training on a toy: every question is answered by its own first token. Run as a script, this file trains on it."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from orbax.checkpoint import v1 as ocp

from brewjax.data.records.loader import TokenBatch
from brewjax.data.records.shards import write_shards
from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.config import ModelConfig
from brewjax.model.decoder import Decoder
from brewjax.model.params import Params
from brewjax.model.sharding import MeshConfig
from brewjax.train.checkpoints import UnreadableCheckpointError
from brewjax.train.loop import NonFiniteError, TrainConfig, abstract_state, train
from brewjax.train.lora import LoraConfig
from brewjax.train.metrics_writer import METRICS, MetricsWriter, read_metrics
from brewjax.train.objectives import AuxInputs, WeightedSum, supervised
from brewjax.train.optimizer import OptimizerConfig
from tests.tiny import MODEL, params, prompt

ROOT = Path(__file__).parents[2]
POISON = 2  # a token that no prompt has but the poisoned one
ADAM = OptimizerConfig(learning_rate=0.02, warmup=5, schedule="constant")
CONFIG = TrainConfig(steps=40, batch_size=4, seq_len=64, optimizer=ADAM, checkpoint_every_steps=5)


def toy(number: int) -> EncodedPrompt:
    random = np.random.default_rng(number)
    encoded = prompt(random, questions=random.integers(1, 4, 3), layout=("dense", "star")[number % 2])
    questions = [[3 + answer, *rest] for (_, *rest), answer in zip(encoded.questions, encoded.answers, strict=True)]
    return dataclasses.replace(encoded, questions=questions)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prompts = [toy(number) for number in range(200)]
    write_shards(folder, [(encoded, {"prompt": number}) for number, encoded in enumerate(prompts)], CONFIG.seq_len)
    return folder


def losses(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder / METRICS)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # each step once, in order
    return {row["step"]: row["loss"] for row in rows}


def assert_same_numbers(folder: Path, other: Path, steps: range) -> None:
    """The gradient's norm too: Adam hides a gradient that is wrong by a factor."""
    for name, tolerance in (("loss", 5e-5), ("grad_norm", 1e-4), ("targets", 0)):
        actual, expected = ([row[name] for row in read_metrics(run / METRICS)] for run in (folder, other))
        at = slice(steps.start - 1, steps.stop - 1)
        np.testing.assert_allclose(actual[at], expected[at], rtol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    train(MODEL, CONFIG, shards, folder, supervised)
    return folder


def test_loss_falls(finished):
    actual = losses(finished)
    assert len(actual) == CONFIG.steps
    assert actual[1] > 2
    assert np.mean([actual[step] for step in range(31, 41)]) < 0.3


def test_a_finished_run_has_nothing_to_do(shards, finished):
    before = losses(finished)
    params = train(MODEL, CONFIG, shards, finished, supervised)
    assert losses(finished) == before
    assert newest_checkpoint(finished)[0] == CONFIG.steps
    jax.tree.map(np.testing.assert_array_equal, params, newest_checkpoint(finished)[1])


def test_accumulation_changes_no_loss(shards, finished, tmp_path):
    config = CONFIG.model_copy(update={"gradient_accumulation_steps": 4, "steps": 8})
    train(MODEL, config, shards, tmp_path, supervised)
    assert_same_numbers(tmp_path, finished, range(1, 9))


def test_rows_must_divide_into_parts():
    with pytest.raises(
        pydantic.ValidationError, match=r"batch_size \(4\) must be a multiple of gradient_accumulation_steps \(3\)"
    ):
        TrainConfig(**CONFIG.model_dump() | {"gradient_accumulation_steps": 3})


# --- killed and started again


def start(shards: Path, folder: Path, devices: int = 1) -> subprocess.Popen:
    """Trains in a process of its own, on virtual devices over which the weights are split."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    arguments = [sys.executable, "-m", "tests.train.test_loop", shards, folder, str(devices)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log)


def kill_at(step: int, process: subprocess.Popen, folder: Path) -> None:
    while len(read_metrics(folder / METRICS)) < step:
        assert process.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    process.wait()


def without_speed(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / METRICS)
    return [{name: row[name] for name in row.keys() - {"tokens_per_second", "seconds"}} for row in rows]


@pytest.mark.long
def test_a_run_killed_twice_has_the_losses_of_one_that_was_not(shards, finished, tmp_path):
    for step in (13, 24):  # with a checkpoint every 5 steps; where exactly the kill hits is up to the machine
        kill_at(step, start(shards, tmp_path), tmp_path)
        assert len(read_metrics(tmp_path / METRICS)) < CONFIG.steps
    before = read_metrics(tmp_path / METRICS)
    assert start(shards, tmp_path).wait() == 0, (tmp_path / "log.txt").read_text()
    assert without_speed(tmp_path) == without_speed(finished)  # to the bit
    assert read_metrics(tmp_path / METRICS)[:15] == before[:15]  # speed and all: these steps were not run again


def test_a_checkpoint_continues_on_another_mesh(shards, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(CONFIG.steps))  # the newest is now 5 steps before the end
    assert start(shards, tmp_path, devices=2).wait() == 0, (tmp_path / "log.txt").read_text()
    assert_same_numbers(tmp_path, finished, range(CONFIG.steps - 4, CONFIG.steps + 1))
    speed = [[row["tokens_per_second"] for row in read_metrics(folder / METRICS)] for folder in (finished, tmp_path)]
    assert speed[0][:-5] == speed[1][:-5]
    assert speed[0][-5:] != speed[1][-5:]  # these steps, and no others, were run again


def test_a_last_line_cut_short_is_dropped(tmp_path):
    (tmp_path / METRICS).write_text(
        "".join(json.dumps({"step": step, "seconds": 9.0}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo'
    )
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == [1, 2, 3]
    with MetricsWriter(tmp_path, resumed_step=2, steps=5) as writer:
        writer.write(3, {"loss": 0.5, "tokens": 10})
    assert without_speed(tmp_path)[1:] == [{"step": 2}, {"step": 3, "loss": 0.5, "tokens": 10}]
    assert 9 < read_metrics(tmp_path / METRICS)[-1]["seconds"] < 10  # what the killed attempt took counts


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "state/_METADATA", "data/*", "state/ocdbt.process_0/d/*"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(shards, finished, tmp_path, capfd, file):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / str(CONFIG.steps)).glob(file):
        cut_in_half(path)
    train(MODEL, CONFIG, shards, tmp_path, supervised)
    assert without_speed(tmp_path) == without_speed(finished)  # to the bit
    assert newest_checkpoint(tmp_path)[0] == CONFIG.steps
    assert (tmp_path / f"damaged-{CONFIG.steps}").is_dir()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "cannot be read" in line]
    assert f"going on from step {CONFIG.steps - 5}" in line


def test_where_every_checkpoint_is_damaged_nothing_is_touched(shards, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("checkpoints/*/state/manifest.ocdbt"):
        cut_in_half(path)
    with pytest.raises(UnreadableCheckpointError, match=r"step 40: .*; step 35: .*Delete the stage's folder"):
        train(MODEL, CONFIG, shards, tmp_path, supervised)
    assert len(list(tmp_path.glob("checkpoints/*/state/manifest.ocdbt"))) == 2


# --- precision


def test_whatever_is_trained_is_float32():
    at_rest = MODEL.model_copy(update={"param_dtype": "bfloat16", "compute_dtype": "bfloat16"})
    mesh = MeshConfig().build()
    for lora in (None, LoraConfig(rank=2)):
        config = CONFIG.model_copy(update={"lora": lora})
        with jax.set_mesh(mesh):
            leaves = jax.tree.leaves(abstract_state(at_rest, config, mesh))
        assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}  # and counts of steps


def as_dtype(weights: Params, model: ModelConfig) -> Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, model.param_dtype), weights)


def test_a_bfloat16_model_is_trained_in_float32_and_given_back_as_it_was(shards, finished, tmp_path):
    """Bit for bit as a float32 model; `finished` has compiled its step."""
    config = CONFIG.model_copy(update={"steps": 4, "checkpoint_every_steps": 4})
    at_rest = MODEL.model_copy(update={"param_dtype": "bfloat16"})
    start = jax.tree.map(lambda leaf: np.asarray(leaf.astype("bfloat16")), params(MODEL))
    learnt, expected = (
        train(
            model, config, shards, tmp_path / model.param_dtype, supervised, functools.partial(as_dtype, start, model)
        )
        for model in (at_rest, MODEL)
    )
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), expected)
    jax.tree.map(np.testing.assert_array_equal, learnt, rounded)
    trained = newest_checkpoint(tmp_path / "bfloat16", config)[1]  # read as a float32 model's
    jax.tree.map(np.testing.assert_array_equal, trained, expected)


# --- NaN


def newest_checkpoint(folder: Path, config: TrainConfig = CONFIG) -> tuple[int, Params]:
    """Its step and parameters, on one device, however many wrote it."""
    mesh = MeshConfig().build(jax.devices()[:1])
    with jax.set_mesh(mesh), ocp.training.Checkpointer((folder / "checkpoints").absolute()) as checkpointer:
        state = checkpointer.load_checkpointables(None, {"state": abstract_state(MODEL, config, mesh)})["state"]
        return checkpointer.latest.step, state["params"]


def poisoned(decoder: Decoder, batch: TokenBatch, aux: AuxInputs) -> tuple[WeightedSum, dict[str, WeightedSum]]:
    loss, metrics = supervised(decoder, batch, aux)
    return loss._replace(total=loss.total * jnp.where(jnp.any(batch.tokens == POISON), jnp.nan, 1)), metrics


def test_nan_stops_the_run_and_names_the_examples(tmp_path):
    prompts = [toy(number) for number in range(40)]
    (_, *preamble), *events = prompts[25].prefix_pieces  # a prompt of the fourth batch
    prompts[25] = dataclasses.replace(prompts[25], prefix_pieces=[[POISON, *preamble], *events])
    write_shards(tmp_path, [(encoded, {"prompt": number}) for number, encoded in enumerate(prompts)], CONFIG.seq_len)
    with pytest.raises(NonFiniteError, match=r"loss nan(.|\n)*\"prompt\": 25\b") as error:
        train(MODEL, CONFIG.model_copy(update={"checkpoint_every_steps": 1}), tmp_path, tmp_path, poisoned)
    good = len(losses(tmp_path))
    assert good == 3
    assert f"step {good + 1}:" in str(error.value)
    with np.load(tmp_path / f"bad_batch_step_{good + 1}.npz") as batch:
        assert POISON in batch["tokens"]
    step, params = newest_checkpoint(tmp_path)
    assert step == good
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_rate_that_is_far_too_high_stops_the_run_before_it_spoils_a_checkpoint(shards, tmp_path):
    adam = OptimizerConfig(warmup=5).model_copy(update={"learning_rate": 1e38})  # the first step has a rate of zero
    with pytest.raises(NonFiniteError, match=r"step 2: .* update norm inf"):
        train(
            MODEL,
            CONFIG.model_copy(update={"optimizer": adam, "checkpoint_every_steps": 1}),
            shards,
            tmp_path,
            supervised,
        )
    step, params = newest_checkpoint(tmp_path)
    assert step == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    shards, folder, fsdp = sys.argv[1:]
    config = CONFIG.model_copy(update={"mesh": MeshConfig(fsdp=int(fsdp))})
    train(MODEL, config, Path(shards), Path(folder), supervised)
