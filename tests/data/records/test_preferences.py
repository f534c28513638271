from __future__ import annotations

import dataclasses
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.records.preferences import AlignConfig, align_records, draw_contrast
from brewjax.data.tasks.examples import build_examples
from brewjax.data.text.encode import NO_TARGET, EncodedPrompt
from tests.data.records.test_sft import EVENTS, MANY, SAMPLED, TASK, make_verbalizer

PROMPTS = PromptConfig(styles={"sectioned": 1.0}, max_tokens=100_000)


def candidates(record: EncodedPrompt) -> dict[int, list[tuple[int, int]]]:
    """By list: of each candidate, its preference and the question's piece, read back from the arrays."""
    arrays = record.arrays
    targets, preference = arrays["targets"], arrays["preference"]
    at = np.flatnonzero(preference)
    assert at.tolist() == np.flatnonzero(targets != NO_TARGET).tolist() == record.ends.tolist()
    lists: dict[int, list[tuple[int, int]]] = {}
    for place in at:
        lists.setdefault(abs(int(preference[place])), []).append(
            (int(preference[place]), int(arrays["piece_id"][place]))
        )
    return lists


@pytest.mark.parametrize("task", [TASK, SAMPLED], ids=["shown", "sampled"])
@hypothesis.given(EVENTS, st.integers(2, 5), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0]))
@hypothesis.settings(max_examples=15, deadline=None)
def test_every_list_prefers_exactly_one(jobs_with, tokenizer, task, events, size, lists, notes):
    verbalizer = make_verbalizer(jobs_with(events), tokenizer)
    config = AlignConfig(list_size=size, lists_per_example=lists, steering_fraction=notes)
    for record, _ in align_records(verbalizer, task, PROMPTS, config):
        candidates_by_list = candidates(record)
        assert list(candidates_by_list) == list(range(1, len(candidates_by_list) + 1))
        assert len(candidates_by_list) <= lists
        for entries in candidates_by_list.values():
            assert 2 <= len(entries) <= size
            assert sum(preference > 0 for preference, _ in entries) == 1
            assert len({piece for _, piece in entries}) == len(entries), "a candidate is a piece"
        targets = record.arrays["targets"]
        assert set(targets[targets != NO_TARGET]) == {tokenizer.label_token_id("Yes")}


@pytest.mark.parametrize("task", [TASK, SAMPLED], ids=["shown", "sampled"])
def test_what_was_applied_to_is_preferred_to_what_was_not(jobs_with, tokenizer, task):
    dataset = jobs_with(MANY)
    verbalizer = make_verbalizer(dataset, tokenizer, task)
    examples = {(e.member, e.cutoff_time): e for e in build_examples(dataset, task, "train")}
    records = list(
        align_records(verbalizer, task, PROMPTS, AlignConfig(list_size=4, lists_per_example=3, steering_fraction=0))
    )
    assert records
    for record, note in records:
        example = examples[int(note["member"][1:]), note["cutoff_time"]]
        texts = [question.text for question in verbalizer.prompt(task, example, "sectioned").questions]
        for preference, question in zip(record.preference_lists, record.questions, strict=True):
            text = tokenizer.hf.decode(question).removeprefix("## Question")
            answers = {
                task.words[label] for rendered, label in zip(texts, example.labels, strict=True) if rendered == text
            }
            assert ("Yes" if preference > 0 else "No") in answers


def test_a_list_is_never_split(jobs_with, tokenizer):
    verbalizer = make_verbalizer(jobs_with(MANY), tokenizer)
    records = align_records(
        verbalizer, TASK, PROMPTS, AlignConfig(list_size=3, lists_per_example=3, steering_fraction=0)
    )
    record = max((record for record, _ in records), key=lambda record: len(record.preference_lists))
    assert len(candidates(record)) == 3
    longest = 3 * max(map(len, record.questions))
    parts = record.split(record.prefix_length + longest)
    assert len(parts) > 1
    assert [list(map(abs, part.preference_lists)) for part in parts] != [list(map(abs, record.preference_lists))]
    assert [number for part in parts for number in candidates(part)] == [1, 2, 3]
    assert [len(entries) for part in parts for entries in candidates(part).values()] == [3] * 3
    with pytest.raises(ValueError, match="a list of 3 questions of"):
        record.split(record.prefix_length + max(map(len, record.questions)))


NOTE = re.compile(r"\nNote: (?P<note>(?:focus on|prefer) jobs whose (?P<name>\w+) (?P<condition>.*))\n")


def satisfies(text: str, condition: str, name: str) -> bool | float:
    """Whether a candidate, as it is said, is what a note focuses on; or its number, as high as the note wants it."""
    match = re.search(rf"{name}: (.*?)(?:, [A-Z]\w+: |\]|$)", text)
    value = match[1] if match else ""
    if condition.startswith("include "):
        return condition.removeprefix("include ") in value.split(", ")
    if condition.startswith("is ") and condition.removeprefix("is ") not in ("high", "low", "recent", "long ago"):
        return value == condition.removeprefix("is ")
    number = float(re.search(r"[\d.]+", value)[0])
    return -number if condition == "is low" else number


def test_a_note_ranks_what_has_the_same_answer_and_its_opposite_ranks_it_the_other_way(jobs_with, tokenizer):
    """Read back from the text alone: the preferred one is what the note asks for, the rejected ones are not."""
    dataset = jobs_with(MANY)
    verbalizer = make_verbalizer(dataset, tokenizer)
    examples = {(e.member, e.cutoff_time): e for e in build_examples(dataset, TASK, "train")}
    records = list(
        align_records(verbalizer, TASK, PROMPTS, AlignConfig(list_size=4, lists_per_example=3, steering_fraction=1))
    )
    noted = [(record, note) for record, note in records if "steering_note" in note]
    assert len(noted) > 5
    assert len(noted) % 2 == 0
    names = set()
    for (record, note), (counter_record, counter_note) in zip(noted[::2], noted[1::2], strict=True):
        assert (note["member"], note["cutoff_time"]) == (counter_note["member"], counter_note["cutoff_time"])
        assert note["steering_note"] != counter_note["steering_note"]
        preferred, rejected = [], []
        for steered, provenance in ((record, note), (counter_record, counter_note)):
            match = NOTE.search(tokenizer.hf.decode(steered.prefix_pieces[0]))
            assert match["note"] == provenance["steering_note"]
            names.add(match["name"])
            texts = [tokenizer.hf.decode(question) for question in steered.questions]
            preferred.append({text for text, p in zip(texts, steered.preference_lists, strict=True) if p > 0})
            rejected.append({text for text, p in zip(texts, steered.preference_lists, strict=True) if p < 0})
            if match["name"] != "Posted":  # said as an age: months and weeks
                preferred_values = [satisfies(text, match["condition"], match["name"]) for text in preferred[-1]]
                rejected_values = [satisfies(text, match["condition"], match["name"]) for text in rejected[-1]]
                if isinstance(preferred_values[0], bool):
                    assert all(preferred_values)
                    assert not any(rejected_values)
                assert min(preferred_values) >= max(rejected_values)
        assert not preferred[0] & preferred[1]
        assert not preferred[0] & rejected[0]
        example = examples[int(note["member"][1:]), note["cutoff_time"]]
        question_texts = [question.text for question in verbalizer.prompt(TASK, example, "sectioned").questions]
        answers = [
            {
                int(label)
                for question, label in zip(question_texts, example.labels, strict=True)
                if "## Question" + question == text
            }
            for text in set.union(*preferred, *rejected)
        ]
        assert set.intersection(*answers), "all have the same answer"
    assert len(names) > 3


@hypothesis.given(st.integers(0, 2**32), st.lists(st.integers(0, 39), min_size=1, max_size=12, unique=True))
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_contrast_is_of_items_with_one_answer_and_puts_none_on_both_sides(jobs_with, tokenizer, seed, items):
    dataset = jobs_with(MANY)
    example = next(build_examples(dataset, TASK, "train"))
    labels = np.array([item % 2 for item in items], np.int32)
    example = dataclasses.replace(example, candidates=np.array(items, np.int32), labels=labels)
    verbalizer = make_verbalizer(dataset, tokenizer)
    contrast = draw_contrast(verbalizer, TASK, example, np.random.default_rng(seed))
    if contrast is None:
        assert max(np.bincount(labels)) < 2, "no two were posted on one day"
        return
    assert len(contrast.higher)
    assert len(contrast.lower)
    assert not set(contrast.higher) & set(contrast.lower)
    assert len(set(labels[[*contrast.higher, *contrast.lower]])) == 1
