"""Mined negatives: those of the definition, none that the member goes on to; made once, and read into records."""

from __future__ import annotations

import numpy as np
import pytest

from brewjax.config import ConfigError
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records import example_table
from brewjax.data.records.contrastive import ContrastiveConfig, MinedNegatives, contrastive_records
from brewjax.data.records.example_table import ExampleTable
from brewjax.data.records.provenance import training_examples
from brewjax.data.tables.partition import WHOLE
from brewjax.data.tables.scales import Scales
from brewjax.retrieve.mining import mine_negatives
from tests.data.conftest import moment
from tests.retrieve.conftest import PROMPTS

MINED = MinedNegatives(encoder="of the test", count=3, depth=12, margin=0.97)
CONFIG = ContrastiveConfig(repeats=2, max_examples=12, positives=4, hard_negatives=1, mined_negatives=MINED)


@pytest.fixture(scope="module")
def split_task(task):
    return task.model_copy(update={"split": type(task.split)(validation="60%", test="80%")})


@pytest.fixture(scope="module")
def encoder(make_encoder):
    return make_encoder()


@pytest.fixture(scope="module")
def folder(encoder, jobs, split_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mined")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_table, "PART", 8)
        mine_negatives(encoder, jobs, split_task, CONFIG, MINED, folder)
    return folder


@pytest.fixture(scope="module")
def examples(jobs, split_task):
    return list(training_examples(jobs, split_task, CONFIG, WHOLE, CONFIG.repeats))


def test_they_are_those_of_the_definition(encoder, jobs, split_task, folder, examples):
    table, until = ExampleTable(folder), split_task.boundaries(jobs)[0]
    items = encoder.embed_items(jobs, np.arange(len(jobs.items)), until)
    begins, ends = jobs.item_life
    counts = []
    for example, member in zip(examples, encoder.embed_members(jobs, examples), strict=True):
        similarity = items @ member
        known = jobs.event_item[(jobs.event_member == example.member) & (jobs.event_time < until)]
        nearest = [item for item in np.argsort(-similarity) if item not in known][:12]
        positives = example.candidates[example.labels == 0]
        mean = np.mean(similarity[positives]) if len(positives) else -1
        # What lies on the edge of the margin may fall on either side of it by rounding.
        inner, outer = (
            {
                int(item)
                for item in nearest
                if similarity[item] < 0.97 * mean + edge and begins[item] <= example.cutoff_time < ends[item]
            }
            for edge in (-1e-4, 1e-4)
        )
        mined = {*table.look_up(example).tolist()}
        assert inner <= mined <= outer
        assert not mined & {*known.tolist()}
        counts.append(len(mined))
    assert len({*counts}) > 2  # some examples have many, some few


def test_a_smaller_margin_leaves_more_out(encoder, jobs, split_task, folder, examples, tmp_path):
    mine_negatives(encoder, jobs, split_task, CONFIG, MINED.model_copy(update={"margin": 0.9}), tmp_path)
    strict, loose = ExampleTable(tmp_path), ExampleTable(folder)
    pairs = [({*strict.look_up(each).tolist()}, {*loose.look_up(each).tolist()}) for each in examples]
    assert all(few <= many for few, many in pairs)
    assert sum(len(few) for few, _ in pairs) < sum(len(many) for _, many in pairs)


def test_mining_goes_on_where_it_was_interrupted_to_the_bit(encoder, jobs, split_task, folder, monkeypatch):
    monkeypatch.setattr(example_table, "PART", 8)
    parts = sorted(folder.iterdir())
    assert len(parts) > 2
    before, times = [path.read_bytes() for path in parts], [path.stat().st_mtime_ns for path in parts]
    parts[1].unlink()
    mine_negatives(encoder, jobs, split_task, CONFIG, MINED, folder)
    assert [path.read_bytes() for path in parts] == before
    assert [n for n, path in enumerate(parts) if path.stat().st_mtime_ns != times[n]] == [1]


def test_records_have_them_behind_what_was_shown(jobs, tokenizer, split_task, folder):
    verbalizer = Verbalizer(jobs, Scales.fit(jobs, moment(200)), tokenizer, PROMPTS.max_tokens)
    look_up = ExampleTable(folder).look_up
    arguments = (verbalizer, split_task, PROMPTS, CONFIG, WHOLE)
    without = [record for record, _ in contrastive_records(*arguments)]
    all_mined = set()
    for record, before in zip((r for r, _ in contrastive_records(*arguments, look_up)), without, strict=True):
        assert record.items[: len(before.items)] == before.items
        assert record.num_positives == before.num_positives
        mined = record.items[len(before.items) :]
        assert len(mined) <= 3
        assert len({*record.items}) == len(record.items)
        assert len(record.texts) == len(record.items) + 1
        all_mined |= {*mined}
    assert len(all_mined) > 1
    assert [r.items for r, _ in contrastive_records(*arguments, look_up)] == [
        r.items for r, _ in contrastive_records(*arguments, look_up)
    ]


def test_an_encoder_of_something_else_is_refused(make_encoder, encoder, jobs, split_task, tmp_path):
    view_task = split_task.model_copy(update={"name": "view"})
    with pytest.raises(ConfigError, match="the encoder is of task 'apply', not 'view'"):
        mine_negatives(encoder, jobs, view_task, CONFIG, MINED, tmp_path)
    with pytest.raises(ConfigError, match="no tables of examples there"):
        ExampleTable(tmp_path)
