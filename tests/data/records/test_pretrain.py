from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.records.pretrain import PretrainConfig, domain_texts, general_texts, pretrain_records
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.text.encode import Text, encode_text
from brewjax.data.text.tokenizer import Tokenizer
from pallas_kernels.token_labels import ALL
from tests.data.conftest import Event, moment

SCALES = Scales(
    until=0,
    quantiles={
        "items.salary": [30_400.0 + 400 * n for n in range(99)],
        "items.popularity": [1.0 + n for n in range(99)],
    },
)
STORY = [
    Event(4, 21, "viewed", 10, 13.5),
    Event(4, 10, "applied", 35, 2.0),
    Event(4, 1, "applied", 36, None),
    Event(4, 33, "viewed", 59.75, 100.0),
    Event(4, 31, "applied", 60, 20.0),
    Event(2, 10, "applied", 7, 60.0),
    Event(3, 20, "viewed", 61, None),
]


def texts(dataset: Dataset, tokenizer: Tokenizer, day: float = 60, **config) -> dict[str, str]:
    """What is told as of a day, by what it is about."""
    verbalizer = Verbalizer(dataset, SCALES, tokenizer, 1000)
    records = domain_texts(verbalizer, moment(day), PretrainConfig(**config))
    return {"/".join(map(str, note.values())): text for text, note in records}


def test_items_and_histories_read_as_they_should(jobs_with, tokenizer):
    text_by_subject = texts(jobs_with(STORY), tokenizer)
    assert set(text_by_subject) == {"101/0", "110/0", "121/0", "133/0", "m2/0", "m4/0"}, (
        "who and what was there by then"
    )
    subject, *facts = text_by_subject["110/0"].removesuffix(".\n").split(". ")
    assert subject == "Job"
    assert sorted(facts) == [
        "Attention: 31",
        "Company: Initech",
        "Location: Lisbon",
        "Popularity: percentile 2",
        "Posted: 2 months ago",
        "Salary: percentile 75",
        "Skills: Python, Writing",
        "Title: Accountant",
    ]
    profile, *months = text_by_subject["m4/0"].splitlines()
    assert sorted(profile.removesuffix(".").split(". ")) == [
        "Company: Acme",
        "Experience: 8 years",
        "Location: Lisbon",
        "Member",
        "Position: Software Engineer",
    ]
    assert months == [
        "January 2025: the member has viewed the following jobs: Nurse (senior) (Seconds: 13.5 seconds).",
        "February 2025: the member has applied to the following jobs: Accountant (Seconds: 2 seconds), Nurse.",
        "March 2025: the member has viewed the following jobs: Nurse (senior) (Seconds: 100 seconds).",
    ]


def test_every_pass_has_its_own_order_of_facts(jobs_with, tokenizer):
    text_by_subject = texts(jobs_with(STORY), tokenizer, repeats=3)
    renderings = [text_by_subject[f"110/{number}"] for number in range(3)]
    assert len(set(renderings)) == 3
    assert len({tuple(sorted(text.rstrip(".\n").split(". "))) for text in renderings}) == 1


@pytest.mark.parametrize("capacity", [1, 7, 8, 100])
def test_a_text_is_learnt_whole_whatever_it_is_split_into(tokenizer, capacity):
    text = "The member has applied to the following jobs: Nurse, Zoë's 日本."
    whole = encode_text(text, tokenizer)
    parts = whole.split(capacity)
    assert all(0 < len(part) <= capacity for part in parts)
    targets = np.concatenate([part.arrays["targets"] for part in parts])
    assert tokenizer.hf.decode(targets) == text + "<|endoftext|>"
    tokens = np.concatenate([part.arrays["tokens"] for part in parts])
    assert tokens.tolist() == [*tokenizer.bos, *targets[:-1]], "each is learnt from the one before it"
    for part in parts:
        arrays = part.arrays
        assert arrays["positions"].tolist() == list(range(len(part)))
        assert set(arrays["piece_id"]) == {0}
        assert set(arrays["visibility"]) == {ALL}
        assert set(arrays["weights"]) == {1.0}
        assert set(arrays["preference"]) == {0}


def test_a_small_text_by_hand():
    arrays = Text([7, 8, 9]).arrays
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "tokens": [7, 8],
        "positions": [0, 1],
        "piece_id": [0, 0],
        "visibility": [ALL, ALL],
        "targets": [8, 9],
        "weights": [1, 1],
        "preference": [0, 0],
    }
    assert all(array.dtype == (np.float32 if name == "weights" else np.int32) for name, array in arrays.items())


def general(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_general_text_comes_from_files_of_both_kinds(tmp_path, tokenizer):
    lines = [json.dumps({"text": "One\u2028line", "id": 1}), json.dumps({"text": " "}), json.dumps({"text": "Zoë"})]
    folder = general(tmp_path, b__moby_txt="Call me\nIshmael.", a_jsonl="\n".join(lines) + "\n", notes_md="no")
    documents = list(general_texts(folder))
    assert [text for text, _ in documents] == ["One\u2028line", " ", "Zoë", "Call me\nIshmael."]
    assert documents[2][1] == {"file": str(folder / "a.jsonl"), "line": 3}
    records = list(pretrain_records(documents, tokenizer))
    assert [tokenizer.hf.decode(record.tokens) for record, _ in records] == [
        f"<|endoftext|>{text}<|endoftext|>" for text in ("One\u2028line", "Zoë", "Call me\nIshmael.")
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{text}", "not valid JSON"),
        ('{"txt": "a"}', r'expected an object such as {"text": ".."}'),
        ('["a"]', r"expected an object"),
        ('{"text": 3}', r"expected an object"),
    ],
)
def test_a_line_without_a_text_is_refused_by_its_place(tmp_path, line, error):
    folder = general(tmp_path, a_jsonl='{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {error}"):
        list(general_texts(folder))


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.txt or \.jsonl files there"):
        list(general_texts(tmp_path))
