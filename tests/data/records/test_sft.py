from __future__ import annotations

import dataclasses
import itertools
import re

import hypothesis
import numpy as np
from hypothesis import strategies as st

from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.prompts.verbalize import CHOICES, Verbalizer
from brewjax.data.records.sft import SftConfig, draw_choices, sft_records
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import build_examples, example_at
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import NO_TARGET, EncodedPrompt, encode
from brewjax.data.text.prompt import Prompt, Question
from brewjax.data.text.tokenizer import Tokenizer
from tests.data.conftest import Event, moment

BOUNDARY = 4  # days: validation begins
APPLIES = """
name: applies
instruction: Predict whether the member applies to the job in the "Question".
history: {actions: [viewed, applied], max_events: 1000}
questions:
  question: Will the member apply to the following job
  choice_question: To which of the following jobs will the member apply
  actions: [viewed, applied]
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - {word: "No", value: 0, match: {action: viewed}}
split: {validation: 2025-01-05, test: 2025-01-07}
"""
TASK = Task.parse(APPLIES)
NEGATIVES = '  sampled_negatives: {label: "No", per_event: 3}\nlabels:'
SAMPLED = Task.parse(APPLIES.replace("labels:", NEGATIVES).replace(", match: {action: viewed}", ""))
EVENTS = st.lists(
    st.builds(
        Event,
        st.integers(0, 2),
        st.integers(0, 9),
        st.sampled_from(["viewed", "applied"]),
        st.integers(0, 8),
        st.none() | st.integers(0, 500),
    ),
    min_size=1,
    max_size=40,
)
ASKED = st.lists(st.tuples(st.integers(0, 39), st.integers(0, 1)), min_size=1, max_size=12)  # item, label
MANY = [Event(n % 3, n * 7 % 40, ("viewed", "applied")[n % 5 < 2], n / 20, float(n)) for n in range(100)]
ALL_STYLES = PromptConfig(
    styles={name: 1.0 for name in ("sectioned", "chat", "turns", "compact", "key-value")}, max_tokens=100_000
)


def make_verbalizer(dataset: Dataset, tokenizer: Tokenizer, task: Task = TASK) -> Verbalizer:
    return Verbalizer(dataset, Scales.fit(dataset, task.boundaries(dataset)[0]), tokenizer, ALL_STYLES.max_tokens)


REPEATS = TASK.questions.model_copy(update={"repeats": True})
SCALES = Scales(until=0, quantiles={"items.salary": [], "items.popularity": []})


def learnt(record: EncodedPrompt, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Each run of targets as text, with the text of its own piece that comes before it."""
    arrays = record.arrays
    targets, pieces = arrays["targets"], arrays["piece_id"]
    at = np.flatnonzero(targets != NO_TARGET)
    assert (arrays["weights"] == np.where(targets == NO_TARGET, 0, np.float32(record.weight))).all()
    pairs = []
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
        indices = np.arange(len(targets))[(pieces == pieces[run[0]]) & (np.arange(len(targets)) <= run[0])]
        pairs.append((tokenizer.hf.decode(arrays["tokens"][indices]), tokenizer.hf.decode(targets[run])))
    return pairs


def test_the_label_of_every_question_is_learnt_and_nothing_else(jobs_with, tokenizer):
    dataset = jobs_with(MANY)
    prompts = ALL_STYLES.model_copy(update={"styles": {"sectioned": 1.0}})
    config = SftConfig(loss_weights={"applies": 0.25})
    answers = []
    for record, note in sft_records(make_verbalizer(dataset, tokenizer), TASK, prompts, config):
        assert (note["task"], note["style"], record.weight) == ("applies", "sectioned", 0.25)
        assert all(question.startswith("## Question\nWill the member") for question, _ in learnt(record, tokenizer))
        answers += [answer for _, answer in learnt(record, tokenizer)]
    early = [event for event in MANY if event.day < BOUNDARY]
    assert sorted(answers) == sorted("Yes" if event.action == "applied" else "No" for event in early)


def test_a_history_told_as_turns_is_learnt_with_the_questions(jobs_with, tokenizer):
    """Every event before the cutoff once as a turn, with the answer that is said in its place; then the questions."""
    verbalizer = make_verbalizer(jobs_with(MANY), tokenizer)
    prompts = ALL_STYLES.model_copy(update={"styles": {"turns": 1.0}})
    records = list(sft_records(verbalizer, TASK, prompts, SftConfig()))
    assert any(len(record.prefix_pieces) > 9 for record, _ in records)
    for record, _ in records:
        pairs = learnt(record, tokenizer)
        assert len(pairs) == len(record.prefix_pieces) - 1 + len(record.questions)
        for (text_before, answer), event in zip(pairs, record.prefix_pieces[1:], strict=False):
            whole = tokenizer.hf.decode(event)
            assert text_before.endswith("<|im_start|>assistant\n")
            assert whole.startswith(text_before + answer)
            assert ("has applied to" in whole) == (answer == "Yes")
            assert "has applied" not in text_before


def test_turns_are_learnt_once_and_only_where_events_have_several_answers(jobs_with, tokenizer):
    verbalizer = make_verbalizer(jobs_with(MANY), tokenizer, SAMPLED)
    prompts = ALL_STYLES.model_copy(update={"styles": {"turns": 1.0}})
    *_, (record, _) = sft_records(verbalizer, TASK, prompts, SftConfig())
    parts = record.split(record.prefix_length + max(map(len, record.questions)))
    assert len(parts) > 1
    assert sum(len(learnt(part, tokenizer)) for part in parts) == len(learnt(record, tokenizer))
    for record, _ in sft_records(verbalizer, SAMPLED, prompts, SftConfig()):
        assert len(learnt(record, tokenizer)) == len(record.questions)


def test_a_turn_does_not_hold_a_fact_that_its_own_event_is_part_of(jobs_with, tokenizer):
    """The mean of seconds of an item is known only from the single event of the history."""
    dataset = jobs_with([Event(0, 1, "applied", 1, 500.0)])
    example = dataclasses.replace(
        example_at(dataset, TASK.model_copy(update={"questions": REPEATS}), 0, moment(2)),
        candidates=np.array([1]),
        labels=np.array([0]),
        exposures=np.array([-1]),
    )
    verbalizer = Verbalizer(dataset, SCALES, tokenizer, ALL_STYLES.max_tokens)
    for style in ("chat", "turns"):
        prompt = verbalizer.prompt(TASK, example, style)
        assert "Attention" not in prompt.events[0]
        assert "Attention: 500" in prompt.questions[0].text, "which is asked later"


def test_choices_are_answered_by_the_name_of_the_one_that_was_applied_to(jobs_with, tokenizer):
    dataset = jobs_with(MANY)
    verbalizer = make_verbalizer(dataset, tokenizer)
    prompts = ALL_STYLES.model_copy(update={"styles": {"sectioned": 1.0}})
    plain = list(sft_records(verbalizer, TASK, prompts, SftConfig()))
    both = list(sft_records(verbalizer, TASK, prompts, SftConfig(choice_fraction=1.0, num_choices=3)))
    chosen = [record for record, _ in both if isinstance(record.answers[0], list)]
    assert 0 < len(chosen) == len(both) - len(plain)
    for record in chosen:
        for question, answer in learnt(record, tokenizer):
            listed = re.fullmatch(r"## Question\nTo which of .* apply: \[(.*)\]\n## Answer\n", question)
            names = listed[1].split(CHOICES)
            assert len(names) == len(set(names)) in (2, 3)
            assert answer.removesuffix("<|endoftext|>") in names
            assert answer.endswith("<|endoftext|>")


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 1)), min_size=1, max_size=12), st.integers(2, 5)
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_choice_has_one_right_answer(jobs_with, tokenizer, labelled_items, candidates):
    dataset = jobs_with(MANY)
    verbalizer = make_verbalizer(dataset, tokenizer)
    example = next(build_examples(dataset, TASK, "train"))
    items, labels = (np.array(column, np.int32) for column in zip(*labelled_items, strict=True))
    example = dataclasses.replace(example, candidates=items, labels=labels)
    choices = draw_choices(verbalizer, TASK, example, candidates, np.random.default_rng(0))
    for choice in choices:
        names = verbalizer.names(choice.items)
        assert 2 <= len(names) == len(set(names)) <= candidates
        right = choice.items[choice.correct]
        assert (right, 0) in labelled_items
        assert all((item, 1) in labelled_items for place, item in enumerate(choice.items) if place != choice.correct)
    name_of = dict(zip(items.tolist(), verbalizer.names(items), strict=True))
    worse = {name_of[item] for item, label in labelled_items if label == 1}
    assert len(choices) == sum(label == 0 and bool(worse - {name_of[item]}) for item, label in labelled_items)


def test_a_whole_answer_takes_the_place_of_a_label_word(tokenizer):
    prompt = Prompt("Jobs.\n", (), (Question("Which?\n", answer="Nurse (senior)"), Question("a?", 1)), ("Yes", "No"))
    record = encode(prompt, tokenizer, "dense")
    assert learnt(record, tokenizer) == [("Which?\n", "Nurse (senior)<|endoftext|>"), ("a?", "No")]
    name = tokenizer.encode(["Nurse (senior)"])[0]
    assert record.questions[0] == tokenizer.encode(["Which?\n"])[0] + name
    assert record.arrays["piece_id"].max() == 2, "the answer is part of its question's piece"
    assert prompt.render() == "Jobs.\nWhich?\nNurse (senior)\na?No\n"


def test_prompts_are_rendered_in_phrasings_of_the_task(jobs_with, tokenizer):
    phrasing = """
phrasings:
  - {instruction: Say whether an application follows., question: Does an application to this job follow}
"""
    phrased = Task.parse(APPLIES + phrasing)
    verbalizer = make_verbalizer(jobs_with(MANY), tokenizer, phrased)
    records = sft_records(verbalizer, phrased, PromptConfig(styles={"sectioned": 1.0}), SftConfig(repeats=20))
    texts = [tokenizer.hf.decode([*itertools.chain(*record.prefix_pieces, *record.questions)]) for record, _ in records]
    unchanged = [text for text in texts if "Will the member apply" in text]
    rephrased = [text for text in texts if "Does an application to this job follow" in text]
    assert len(unchanged) + len(rephrased) == len(texts)
    assert abs(len(unchanged) - len(rephrased)) < 0.4 * len(texts)
    for text in rephrased:
        assert "Say whether an application follows." in text
        assert phrased.instruction not in text
