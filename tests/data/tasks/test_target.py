"""Which facts are of what a task asks for."""

import pytest

from brewjax.data.tables.facts import Fact
from brewjax.data.tasks.target import target_sign
from brewjax.data.tasks.task import Task

STARS = Fact(name="average", mean="stars")


def make_task(best: dict | None, worst: dict | None) -> Task:
    """A task with three labels; the first is the worst, the last the best."""
    labels = [
        {"word": "No", "value": 0, "match": worst},
        {"word": "Perhaps", "value": 1, "match": {"stars": 3}},
        {"word": "Yes", "value": 2, "match": best},
    ]
    return Task.model_validate(
        {
            "name": "task",
            "instruction": "Predict.",
            "history": {"actions": ["rated"]},
            "questions": {"question": "Will it be", "actions": ["rated"], "outcomes": ["applied"]},
            "labels": labels,
        }
    )


@pytest.mark.parametrize(
    ("best", "worst", "sign"),
    [
        ({"stars": [4, 5]}, {"stars": [1, 2]}, 1),
        ({"stars": [1, 2]}, {"stars": [4, 5]}, -1),
        ({"stars": 5}, {"stars": {"max": 4}}, 1),
        ({"stars": {"below": 3}}, {"stars": {"min": 3}}, -1),
        ({"stars": {"min": 2, "max": 3}}, {"stars": {"min": 0, "max": 1}}, 1),
        ({"stars": {"min": 4}}, None, 1),
        ({"stars": {"max": 2}}, None, -1),
        ({"stars": 4}, None, 0),  # of other numbers nothing is known
        ({"stars": {"min": 4}}, {"stars": {"above": 5}}, 0),
        ({"action": "applied"}, {"stars": 1}, 0),  # another column
    ],
)
def test_a_mean_of_the_column_that_labels_match_says_in_which_direction(best, worst, sign):
    assert target_sign(make_task(best, worst), STARS) == sign


@pytest.mark.parametrize(
    ("fact", "sign"),
    [
        ({"count": ["applied"]}, 1),
        ({"rate": ["viewed", "applied"]}, 1),
        ({"share": ["viewed"], "by": "skills"}, 0),
        ({"age": "posted"}, 0),
        ({"neighbors": "stars"}, 0),
    ],
)
def test_a_fact_that_counts_the_action_asked_for_is_of_the_target(fact, sign):
    task = make_task({"action": ["applied", "saved"]}, {"action": "viewed"})
    assert target_sign(task, Fact(name="fact", **fact)) == sign
