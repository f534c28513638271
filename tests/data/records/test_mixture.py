from __future__ import annotations

import itertools
import json
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.config import ConfigError
from brewjax.data.records.loader import describe_sources, load_batches
from brewjax.data.records.mixture import MixConfig
from brewjax.data.records.shards import write_shards
from brewjax.data.text.encode import Text
from tests.data.records.test_loader import GROUP, ROW, example, read, shards


def source(folder: Path, name: str, records: int, length: int) -> Path:
    """A folder of texts of `length` tokens, each named after the folder."""
    write_shards(folder / name, [(Text([7] * (length + 1)), {"of": name})] * records, ROW)
    return folder / name


@hypothesis.given(
    st.lists(st.tuples(st.floats(0.1, 1), st.integers(6, ROW), st.integers(1, 30)), min_size=2, max_size=3)
)
@hypothesis.settings(max_examples=6, deadline=None)
def test_the_tokens_of_each_folder_are_its_share_of_all(tmp_path_factory, sources):
    folder = tmp_path_factory.mktemp("mixed")
    shares = {
        source(folder, str(number), records, length): share for number, (share, length, records) in enumerate(sources)
    }
    first = np.cumsum([0, *(records for *_, records in sources)])
    read = np.zeros(len(sources))
    for batch in itertools.islice(load_batches(shares, GROUP, ROW, seed=0), 6):
        real = batch.source[batch.source >= 0]
        read += np.bincount(np.searchsorted(first, real, side="right") - 1, minlength=len(sources))
    expected = np.array(list(shares.values())) / sum(shares.values())
    # Grain rounds to a hundredth of the rarest; a few records wait to be packed.
    waiting = 2 * len(sources) * ROW / read.sum()
    np.testing.assert_allclose(read / read.sum(), expected, rtol=0.02, atol=waiting)


@pytest.mark.parametrize("processes", [1, 3])
def test_mixed_folders_are_each_read_once_an_epoch_by_one_process(tmp_path, processes):
    few = shards(tmp_path / "few", [example(2 + index % 9) for index in range(20)])
    many = shards(tmp_path / "many", [example(1 + index % 3, 2) for index in range(50)])
    shares = []
    for process in range(processes):
        batches = iter(load_batches({few: 0.5, many: 0.5}, GROUP, ROW, seed=0, process=process, processes=processes))
        _, counts = read(batches, 4, 70 // processes)
        for records in (range(20), range(20, 70)):
            reads = [counts[record] for record in records if record in counts]
            assert max(reads) - min(reads) <= 1
        shares.append(set(counts))
    assert set.union(*shares) == set(range(70))
    assert sum(map(len, shares)) == 70, "no record is read by two processes"


def test_the_position_in_a_mixture_restores_exactly(tmp_path):
    mixture = {source(tmp_path, "a", 11, 5): 0.7, source(tmp_path, "b", 7, 9): 0.2, source(tmp_path, "c", 3, 20): 0.1}
    batches = iter(load_batches(mixture, 3, ROW, seed=0))
    for _ in range(9):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = list(itertools.islice(batches, 9))
    fresh = iter(load_batches(mixture, 3, ROW, seed=0))
    fresh.set_state(state)
    for expected_batch, batch in zip(expected, itertools.islice(fresh, 9), strict=True):
        jax.tree.map(np.testing.assert_array_equal, expected_batch, batch)


def test_a_batch_of_a_mixture_can_be_described(tmp_path):
    mixture = {source(tmp_path, name, 4, ROW): 1.0 for name in ("a", "b")}
    described = set()
    for batch in itertools.islice(load_batches(mixture, 1, ROW, seed=0), 16):
        (line,) = describe_sources(mixture, batch)
        described.add((int(batch.source[0, 0]), json.loads(line)["of"]))
    assert described == {(index, "ab"[index // 4]) for index in range(8)}


@hypothesis.given(
    st.floats(0.5, 8), st.lists(st.integers(1, 20), min_size=2, max_size=4), st.floats(0.1, 3), st.floats(0.1, 3)
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_temperature_and_weights_set_the_shares(tmp_path_factory, temperature, records, weight, of_surface):
    folder = tmp_path_factory.mktemp("sources")
    folders = {f"t{number}": source(folder, f"t{number}", count, 3) for number, count in enumerate(records)}
    shares = MixConfig(temperature=temperature, weights={"t0": weight}).shares(folders, {"t0": of_surface})
    assert list(shares) == list(folders.values())
    assert sum(shares.values()) == pytest.approx(1)
    expected = (shares[folders["t1"]] * weight * of_surface) * (records[0] / records[1]) ** (1 / temperature)
    assert shares[folders["t0"]] == pytest.approx(expected)


def test_a_weight_of_0_leaves_a_source_out_and_an_unknown_name_is_refused(tmp_path):
    folders = {name: source(tmp_path, name, 2, 3) for name in ("liked", "stars")}
    assert MixConfig(weights={"stars": 0}).shares(folders) == {folders["liked"]: 1.0}
    with pytest.raises(ConfigError, match=r"sft.yaml:2: weights.likes: no source 'likes'; sources: liked, stars"):
        MixConfig.parse("weights:\n  likes: 2\n", "sft.yaml").shares(folders)
    with pytest.raises(ConfigError, match="every source has weight 0"):
        MixConfig(weights={"liked": 0, "stars": 0}).shares(folders)


def test_a_folder_that_is_not_complete_is_refused(tmp_path):
    whole, part = source(tmp_path, "whole", 2, 3), source(tmp_path, "part", 2, 3)
    (part / "counts.json").unlink()
    with pytest.raises(ValueError, match="part: no training shards there, or not all"):
        load_batches({whole: 0.5, part: 0.5}, 2, ROW, seed=0)
