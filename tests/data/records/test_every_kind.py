"""What holds of the records of every kind: no leak, the seed decides, overlong items stop nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from brewjax.config import ConfigError
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.contrastive import ContrastiveConfig, contrastive_records
from brewjax.data.records.preferences import AlignConfig, align_records
from brewjax.data.records.pretrain import PretrainConfig, domain_texts, pretrain_records
from brewjax.data.records.sft import SftConfig, sft_records
from brewjax.data.tables.partition import WHOLE, Partition
from brewjax.data.tables.scales import Scales
from brewjax.data.text.encode import EncodedPrompt, Text
from tests.data.conftest import Event, moment
from tests.data.records.test_sft import ALL_STYLES, BOUNDARY, EVENTS, MANY, SAMPLED, TASK, make_verbalizer
from tests.tables import put

Records = Callable[..., Iterator[tuple[EncodedPrompt | Text, dict]]]
RECORDS: dict[str, Records] = {
    "pretrain": lambda v, partition=WHOLE: pretrain_records(
        domain_texts(v, moment(BOUNDARY), PretrainConfig(repeats=2), partition), v.tokenizer
    ),
    "sft": lambda v, partition=WHOLE: sft_records(
        v, TASK, ALL_STYLES, SftConfig(repeats=2, choice_fraction=0.5, max_examples=9), partition=partition
    ),
    "sft, sampled": lambda v, partition=WHOLE: sft_records(
        v, SAMPLED, ALL_STYLES, SftConfig(choice_fraction=0.5), partition=partition
    ),
    "align": lambda v, partition=WHOLE: align_records(
        v, TASK, ALL_STYLES, AlignConfig(list_size=3, steering_fraction=0.5), partition
    ),
    "align, sampled": lambda v, partition=WHOLE: align_records(
        v, SAMPLED, ALL_STYLES, AlignConfig(list_size=3, steering_fraction=0.5), partition
    ),
    "contrastive": lambda v, partition=WHOLE: contrastive_records(
        v, TASK, ALL_STYLES, ContrastiveConfig(repeats=2), partition
    ),
}
each_kind = pytest.mark.parametrize("kind", RECORDS)


def contents(records: Iterator[tuple[EncodedPrompt | Text, dict]]) -> list:
    return [(note, {name: array.tolist() for name, array in record.arrays.items()}) for record, note in records]


@each_kind
@hypothesis.given(EVENTS)
@hypothesis.settings(max_examples=12, deadline=None)
def test_nothing_from_the_validation_boundary_on_changes_a_record(jobs_with, tokenizer, kind, events):
    """Neither an event, nor a statistic or percentile, nor which items and members there are events of."""
    early = [event for event in events if event.day < BOUNDARY]
    hypothesis.assume(early)
    whole, before = (contents(RECORDS[kind](make_verbalizer(jobs_with(e), tokenizer))) for e in (events, early))
    assert whole == before


@each_kind
def test_the_seed_decides_the_records(jobs_with, tokenizer, kind):
    verbalizer = make_verbalizer(jobs_with(MANY), tokenizer)
    once = contents(RECORDS[kind](verbalizer))
    assert once
    assert once == contents(RECORDS[kind](verbalizer))


@each_kind
@pytest.mark.parametrize("partitions", [2, 16])
def test_partitions_one_after_another_are_the_records_of_the_whole(jobs_with, tokenizer, kind, partitions):
    """Also where one value is so large that a sum over several members' events would lose the others."""
    events = [event._replace(seconds=1e17 if n == 3 else n / 7) for n, event in enumerate(MANY)]
    whole = contents(RECORDS[kind](make_verbalizer(jobs_with(events), tokenizer)))
    parts = []
    for index in range(partitions):
        verbalizer = make_verbalizer(jobs_with(events), tokenizer)  # as in a process of its own
        parts.append(contents(RECORDS[kind](verbalizer, Partition(index, partitions))))
    assert list(itertools.chain(*parts)) == whole
    assert sum(map(bool, parts)) > 1


def test_other_seeds_make_other_records(jobs_with, tokenizer):
    verbalizer = make_verbalizer(jobs_with(MANY), tokenizer)
    for records in (
        lambda seed: pretrain_records(
            domain_texts(verbalizer, moment(BOUNDARY), PretrainConfig(seed=seed)), verbalizer.tokenizer
        ),
        lambda seed: sft_records(verbalizer, TASK, ALL_STYLES, SftConfig(seed=seed)),
        lambda seed: align_records(verbalizer, TASK, ALL_STYLES, AlignConfig(seed=seed)),
    ):
        assert contents(records(0)) != contents(records(1))


@pytest.mark.parametrize("kind", ["sft", "align"])
@pytest.mark.parametrize("overlong", ["truncate", "skip", "error"])
def test_an_overlong_item_stops_no_training_unless_it_is_to(jobs_with, tokenizer, kind, overlong, capsys):
    events = [Event(0, item, ("viewed", "applied")[item % 2], 1 + item / 10) for item in range(8)]
    dataset = jobs_with([*events, Event(1, 0, "viewed", 6), Event(1, 2, "viewed", 9)])
    dataset = dataclasses.replace(dataset, items=put("title", 1, "many words " * 3_000)(dataset.items))
    questions = TASK.questions.model_copy(update={"overlong": overlong})
    task = TASK.model_copy(update={"questions": questions})
    scales = Scales.fit(dataset, task.boundaries(dataset)[0])
    verbalizer, prompts = Verbalizer(dataset, scales, tokenizer, 1_000), PromptConfig(max_tokens=1_000)
    records = {
        "sft": lambda: sft_records(verbalizer, task, prompts, SftConfig()),
        "align": lambda: align_records(
            verbalizer, task, prompts, AlignConfig(steering_fraction=0, list_size=8, lists_per_example=8)
        ),
    }[kind]
    if overlong == "error":
        with pytest.raises(ValueError, match=r"task 'applies': job 101 takes [\d,]+ tokens, most of them its 'title'"):
            list(records())
        return
    (record,) = (record for record, _ in records())
    assert record.context <= 1_000
    verbalizer.print_overlong()
    done = {"truncate": "truncated", "skip": "skipped"}[overlong]
    assert f"applies: 1 text too long was {done}, job 101 takes " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (SftConfig, "passes", "repeats"),
        (SftConfig, "choices", "choice_fraction"),
        (AlignConfig, "notes", "steering_fraction"),
        (PretrainConfig, "general", "general_text"),
    ],
)
def test_an_old_key_is_refused_with_the_new_one(config, old, new):
    with pytest.raises(ConfigError, match=rf"1: {old}: unknown key '{old}'; did you mean '{new}'\?"):
        config.parse(f"{old}: 1", "sft.yaml")
