"""Every objective against its definition in float64, against TRL's, and over meshes. As a script, it runs them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from brewjax.data.records.loader import NO_TARGET, TokenBatch
from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.params import Params, bind
from brewjax.model.sharding import BATCH_AXES, MeshConfig
from brewjax.train.align import Align
from brewjax.train.batches import BATCH_SPEC
from brewjax.train.distill import Distill
from brewjax.train.objectives import Objective, TopK, WeightedSum, supervised
from brewjax.train.teachers import FrozenModel, TeacherOnMesh
from pallas_kernels.distillation import linear_distillation
from tests.tiny import MODEL, batch_of, params, prompt

ROOT = Path(__file__).parents[2]
GOLDENS = Path(__file__).parent / "goldens" / "trl.npz"
LENGTH, K = 64, 5
TEACHER = MODEL.model_copy(update={"name": "teacher", "d_model": 24, "layers": 1})
DEEP = MODEL.model_copy(update={"name": "deep", "layers": 5})
MESH = MeshConfig(fsdp=2, context=2, tensor=2)
OWN = "own answers and layers"  # for its definition see test_on_policy


def listed(seed: int, lists: list[int], weight: float) -> EncodedPrompt:
    """A prompt whose questions stand in these lists; the first answer is two words."""
    encoded = prompt(np.random.default_rng(seed), events=(4, 3), questions=[3, 2, 3, 2, 3][: len(lists)])
    return dataclasses.replace(encoded, preference_lists=lists, weight=weight, answers=[[5, 9], *encoded.answers[1:]])


@functools.cache
def batch() -> TokenBatch:
    """Rows of two examples with one or two whole lists each, some of which lack a side; the last row has none."""
    kinds = [[1, -1, -1, 0], [-1, 1, 2, -2, -2], [-1, -1, 3, -3], [0, 2, -2, 1], [-1, 1, -1, -1, -1]]
    rows = [
        [listed(10 * row + n, kinds[(row + 2 * n) % len(kinds)], [0.5, 1, 2][(row + n) % 3]) for n in range(2)]
        for row in range(7)
    ]
    return batch_of([*rows, [prompt(np.random.default_rng(99))]], LENGTH)


OBJECTIVES: dict[str, Objective] = {
    "supervised": supervised,
    "dpo": Align(beta=0.5, loss_type="sigmoid", label_smoothing=0.1, rpo_alpha=0.3),
    "softmax dpo": Align(beta=0.5),
    "forward KL": Distill(kd_weight=0.7, temperature=2.0),
    "Jensen-Shannon": Distill(divergence="jensen_shannon", beta=0.3),
    "skewed KL": Distill(divergence="skewed_kl", alpha=0.2),
    "reverse KL of few words": Distill(divergence="reverse_kl", temperature=2.0),
    OWN: Distill(on_policy_fraction=0.5, hidden_state_weight=0.5),
}
ON_MESH = ["dpo", "forward KL", "reverse KL of few words", OWN]  # for `supervised` see test_sharding
WITH_GRADIENTS = ON_MESH[:2]


def models(name: str) -> dict[str, FrozenModel]:
    objective = OBJECTIVES[name]
    if isinstance(objective, Align):
        return {"reference": FrozenModel(MODEL, params(seed=1))}
    if name == OWN:
        return {"teacher": FrozenModel(DEEP, params(DEEP, seed=2))}
    return {"teacher": FrozenModel(TEACHER, params(TEACHER, seed=2))} if isinstance(objective, Distill) else {}


def teacher_outputs(name: str) -> dict[str, TopK]:
    """What a teacher who is elsewhere said of the batch."""
    if not name.endswith("of few words"):
        return {}
    logits, (rows, places) = logits_of(models(name)["teacher"])
    ids, log_probs = np.full((8, LENGTH, K), -1), np.full((8, LENGTH, K), -np.inf, np.float32)
    log_p = log_softmax(logits / OBJECTIVES[name].temperature)
    ids[rows, places] = np.argsort(-log_p, -1)[:, :K]
    log_probs[rows, places] = -np.sort(-log_p, -1)[:, :K]
    return {"teacher": TopK(ids, log_probs)}


def run(name: str, mesh: MeshConfig) -> dict[str, np.ndarray]:
    """Loss, metrics and gradients of an objective by name, the last by path."""
    on, frozen, answers = mesh.build(), models(name), teacher_outputs(name)
    if answers:
        frozen = {}

    def loss(
        trained: Params, batch: TokenBatch, answers: dict, weights: dict
    ) -> tuple[jax.Array, dict[str, WeightedSum]]:
        aux = answers | {key: bind(frozen[key].model, leaves) for key, leaves in weights.items()}
        loss, metrics = OBJECTIVES[name](bind(MODEL, trained), batch, aux)
        return loss.total, {"loss": loss} | metrics

    with jax.set_mesh(on):
        rows = jax.device_put((batch(), answers), NamedSharding(on, jax.P(BATCH_AXES)))
        weights = {key: frozen_model.on(on) for key, frozen_model in frozen.items()}
        trained = FrozenModel(MODEL, params()).on(on)
        if name in WITH_GRADIENTS:
            (_, means), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, *rows, weights)
        else:
            (_, means), grads = jax.jit(loss)(trained, *rows, weights), None
    leaves, _ = jax.tree_util.tree_flatten_with_path((means, grads))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def alone(name: str) -> dict[str, np.ndarray]:
    return run(name, MeshConfig())


def assert_is(name: str, metric: str, expected: tuple[float, float]) -> None:
    actual = [alone(name)[f"[0]['{metric}'].{part}"] for part in WeightedSum._fields]
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-5, err_msg=metric)


# --- the definitions


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@functools.cache
def hidden_and_head(model, seed: int) -> tuple[np.ndarray, np.ndarray]:
    decoder = bind(model, params(model, seed))
    with jax.set_mesh(MeshConfig().build()):
        hidden = jax.jit(lambda *inputs: decoder(*inputs))(*jax.tree.map(jnp.asarray, batch()[:3]))
        return np.float64(hidden), np.float64(decoder.lm_head)


def logits_of(frozen: FrozenModel | None) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """float64 [targets, V] of the model, or of the one that learns, and where the targets stand."""
    model, seed = (MODEL, 0) if frozen is None else (frozen.model, {"tiny": 1, "teacher": 2}[frozen.model.name])
    hidden, head = hidden_and_head(model, seed)
    places = np.nonzero(batch().targets != NO_TARGET)
    return hidden[places] @ head.T, places


def cross_entropy() -> tuple[float, float]:
    logits, places = logits_of(None)
    picked = log_softmax(logits)[np.arange(len(logits)), batch().targets[places]]
    weights = np.float64(batch().weights[places])
    return -(weights * picked).sum(), weights.sum()


def test_supervised_is_the_weighed_cross_entropy():
    assert set(batch().weights.flatten()) == {0, 0.5, 1, 2}
    assert_is("supervised", "loss", cross_entropy())


class Candidate(NamedTuple):
    """Log-probabilities of the targets, under the policy and the reference, and the targets' weights."""

    policy: np.ndarray
    reference: np.ndarray
    weights: np.ndarray

    @property
    def score(self) -> float:
        return (self.policy - self.reference).sum()


@functools.cache
def whole_lists() -> list[tuple[Candidate, list[Candidate]]]:
    """The preferred and the rejected of every list that has both."""
    _, places = logits_of(None)
    labels = batch().targets[places]
    policy, reference = (
        log_softmax(logits_of(of)[0])[np.arange(len(labels)), labels] for of in (None, models("dpo")["reference"])
    )
    targets: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    for n, (row, place) in enumerate(zip(*places, strict=True)):
        if liked := batch().preference[row, place]:
            token_labels = batch().token_labels
            of_list = row, token_labels.example_id[row, place], abs(liked)
            targets[of_list][np.sign(liked), token_labels.piece_id[row, place]].append(n)
    actual = []
    for of_list in targets.values():
        sides: dict = {1: [], -1: []}
        for (side, _), of in of_list.items():
            sides[side].append(Candidate(policy[of], reference[of], batch().weights[places][of]))
        if sides[1] and sides[-1]:
            (preferred,) = sides[1]
            actual.append((preferred, sides[-1]))
    return actual


def minus_log_sigmoid(x):
    return np.log1p(np.exp(-x))


def test_the_lists_are_of_all_kinds():
    sizes = collections.Counter(len(rejected) for _, rejected in whole_lists())
    assert set(sizes) == {1, 2, 4}
    assert {len(preferred.policy) for preferred, _ in whole_lists()} == {1, 2}
    rows, places = np.nonzero(batch().preference)
    labels = batch().token_labels.example_id[rows, places], np.abs(batch().preference[rows, places])
    assert len(set(zip(rows, *labels, strict=True))) > len(whole_lists())  # some lists lack a side


@pytest.mark.parametrize("name", ["dpo", "softmax dpo"])
def test_align_is_its_definition(name):
    align, expected = OBJECTIVES[name], collections.defaultdict(float)
    for preferred, rejected in whole_lists():
        weight = preferred.weights.mean()
        margins = align.beta * np.array([preferred.score - candidate.score for candidate in rejected])
        cost = {  # equation 7 of DPO, with its label smoothing; equation 8 of S-DPO
            "dpo": np.mean(0.9 * minus_log_sigmoid(margins) + 0.1 * minus_log_sigmoid(-margins)),
            "softmax dpo": minus_log_sigmoid(-np.log(np.exp(-margins).sum())),
        }[name]
        row = {
            "loss": cost - align.rpo_alpha * preferred.policy.mean(),
            "loss_dpo": cost,
            "loss_sft": -preferred.policy.mean(),
            "reward_chosen": align.beta * preferred.score,
            "reward_rejected": align.beta * np.mean([candidate.score for candidate in rejected]),
            "reward_margin": margins.mean(),
            "preference_accuracy": (margins > 0).mean(),
            "weight": 1,
        }
        for metric, value in row.items():
            expected[metric] += weight * value
    weight = expected.pop("weight")
    for metric, total in expected.items():
        assert_is(name, metric, (total, weight))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def few_words(log_p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    words = np.take_along_axis(log_p, ids, -1)
    return np.concatenate([words, np.log1p(-np.exp(words).sum(-1, keepdims=True))], -1)


@pytest.mark.parametrize(
    "name", [name for name, objective in OBJECTIVES.items() if isinstance(objective, Distill) and name != OWN]
)
def test_distill_is_its_definition(name):
    distill = OBJECTIVES[name]
    (student, places), (teacher, _) = logits_of(None), logits_of(models(name)["teacher"])
    log_p, log_q = (log_softmax(logits / distill.temperature) for logits in (teacher, student))
    mix = lambda share: np.logaddexp(np.log(share) + log_p, np.log1p(-share) + log_q)  # noqa: E731
    if name == "reverse KL of few words":
        ids = np.argsort(-log_p, -1)[:, :K]
        divergence = kl(few_words(log_q, ids), few_words(log_p, ids))
    else:
        divergence = {
            "forward KL": lambda: kl(log_p, log_q),
            "Jensen-Shannon": lambda: 0.3 * kl(log_p, mix(0.3)) + 0.7 * kl(log_q, mix(0.3)),
            "skewed KL": lambda: kl(log_p, mix(0.2)),
        }[name]()
    sft, weight = cross_entropy()
    kd = distill.temperature**2 * (batch().weights[places] * divergence).sum()
    assert_is(name, "loss_sft", (sft, weight))
    assert_is(name, "loss_kd", (kd, weight))
    assert_is(name, "loss", ((1 - distill.kd_weight) * sft + distill.kd_weight * kd, weight))


# --- TRL's own (make_goldens.py)


@pytest.mark.parametrize("against", ["sigmoid", "softmax"])
def test_pairs_cost_what_trl_says(against):
    """A row of pairs of one token each; for pairs DPO and its form for lists are one, label smoothing and all."""
    with np.load(GOLDENS) as trl:
        logps = np.float32(trl["logps"])
        policy, reference = (rows.T.flatten() for rows in (logps[:2], logps[2:]))
        pairs, ones = np.arange(20).repeat(2), np.ones(40)
        row = (policy, reference, ones, 1 + pairs // 4, np.arange(40) % 8, np.tile([1, -1], 20) * (1 + pairs % 4))
        for beta in (0.1, 0.5):
            for smoothing in (0.0, 0.1):
                align = Align(beta=beta, label_smoothing=smoothing, loss_type=against)
                losses, chosen, rejected = trl[f"dpo {beta} {smoothing}"]
                actual = {key: mean.total for key, mean in jax.jit(align.lists)(*map(jnp.asarray, row)).items()}
                np.testing.assert_allclose(actual["loss_dpo"], losses.sum(), rtol=1e-5)
                np.testing.assert_allclose(actual["reward_chosen"], chosen.sum(), rtol=1e-5)
                np.testing.assert_allclose(actual["reward_rejected"], rejected.sum(), rtol=1e-5)
                assert actual["preference_accuracy"] == (chosen > rejected).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("beta", "distill"),
    [
        (0.0, {"divergence": "forward_kl"}),
        (0.5, {"divergence": "jensen_shannon", "beta": 0.5}),
        (1.0, {"divergence": "reverse_kl"}),
    ],
)
def test_divergences_are_trls(beta, distill, temperature):
    """But for the square of the temperature, which TRL leaves out."""
    with np.load(GOLDENS) as trl:
        student, teacher = np.float32(trl["student"]), np.float32(trl["teacher"])
        head = np.eye(64, dtype=np.float32)  # hidden states are logits
        how = Distill(**distill).divergence_function()
        total, _ = linear_distillation(student, head, teacher, head, np.ones(6, np.float32), how, temperature)
        np.testing.assert_allclose(total, temperature**2 * trl[f"jsd {beta} {temperature}"], rtol=1e-4)


# --- directions


def push_of(align: Align, policy: jax.Array, *arrays: jax.Array) -> jax.Array:
    """d loss / d log pi of a row's targets."""
    return jax.jit(jax.grad(lambda policy: align.lists(policy, *arrays)["loss_dpo"].total))(policy)


def test_dpo_pushes_the_preferred_up_and_the_rejected_down_by_how_wrong_it_is():
    """The gradient under equation 7 of DPO: beta x sigmoid(-margin) on log pi of both sides."""
    align = Align(beta=0.2)
    policy, reference = jnp.array([-1.0, -3.0, -0.5, 0.0]), jnp.array([-2.0, -1.0, -0.7, 0.0])
    labels = jnp.ones(4), jnp.ones(4, int), jnp.array([0, 0, 1, 2]), jnp.array([1, 1, -1, 0])
    gradient = push_of(align, policy, reference, *labels)
    margin = 0.2 * ((-1 + 2) + (-3 + 1) - (-0.5 + 0.7))
    push = 0.2 / (1 + np.exp(margin))
    np.testing.assert_allclose(gradient, [-push, -push, push, 0], rtol=1e-5)


def test_the_wrong_answer_that_is_ranked_highest_is_pushed_hardest():
    """S-DPO's gradient: rejected candidates share the push by a softmax over their scores."""
    align = Align(beta=1.0)
    policy, zeros = jnp.array([-2.0, -1.0, -3.0]), jnp.zeros(3)
    labels = jnp.ones(3), jnp.ones(3, int), jnp.arange(3), jnp.array([2, -2, -2])
    gradient = push_of(align, policy, zeros, *labels)
    scores = np.exp([-2.0, -1.0, -3.0])
    np.testing.assert_allclose(gradient, scores / scores.sum() - [1, 0, 0], rtol=1e-5)


# --- over meshes


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[str, np.ndarray]:
    """By objective and path, on eight devices."""
    out = tmp_path_factory.mktemp("sharded") / "out.npz"
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.train.test_objectives", out]
    subprocess.run(command, cwd=ROOT, env=os.environ | flags, check=True)
    with np.load(out) as stored:
        return dict(stored)


@pytest.mark.long
@pytest.mark.parametrize("name", ON_MESH)
def test_a_mesh_changes_nothing(sharded, name):
    expected = alone(name)
    assert any("embedding" in key for key in expected) is (name in WITH_GRADIENTS)
    for key, value in expected.items():
        np.testing.assert_allclose(
            sharded[f"{name} {key}"], value, rtol=2e-4, atol=2e-4 * np.abs(value).max(), err_msg=key
        )


def answers_moved(of_teacher: MeshConfig, of_student: MeshConfig) -> dict[str, np.ndarray]:
    """What a teacher on one mesh says of a batch on another, moved there."""
    sharding = NamedSharding(of_student.build(), BATCH_SPEC)
    placed = jax.device_put(jax.tree.map(lambda x: x.reshape(1, 8, LENGTH), batch()), sharding)
    with jax.set_mesh(sharding.mesh):
        outputs = jax.device_put(
            TeacherOnMesh(*models("forward KL").values(), of_teacher.build(), K, 2.0)(placed), sharding
        )
    assert outputs.ids.sharding == sharding
    return jax.tree.map(np.asarray, outputs._asdict())


@pytest.mark.long
def test_a_teacher_on_another_mesh_says_the_same(sharded):
    expected = answers_moved(MeshConfig(), MeshConfig())
    np.testing.assert_array_equal(sharded["ids"], expected["ids"])
    np.testing.assert_allclose(sharded["log_probs"], expected["log_probs"], rtol=1e-4)
    assert (expected["ids"][0, ..., 0] >= 0).tolist() == (batch().targets != NO_TARGET).tolist()


# --- what makes no sense


def test_align_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="align needs a reference"):
        Align()(bind(MODEL, params()), batch(), {})


def test_distill_without_a_teacher_or_with_one_of_another_vocabulary_is_refused():
    student = bind(MODEL, params())
    with pytest.raises(ValueError, match="distill needs a teacher"):
        Distill()(student, batch(), {})
    teacher_model = MODEL.model_copy(update={"vocab_size": 65})
    with jax.set_mesh(MeshConfig().build()):
        rows = jax.tree.map(jnp.asarray, batch())
        with pytest.raises(ValueError, match="the teacher's vocabulary has 65 words, the student's 64"):
            jax.eval_shape(lambda: Distill()(student, rows, {"teacher": bind(teacher_model, params(teacher_model))}))


if __name__ == "__main__":
    actual = {f"{name} {key}": value for name in ON_MESH for key, value in run(name, MESH).items()}
    actual |= answers_moved(MESH, MeshConfig())
    np.savez(sys.argv[1], **actual)
