"""Vectors for the fact `similarity`: by encoders that had not learnt what came next; those that the encoders give."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from brewjax.bundle.training import TrainedOn, Training
from brewjax.cli_retrieve import app
from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.excerpt import load_excerpt, with_items
from brewjax.data.tables.facts import Fact
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.statistics import FactValues
from brewjax.data.tasks.examples import build_examples
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.similarity import write_vectors
from tests.tiny import params

FACT = Fact(name="similarity", similarity="vectors.parquet")


@pytest.fixture(scope="module")
def encoders(make_encoder, jobs) -> dict[str, Encoder]:
    """Two, of other weights, trained until a third and two thirds of the events."""
    ends = np.quantile(jobs.event_time, [1 / 3, 2 / 3]).astype(np.int64).tolist()
    made = {}
    for number, end in enumerate(ends):
        encoder = make_encoder()
        bundle = encoder.bundle
        trained = TrainedOn(dataset=jobs.card.name, tables="", until=end, tasks=("apply",))
        weights = params(bundle.model, seed=number)
        bundle = dataclasses.replace(bundle, params=weights, training=Training(data=(trained,)))
        made[f"encoder{number}"] = dataclasses.replace(encoder, bundle=bundle)
    return made


@pytest.fixture(scope="module")
def dataset(encoders, jobs, tmp_path_factory) -> Dataset:
    """Jobs with the fact in the card, and the vectors."""
    folder = tmp_path_factory.mktemp("similar") / "jobs"
    shutil.copytree(jobs.path, folder)
    facts = jobs.card.facts.model_copy(update={"pairs": (*jobs.card.facts.pairs, FACT)})
    dataset = dataclasses.replace(jobs, path=folder, card=jobs.card.model_copy(update={"facts": facts}))
    dataset.card.save(folder / "dataset.yaml")
    assert write_vectors(dataset, encoders) > 0
    return dataset


def ends(encoders) -> dict[str, int]:
    return {version: encoder.bundle.training.data[0].until for version, encoder in encoders.items()}


def test_no_vector_is_older_than_what_its_encoder_learnt(dataset, encoders):
    first, second = ends(encoders).values()
    table = pq.read_table(dataset.path / "vectors.parquet")
    times = dict.fromkeys(encoders, np.zeros(0))
    for version in encoders:
        times[version] = table["time"].cast("int64").to_numpy()[np.array(table["encoder"].to_pylist()) == version]
    assert first <= times["encoder0"].min() <= times["encoder0"].max() < second <= times["encoder1"].min()
    assert times["encoder1"].max() == dataset.last_event_time + 1


def test_questions_are_stated_by_the_encoder_of_their_period(dataset, encoders, jobs):
    """And those before any encoder's end of training by none."""
    task, facts, seen = encoders["encoder0"].task, FactValues(dataset), dict.fromkeys([*encoders, ""], 0)
    for example in build_examples(jobs, task, "train"):
        known = [version for version, end in ends(encoders).items() if end <= example.cutoff_time]
        version = known[-1] if known else ""
        seen[version] += 1
        size = len(example.candidates)
        pairs = np.full(size, example.member), example.candidates, np.full(size, example.cutoff_time)
        actual = facts.values("pairs", FACT, *pairs)
        if not version:
            assert np.isnan(actual).all()
        elif seen[version] < 4:  # items are as of the beginning of a period, which is some time before
            member = encoders[version].embed_members(jobs, [example])[0]
            table = pq.read_table(dataset.path / "vectors.parquet").to_pylist()
            for item, value in zip(example.candidates.tolist(), actual, strict=True):
                rows = [row for row in table if row["side"] == "item" and row["id"] == jobs.item_id(item)]
                latest = [row for row in rows if row["time"].timestamp() * 1e6 <= example.cutoff_time][-1]
                assert latest["encoder"] == version
                assert value == pytest.approx(np.dot(latest["vector"], member), abs=1e-5)
    assert min(seen.values()) > 0


def test_an_excerpt_states_the_same(dataset):
    member, items = 3, np.arange(5)
    excerpt = with_items(load_excerpt(dataset.path, [dataset.member_id(member)]), items)
    now = np.full(5, dataset.last_event_time + 1)
    values = [FactValues(each).values("pairs", FACT, np.full(5, member), items, now) for each in (excerpt, dataset)]
    assert values[0].tobytes() == values[1].tobytes()
    assert np.isfinite(values[0]).all()


def test_a_union_states_the_same_of_each_dataset(dataset):
    folder = dataset.path.parent / "union"
    folder.mkdir()
    (folder / "dataset.yaml").write_text("{name: union, include: {jobs: ../jobs, again: ../jobs}}")
    union, now = Dataset.load(folder), np.full(40, dataset.last_event_time + 1)
    alone = FactValues(dataset).values("pairs", FACT, np.full(40, 3), np.arange(40), now)
    assert np.isfinite(alone).all()
    facts = {fact.name: fact for fact in union.card.facts.pairs}
    for name, items in (("jobs", np.arange(40)), ("again", np.arange(40, 80))):
        values = FactValues(union).values("pairs", facts[f"{name}.similarity"], np.full(40, 3), items, now)
        assert values.tobytes() == alone.tobytes()


def test_it_has_buckets_like_any_number(dataset):
    scale = Scales.fit(dataset, dataset.last_event_time).quantiles["pairs.similarity"]
    assert len(scale) == 9
    assert np.all(np.diff(scale) >= 0)


def test_encoders_that_cannot_state_it_are_refused(dataset, encoders, make_encoder, jobs):
    with pytest.raises(ConfigError, match="e: does not say until when it was trained on 'jobs'"):
        write_vectors(jobs, {"e": make_encoder()})
    without_facts = dataclasses.replace(jobs, card=jobs.card.model_copy(update={"facts": type(jobs.card.facts)()}))
    with pytest.raises(ConfigError, match="e: the encoder was trained on tables with other 'facts' in their card"):
        write_vectors(without_facts, {"e": encoders["encoder0"]})


def test_a_union_has_no_vectors_of_its_own(dataset, encoders, tmp_path):
    (tmp_path / "dataset.yaml").write_text(f"{{name: union, include: {{jobs: {dataset.path}}}}}")
    with pytest.raises(ConfigError, match=f"a union has no vectors of its own; give {dataset.path}"):
        write_vectors(Dataset.load(tmp_path), encoders)


def test_by_the_command_line(dataset, encoders, tmp_path):
    before = pq.read_table(dataset.path / "vectors.parquet")
    folders = [tmp_path / version for version in encoders]
    for folder, encoder in zip(folders, encoders.values(), strict=True):
        encoder.save(folder)
    result = CliRunner().invoke(app, ["vectors", str(dataset.path), *map(str, reversed(folders))])
    assert f"{len(before):,} vectors" in result.output
    assert pq.read_table(dataset.path / "vectors.parquet").select(["side", "id", "time"]) == before.select(
        ["side", "id", "time"]
    )
