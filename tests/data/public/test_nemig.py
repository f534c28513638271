"""The reader of NeMig on a made-up copy in its own format."""

import bz2

import numpy as np
import pytest

from brewjax.data.public.fetch import fetch
from brewjax.data.public.nemig import BEHAVIORS, CONTENT, METADATA
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import build_examples
from brewjax.data.tasks.task import load_tasks
from brewjax.download import DownloadError
from brewjax.paths import CONFIGS

NEWS = "http://nemig_en.org/resource/news_"


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    lines = [
        f"{number}\tU{number // 2}\tnews_1 news_2\tnews_3-{number % 2} news_4-{1 - number % 2}" for number in range(40)
    ]
    (folder / BEHAVIORS).write_text("\n".join(lines[::-1]) + "\n")
    titles = [f'<{NEWS}title_{n}> <https://schema.org/headline> "A \\"title\\" {n}" .' for n in range(1, 5)]
    dates = [f'<{NEWS}{n}> <https://schema.org/datePublished> "0{n}.02.2021" .' for n in range(1, 5)]
    (folder / CONTENT).write_bytes(bz2.compress("\n".join(titles).encode()))
    (folder / METADATA).write_bytes(bz2.compress("\n".join(dates).encode()))
    return folder


def test_each_impression_is_a_list_after_what_its_reader_read(copy, tmp_path):
    dataset = Dataset.load(fetch("nemig", tmp_path / "nemig", copy))
    assert dataset.items["title"].to_pylist()[0] == 'A "title" 1'
    assert str(dataset.items["published"][0]) == "2021-02-01"
    (task,) = load_tasks([CONFIGS / "tasks/nemig/clicked.yaml"], dataset)
    examples = [
        example for split in ("train", "validation", "test") for example in build_examples(dataset, task, split)
    ]
    assert len(examples) == 40
    for example in examples:
        assert sorted(example.labels.tolist()) == [0, 1]
        assert {"news_1", "news_2"} <= {dataset.item_id(row) for row in dataset.event_item[example.history]}
    assert len(np.unique([example.request for example in examples])) == 40


def test_a_copy_that_lacks_a_file_is_refused_by_its_name(copy, tmp_path):
    (copy / CONTENT).unlink()
    with pytest.raises(DownloadError, match=CONTENT):
        fetch("nemig", tmp_path / "nemig", copy)
    with pytest.raises(DownloadError, match="nemig is in no package; give a copy by --from"):
        fetch("nemig", tmp_path / "nemig")
