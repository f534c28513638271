"""Ids as tokens: their numbers are those of training, and what training has hardly seen is number 0."""

import dataclasses

import numpy as np
import pytest

from brewjax.data.prompts.styles import STYLES
from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tables.card import Attribute
from brewjax.data.tables.scales import MIN_ID_EVENTS, Scales
from tests.data.conftest import Event, moment
from tests.data.prompts.test_verbalize import PLENTY, TASK, ask

SPLIT = moment(50)
# Jobs 3 and 7 are seen often before the split; job 5 too seldom; job 9 only after it.
TIMES_SEEN = {3: MIN_ID_EVENTS + 2, 7: MIN_ID_EVENTS, 5: MIN_ID_EVENTS - 1}
EVENTS = [Event(n % 4, item, "viewed", 1 + n) for item, count in TIMES_SEEN.items() for n in range(count)]
EVENTS += [Event(n % 4, 9, "viewed", 51 + n / 100) for n in range(99)]


def with_ids(dataset, vocabulary=None):
    attribute = Attribute(column="item_id", kind="id", display_name="Job", vocabulary=vocabulary)
    items = dataset.card.items
    items = items.model_copy(update={"attributes": (attribute, *items.attributes)})
    return dataclasses.replace(dataset, card=dataset.card.model_copy(update={"items": items}))


def test_an_id_has_the_number_of_its_place_in_training(jobs_with):
    scale = Scales.fit(with_ids(jobs_with(EVENTS)), SPLIT)
    assert scale.vocabularies == {"items.item_id": ["103", "107"]}
    assert [scale.number("items.item_id", id_) for id_ in (103, "107", 105, 109, None)] == [1, 2, 0, 0, 0]


def test_a_vocabulary_holds_no_more_ids_than_it_may(jobs_with):
    assert Scales.fit(with_ids(jobs_with(EVENTS), 1), SPLIT).vocabularies == {"items.item_id": ["103"]}


def test_ids_and_numbers_are_stated_of_events_and_categories_besides_of_questions(jobs_with, tokenizer):
    dataset = with_ids(jobs_with(EVENTS))
    verbalizer = Verbalizer(dataset, Scales.fit(dataset, SPLIT), tokenizer, PLENTY)
    prompt = verbalizer.prompt(TASK, ask(dataset, 0, 5, (9, 7), (0, 1)), "ids")
    salaries = [verbalizer.facts("items", np.array([item]), SPLIT, STYLES["numbers"])[0][0] for item in (3, 7)]
    assert prompt.events[0] == f"|action#1|job#1|{salaries[0]}"
    assert prompt.events[1] == f"|action#1|job#2|{salaries[1]}"
    for question, row, number in zip(prompt.questions, (9, 7), (0, 2), strict=True):
        item = dataset.items.slice(row, 1).to_pylist()[0]
        salary = verbalizer.facts("items", np.array([row]), SPLIT, STYLES["numbers"])[0][0]
        expected = [f"job#{number}", item["company"], item["location"], ",".join(item["skills"]), salary]
        assert question.text.split("|")[1:6] == expected


@pytest.mark.parametrize("style", [name for name, style in STYLES.items() if not style.ids])
def test_other_styles_do_not_state_ids(jobs_with, tokenizer, style):
    plain = jobs_with(EVENTS)
    texts = [
        Verbalizer(dataset, Scales.fit(dataset, SPLIT), tokenizer, PLENTY).prompt(
            TASK, ask(dataset, 0, 20, (9, 7)), style
        )
        for dataset in (plain, with_ids(plain))
    ]
    assert texts[0] == texts[1]
