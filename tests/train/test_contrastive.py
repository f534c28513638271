"""InfoNCE against its definition in float64; GradCache against one batch; records, resuming, learning."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.config import ConfigError
from brewjax.data.records.contrastive import (
    MEMBER,
    MISSING,
    NEGATIVE,
    POSITIVE,
    ContrastiveExample,
    ItemTable,
    ItemTableWriter,
    TextLabels,
)
from brewjax.data.records.loader import load_batches
from brewjax.data.records.shards import write_shards
from brewjax.data.text.encode import Text
from brewjax.model.config import ExpertsConfig
from brewjax.train.contrastive import ITEMS, Contrastive, Embedded
from brewjax.train.gradients import cached_grads
from brewjax.train.loop import TrainConfig, train
from brewjax.train.lora import LoraConfig
from brewjax.train.metrics_writer import METRICS, read_metrics
from brewjax.train.optimizer import OptimizerConfig
from tests.tiny import MODEL, params

ADAM = OptimizerConfig(learning_rate=0.02, warmup=2, schedule="constant")
CONFIG = TrainConfig(steps=6, batch_size=8, seq_len=48, optimizer=ADAM, checkpoint_every_steps=3)
LOSS = Contrastive(dimensions=(8,), temperature=0.2)


def toy(number: int) -> ContrastiveExample:
    """A member goes on to items whose texts have a token of its own text."""
    random = np.random.default_rng(number)
    group = int(random.integers(5))
    items = [group, group + 5, int(random.integers(10))]
    texts = [[3 + item, *random.integers(20, 60, 2).tolist()] for item in items]
    member = [3 + group, *random.integers(20, 60, random.integers(3, 9)).tolist()]
    log_odds = [*random.normal(0, 2, 2).tolist(), np.nan] if number % 3 else [np.nan] * 3
    return ContrastiveExample(number % 20, items, 2, [member, *texts], log_odds)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    examples = [(toy(number), {"toy": number}) for number in range(60)]
    write_shards(folder, examples, CONFIG.seq_len, ItemTableWriter())
    return folder


# --- the loss


def random_batch(micro_batches: int, rows: int, texts: int) -> tuple[np.ndarray, TextLabels]:
    """Vectors and labels in which items repeat, members repeat, and texts are missing."""
    random, shape = np.random.default_rng(1), (micro_batches, rows, texts)
    record = np.full(shape, -1)
    role, item, member = np.full(shape, MISSING), np.full(shape, -1), np.full(shape, -1)
    number = 0
    for row in np.ndindex(micro_batches, rows):
        column = 0
        while column + 4 <= texts - (row[1] == 0):
            at = (*row, slice(column, column + 4))
            record[at], role[at] = number, [MEMBER, POSITIVE, POSITIVE, NEGATIVE]
            item[at], member[at] = [-1, *random.choice(12, 3, replace=False)], number % 5
            number, column = number + 1, column + 4
    share = np.where(item >= 0, np.log((1.0 + np.arange(12)) / 78)[item], 0)
    labels = TextLabels(*(np.asarray(x, np.int32) for x in (record, role, item, member)), share.astype(np.float32))
    return random.standard_normal((*shape, 16)).astype(np.float32), labels


def with_ranker(labels: TextLabels) -> TextLabels:
    """Some items have no answer, and some records none at all."""
    log_odds = np.random.default_rng(5).normal(0, 2, labels.item.shape).astype(np.float32)
    is_answered = (labels.item >= 0) & (labels.item % 4 > 0) & (labels.record % 4 > 0)
    return labels._replace(log_odds=np.where(is_answered, log_odds, np.nan))


def define(vectors: np.ndarray, labels: TextLabels, scale: float, size: int) -> float:
    """The mean loss, from its definition, in float64."""
    texts = vectors.reshape(-1, vectors.shape[-1])[:, :size].astype(np.float64)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    record, role, item, member, share = (x.reshape(-1) for x in labels[:5])
    losses = []
    for i in np.flatnonzero(role == POSITIVE):
        (u,) = np.flatnonzero((record == record[i]) & (role == MEMBER))
        scores = [scale * texts[u] @ texts[i] - share[i]]
        for j in np.flatnonzero((role == POSITIVE) | (role == NEGATIVE)):
            if item[j] != item[i] and not (member[j] == member[i] and role[j] == POSITIVE):
                scores.append(scale * texts[u] @ texts[j] - share[j])
        losses.append(np.log(np.sum(np.exp(scores))) - scores[0])
    return float(np.mean(losses))


def define_divergence(vectors: np.ndarray, labels: TextLabels, scale: float, size: int) -> float:
    """The mean divergence of records from the ranker, from its definition, in float64."""
    texts = vectors.reshape(-1, vectors.shape[-1])[:, :size].astype(np.float64)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    record, role, log_odds = (x.reshape(-1) for x in (labels.record, labels.role, labels.log_odds))
    divergences = []
    for u in np.flatnonzero(role == MEMBER):
        items = np.flatnonzero((record == record[u]) & ~np.isnan(log_odds))
        if len(items):
            odds, exponentials = np.exp(log_odds[items].astype(np.float64)), np.exp(scale * texts[items] @ texts[u])
            p, q = odds / odds.sum(), exponentials / exponentials.sum()
            divergences.append(np.sum(p * np.log(p / q)))
    return float(np.mean(divergences))


@pytest.mark.parametrize("dimensions", [(), (4, 8)])
def test_the_loss_is_its_definition(dimensions):
    vectors, labels = random_batch(2, 3, 9)
    objective = Contrastive(dimensions=dimensions, temperature=0.1)
    embedded = Embedded(vectors, np.zeros(2, np.float32))
    loss, metrics = jax.jit(objective.loss)(objective.init(), embedded, labels)
    expected = np.mean([define(vectors, labels, 10, size) for size in (*dimensions, 16)])
    np.testing.assert_allclose(loss / metrics["loss"].weight, expected, rtol=1e-5)
    assert metrics["loss"].weight == np.sum(labels.role == POSITIVE)
    np.testing.assert_allclose(metrics["temperature"].total / metrics["temperature"].weight, 0.1, rtol=1e-5)


@pytest.mark.parametrize("dimensions", [(), (4, 8)])
def test_the_ranker_adds_its_divergence(dimensions):
    vectors, labels = random_batch(2, 3, 13)
    labels = with_ranker(labels)
    objective = Contrastive(dimensions=dimensions, temperature=0.1, ranker_weight=0.7)
    embedded = Embedded(vectors, np.zeros(2, np.float32))
    loss, metrics = jax.jit(objective.loss)(objective.init(), embedded, labels)
    sizes = (*dimensions, 16)
    divergence = np.mean([define_divergence(vectors, labels, 10, size) for size in sizes])
    info_nce = np.mean([define(vectors, labels, 10, size) for size in sizes])
    np.testing.assert_allclose(metrics["divergence"].total / metrics["divergence"].weight, divergence, rtol=1e-5)
    np.testing.assert_allclose(loss / metrics["loss"].weight, info_nce + 0.7 * divergence, rtol=1e-5)


def test_a_ranker_without_answers_changes_nothing():
    vectors, labels = random_batch(1, 2, 8)
    silent = labels._replace(log_odds=np.full(labels.item.shape, np.nan, np.float32))
    gradient = jax.jit(jax.grad(lambda x, labels: LOSS.loss(LOSS.init(), Embedded(x, jnp.zeros(1)), labels)[0]))
    np.testing.assert_allclose(gradient(vectors, silent), gradient(vectors, labels), rtol=1e-6)


def test_a_record_that_a_row_has_twice_is_as_one_that_two_rows_have():
    vectors, labels = random_batch(1, 1, 9)
    losses = []
    for axis in (1, 2):  # rows, and texts of a row
        twice = jax.tree.map(lambda x, axis=axis: np.concatenate([x, x], axis), (vectors, labels))
        losses.append(LOSS.loss(LOSS.init(), Embedded(twice[0], jnp.zeros(1)), twice[1])[0])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_the_correction_is_subtracted():
    """A popular item's logit is lowered, not raised (tensorflow/recommenders 219)."""
    vectors, labels = random_batch(1, 2, 8)
    embedded, equal = Embedded(np.zeros_like(vectors), np.zeros(1, np.float32)), np.zeros_like(labels.log_share)
    popular = np.where(labels.role == NEGATIVE, np.float32(5), equal)
    for objective, difference in ((LOSS, -0.1), (Contrastive(logq_correction=False), 0)):
        compute = jax.jit(objective.loss)
        losses = [compute(objective.init(), embedded, labels._replace(log_share=x))[0] for x in (equal, popular)]
        assert losses[1] - losses[0] <= difference
        assert difference or losses[0] == losses[1]


def test_a_copy_of_an_item_is_no_negative():
    vectors, labels = random_batch(1, 2, 8)
    one_item = labels._replace(item=np.where(labels.item >= 0, 3, -1))
    loss, _ = jax.jit(LOSS.loss)(LOSS.init(), Embedded(vectors, np.zeros(1, np.float32)), one_item)
    assert loss == 0


def test_the_gradient_is_that_of_the_definition():
    vectors, labels = random_batch(1, 3, 13)
    labels, objective = with_ranker(labels), Contrastive(temperature=0.5)
    define_all = lambda *batch: define(*batch) + define_divergence(*batch)  # noqa: E731

    def mean(vectors, scale):
        loss, metrics = objective.loss({"logit_scale": scale}, Embedded(vectors, jnp.zeros(1)), labels)
        return loss / metrics["loss"].weight

    scale = objective.init()["logit_scale"]
    of_vectors, of_scale = jax.jit(jax.grad(mean, (0, 1)))(jnp.asarray(vectors), scale)
    random, step = np.random.default_rng(2).standard_normal(vectors.shape), 1e-6
    ends = [define_all(vectors.astype(np.float64) + sign * step * random, labels, 2, 16) for sign in (1, -1)]
    np.testing.assert_allclose(np.sum(of_vectors * random), (ends[0] - ends[1]) / (2 * step), rtol=1e-3)
    ends = [define_all(vectors, labels, 2 * np.exp(sign * step), 16) for sign in (1, -1)]
    np.testing.assert_allclose(of_scale, (ends[0] - ends[1]) / (2 * step), rtol=1e-3)


# --- GradCache


def test_cached_gradients_are_those_of_the_whole():
    random = np.random.default_rng(0)
    batches = jnp.asarray(random.standard_normal((4, 3, 5)), jnp.float32)
    weights = {"embed": jnp.asarray(random.standard_normal((5, 2)), jnp.float32), "scale": jnp.float32(1.5)}

    def embed(params, batch):
        return jnp.tanh(batch @ params["embed"]), jnp.arange(3)

    def loss(params, vectors, labels):
        flat = vectors.reshape(-1, 2)
        return jnp.sum(jax.nn.logsumexp(params["scale"] * flat @ flat.T, -1)), {}

    grads, _ = jax.jit(lambda p: cached_grads(embed, loss, p, batches))(weights)
    whole, _ = jax.jit(lambda p: cached_grads(embed, loss, p, batches.reshape(1, 12, 5)))(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), grads, whole)


def run(shards: Path, folder: Path, objective: Contrastive = LOSS, model=MODEL, **settings) -> list[dict]:
    config = CONFIG.model_copy(update=settings)
    train(model, config, shards, folder, objective, lambda: params(model), {ITEMS: ItemTable(shards)})
    return read_metrics(folder / METRICS)


def assert_same(
    rows: list[dict], expected_rows: list[dict], names=("loss", "grad_norm", "accuracy", "temperature", "divergence")
) -> None:
    for name in names:
        actual, expected = ([row[name] for row in each] for each in (rows, expected_rows))
        np.testing.assert_allclose(actual, expected, rtol=3e-4, err_msg=name)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    """The folder of a run whose batches are computed at once."""
    folder = tmp_path_factory.mktemp("whole")
    run(shards, folder)
    return folder


def test_accumulation_adds_negatives(shards, whole, tmp_path):
    """Four micro-batches have the loss of one batch, not of four smaller ones (sentence-transformers 2916)."""
    assert_same(run(shards, tmp_path, gradient_accumulation_steps=4), read_metrics(whole / METRICS))


def test_a_run_goes_on_to_the_bit(shards, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    again = run(shards, tmp_path)
    speed = ("tokens_per_second", "seconds")
    assert [{k: v for k, v in row.items() if k not in speed} for row in again] == [
        {k: v for k, v in row.items() if k not in speed} for row in read_metrics(whole / METRICS)
    ]


def test_members_come_near_their_items(shards, tmp_path):
    rows = run(shards, tmp_path, steps=30, checkpoint_every_steps=30)
    assert np.mean([row["loss"] for row in rows[-5:]]) < 0.7 * rows[0]["loss"]
    assert rows[-1]["temperature"] != pytest.approx(0.2, rel=1e-3)  # it is learnt


@pytest.mark.long
def test_adapters_and_experts_train_too(shards, tmp_path):
    experts = MODEL.model_copy(update={"experts": ExpertsConfig(num_experts=4)})
    lora = LoraConfig(rank=2, targets=("query", "up"))
    rows = run(shards, tmp_path, model=experts, lora=lora, gradient_accumulation_steps=2, steps=4)
    assert rows[-1]["loss"] < rows[0]["loss"]


# --- records


def test_the_table_labels_every_text_of_a_batch(shards):
    batch = next(iter(load_batches(shards, 8, CONFIG.seq_len, seed=0)))
    labels = ItemTable(shards).look_up(batch)
    for row in range(8):
        texts = np.flatnonzero(labels.role[row] != MISSING)
        np.testing.assert_array_equal(texts, np.arange(len(texts)))
        expected, log_odds = [], []
        for record in dict.fromkeys(labels.record[row][texts].tolist()):
            assert record in batch.source[row]
            expected += [-1, *toy(record).items]
            log_odds += [np.nan, *(toy(record).log_odds or [])]
        assert labels.item[row][texts].tolist() == expected
        np.testing.assert_array_equal(labels.log_odds[row][texts], np.float32(log_odds))
        starts = np.flatnonzero(np.diff(batch.tokens[row] * 0 + batch.positions[row], prepend=1) < 0)
        tokens = batch.tokens[row][starts[: len(texts)]]
        items = labels.item[row][texts]
        np.testing.assert_array_equal(tokens[items >= 0], 3 + items[items >= 0])


def test_shares_are_those_of_the_records(shards):
    labels = ItemTable(shards).look_up(next(iter(load_batches(shards, 8, CONFIG.seq_len, seed=0))))
    items = np.concatenate([toy(number).items for number in range(60)])
    for item in range(10):
        shares = labels.log_share[labels.item == item]
        np.testing.assert_allclose(shares, np.log(np.mean(items == item)), rtol=1e-5)


def test_what_does_not_fit_is_left_out_hard_negatives_first():
    example = toy(0)
    (part,) = example.split(len(example) - 1)
    assert part.items == example.items[:2]
    assert part.num_positives == 2
    with pytest.raises(ValueError, match="do not fit in a row of 5 tokens; raise seq_len"):
        example.split(5)


def test_mistakes_are_named(shards, tmp_path):
    write_shards(tmp_path, [(Text([3, 4]), {})], CONFIG.seq_len)
    with pytest.raises(ValueError, match=r"\.npz: missing; are these records of contrastive training\?"):
        ItemTable(tmp_path)
    with pytest.raises(ConfigError, match="16 is not less than the model's d_model, 16"):
        Contrastive(dimensions=(4, 16)).check_model(16)
    no_positive = dataclasses.replace(toy(0), num_positives=0)
    assert no_positive.split(48)[0].num_positives == 0
    with pytest.raises(ValueError, match=r"give train\(\) an ItemTable as aux_models\['items'\]"):
        train(MODEL, CONFIG, shards, tmp_path, LOSS, lambda: params(MODEL))
