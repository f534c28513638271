"""A teacher in the step, on a mesh of its own, or in a cache: the same lesson. Frozen models stay as they are."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.data.records.loader import load_batches
from brewjax.data.records.shards import write_shards
from brewjax.model.params import bind
from brewjax.model.sharding import MeshConfig
from brewjax.train import teachers
from brewjax.train.align import Align
from brewjax.train.batches import ShardedBatches
from brewjax.train.distill import Distill
from brewjax.train.loop import train
from brewjax.train.lora import LoraConfig
from brewjax.train.metrics_writer import METRICS, read_metrics
from brewjax.train.objectives import supervised
from brewjax.train.teachers import CacheError, FrozenModel, TeacherCache, TeacherOnMesh, fingerprint, write_cache
from tests.tiny import MODEL, params
from tests.train.test_loop import CONFIG, newest_checkpoint, shards, toy, without_speed

__all__ = ["shards"]  # a fixture
BIG = MODEL.model_copy(update={"name": "big", "d_model": 24})
TEACHER = FrozenModel(BIG, params(BIG, seed=7))
SHORT = CONFIG.model_copy(update={"steps": 6, "checkpoint_every_steps": 3})


def written(folder, shards, teacher=TEACHER, k=4, temperature=2.0):
    write_cache(folder, shards, teacher, MeshConfig(), 16, 64, k, temperature)
    return folder


@pytest.fixture(scope="module")
def same_mesh(shards, tmp_path_factory):
    """The folder of a run with the teacher in memory."""
    folder = tmp_path_factory.mktemp("same_mesh")
    distill = Distill(temperature=2.0)
    frozen = distill.aux_models(TEACHER, MODEL, SHORT, shards, folder / "cache")
    train(MODEL, SHORT, shards, folder, distill, init=params, aux_models=frozen)
    return folder


@pytest.mark.parametrize("teacher", ["own_mesh", "cache"])
def test_all_words_but_one_of_a_teacher_elsewhere_teach_what_it_does_in_memory(shards, same_mesh, tmp_path, teacher):
    """The one left out is the tail."""
    distill = Distill(temperature=2.0, teacher_placement=teacher, top_k=1000)
    config = SHORT.model_copy(update={"gradient_accumulation_steps": 2})  # which changes nothing either
    frozen = distill.aux_models(TEACHER, MODEL, config, shards, tmp_path / "cache")
    train(MODEL, config, shards, tmp_path, distill, init=params, aux_models=frozen)
    for name in ("loss", "loss_kd", "loss_sft", "grad_norm"):
        actual, expected = ([row[name] for row in read_metrics(run / METRICS)] for run in (tmp_path, same_mesh))
        np.testing.assert_allclose(actual, expected, rtol=2e-4, err_msg=name)


def test_the_student_learns_from_the_teacher_and_the_teacher_learns_nothing(same_mesh):
    rows = read_metrics(same_mesh / METRICS)
    assert rows[-1]["loss_kd"] < rows[0]["loss_kd"]
    np.testing.assert_allclose(
        [row["loss"] for row in rows], [0.1 * row["loss_sft"] + 0.9 * row["loss_kd"] for row in rows], rtol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, TEACHER.params, params(BIG, seed=7))
    _, saved = newest_checkpoint(same_mesh)
    assert jax.tree.map(jnp.shape, saved) == jax.tree.map(jnp.shape, params())


def test_a_run_with_a_frozen_model_goes_on_to_the_bit(shards, same_mesh, tmp_path):
    shutil.copytree(same_mesh, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(SHORT.steps))  # as if killed after step 3, or later
    train(MODEL, SHORT, shards, tmp_path, Distill(temperature=2.0), init=params, aux_models={"teacher": TEACHER})
    assert without_speed(tmp_path) == without_speed(same_mesh)
    jax.tree.map(np.testing.assert_array_equal, newest_checkpoint(tmp_path)[1], newest_checkpoint(same_mesh)[1])


def test_a_cache_has_the_answer_to_every_target(shards, tmp_path):
    cache = TeacherCache(written(tmp_path / "cache", shards))
    mesh = MeshConfig().build()
    ask = TeacherOnMesh(TEACHER, mesh, 4, 2.0)
    batches = ShardedBatches(shards, mesh, 1, 4, 64, 1, 3, {"teacher": cache.look_up})
    for _ in range(3):  # packed otherwise than the cache was
        batch, placed, lookups = next(batches)
        expected, actual = jax.tree.map(lambda x: np.asarray(x)[0], (ask(placed), lookups["teacher"]))
        assert (actual.ids >= 0).any(-1).tolist() == (batch.targets >= 0).tolist()
        np.testing.assert_allclose(actual.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)
        assert (actual.ids == expected.ids).mean() > 0.999  # ties apart
        assert (np.diff(actual.log_probs[batch.targets >= 0], axis=-1) <= 0).all()


def test_a_cache_that_was_killed_goes_on_and_one_that_is_done_is_left_alone(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "PART_WORDS", 300)
    answer, calls = TeacherOnMesh.__call__, []

    def dies(self, placed):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(self, placed)

    monkeypatch.setattr(TeacherOnMesh, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, shards)
    with pytest.raises(CacheError, match="no complete cache"):
        TeacherCache(tmp_path)
    (tmp_path / "part-00099.tmp").mkdir()  # one that was being written
    before = len(calls)
    cache = TeacherCache(written(tmp_path, shards))
    batch = next(iter(load_batches(shards, 8, 64, seed=0)))
    assert (cache.look_up(batch).ids[..., 0] >= 0).tolist() == (batch.targets >= 0).tolist()
    num_calls = len(calls) - before
    whole = len(calls) - before + 3
    written(tmp_path / "again", shards)
    assert len(calls) == before + num_calls + whole  # nothing was asked twice
    written(tmp_path, shards)
    assert len(calls) == before + num_calls + whole


def test_a_cache_of_something_else_is_refused(shards, tmp_path):
    written(tmp_path / "cache", shards)
    counts = write_shards(tmp_path / "other", [(toy(number), {}) for number in range(20)], 64)
    assert counts["records"]
    with pytest.raises(CacheError, match=r"outputs for shards [0-9a-f]{64}, not [0-9a-f]{64}\. Delete it"):
        written(tmp_path / "cache", tmp_path / "other")
    with pytest.raises(CacheError, match=r"outputs for k 4, not 5; temperature 2\.0, not 1\.0"):
        written(tmp_path / "cache", shards, k=5, temperature=1.0)
    nudged = jax.tree.map(jnp.copy, TEACHER.params)
    nudged["layers"]["down"] = nudged["layers"]["down"].at[1, 2, 3].add(1e-6)
    with pytest.raises(CacheError, match="outputs for teacher "):
        written(tmp_path / "cache", shards, teacher=FrozenModel(BIG, nudged))
    cache, batch = TeacherCache(tmp_path / "cache"), next(iter(load_batches(shards, 2, 64, seed=0)))
    unknown = batch._replace(source=batch.source + 10_000)
    with pytest.raises(CacheError, match="has no outputs for record 10"):
        cache.look_up(unknown)
    fewer = batch._replace(targets=np.where(np.arange(64) > 20, -1, batch.targets))
    with pytest.raises(CacheError, match=r"record \d+ has \d+ targets, and the cache has outputs for \d+"):
        cache.look_up(fewer)


def test_weights_that_change_places_have_another_fingerprint():
    mesh = MeshConfig().build()
    swapped = TEACHER.params | {"embedding": TEACHER.params["embedding"][::-1]}
    assert fingerprint(TEACHER, mesh) == fingerprint(FrozenModel(BIG, params(BIG, seed=7)), mesh)
    assert fingerprint(TEACHER, mesh) != fingerprint(FrozenModel(BIG, swapped), mesh)


@pytest.mark.parametrize("lora", [None, LoraConfig()], ids=["held to a copy", "held to the policy without LoRA"])
def test_align_learns_to_prefer_and_the_reference_stays(tmp_path, lora):
    """Of each list's questions, all answered alike, the one that begins with token 3 is preferred to those with 4."""
    prompts = []
    for number in range(100):
        encoded = toy(number)
        questions = [
            [3 if first else 4, *rest[1:]] for first, rest in zip((True, False, False), encoded.questions, strict=True)
        ]
        prompts.append(
            (dataclasses.replace(encoded, questions=questions, answers=[0] * 3, preference_lists=[1, -1, -1]), {})
        )
    write_shards(tmp_path / "shards", prompts, 64)
    reference, config = params(), CONFIG.model_copy(update={"checkpoint_every_steps": 40, "lora": lora})
    frozen = {} if lora else {"reference": FrozenModel(MODEL, reference)}
    train(MODEL, config, tmp_path / "shards", tmp_path, Align(beta=0.5), init=params, aux_models=frozen)
    rows = read_metrics(tmp_path / METRICS)
    assert rows[0]["reward_margin"] == 0
    np.testing.assert_allclose(rows[0]["loss_dpo"], np.log(3), rtol=1e-5)  # two rejected, all alike yet
    assert rows[-1]["reward_chosen"] > 0 > rows[-1]["reward_rejected"]
    assert np.mean([row["preference_accuracy"] for row in rows[-8:]]) > 0.8  # by chance: 0.5
    jax.tree.map(np.testing.assert_array_equal, reference, params())


def test_training_starts_from_what_it_is_given(shards, same_mesh):
    mesh = SHORT.mesh.build()
    batch, _, _ = next(ShardedBatches(shards, mesh, 1, SHORT.batch_size, SHORT.seq_len, 1, SHORT.seed))
    with jax.set_mesh(mesh):
        loss, _ = jax.jit(lambda params, batch: supervised(bind(MODEL, params), batch, {}))(params(), batch)
    np.testing.assert_allclose(read_metrics(same_mesh / METRICS)[0]["loss_sft"], loss.total / loss.weight, rtol=1e-5)
