from __future__ import annotations

import collections
import itertools
import json
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.data.records.loader import TokenBatch, describe_sources, load_batches
from brewjax.data.records.shards import write_shards
from brewjax.data.text.encode import NO_TARGET, EncodedPrompt
from pallas_kernels.token_labels import PADDING

ROW = 24  # tokens
GROUP = 16  # rows that are packed together, at least: read so many at a time, the records come in their order

TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=5)
EXAMPLES = st.lists(
    st.builds(
        lambda preamble, events, questions, layout: EncodedPrompt(
            [preamble, *events], questions, [5, 6], [index % 2 for index in range(len(questions))], layout
        ),
        TOKENS,
        st.lists(TOKENS, max_size=2),
        st.lists(TOKENS, min_size=1, max_size=4),
        st.sampled_from(["dense", "star"]),
    ),
    min_size=1,
    max_size=20,
)


def example(preamble: int, questions: int = 1) -> EncodedPrompt:
    """`preamble` + 2 * `questions` tokens."""
    return EncodedPrompt([[7] * preamble], [[8, 9]] * questions, [5, 6], [0] * questions, "dense")


def shards(folder: Path, examples: list[EncodedPrompt], capacity: int = ROW) -> Path:
    write_shards(folder, ((record, {"example": index}) for index, record in enumerate(examples)), capacity)
    return folder


def pieces(batch: TokenBatch) -> list[tuple[int, dict[str, np.ndarray]]]:
    """The packed examples, row by row: the record each says it comes from, and its arrays."""
    packed = []
    arrays = batch._asdict() | batch.token_labels._asdict()
    for row in range(len(batch.tokens)):
        ids = batch.token_labels.example_id[row]
        real = ids[ids != PADDING]
        assert (np.diff(real) >= 0).all(), "examples are contiguous"
        assert (ids[len(real) :] == PADDING).all(), "padding is at the end"
        assert (batch.source[row, len(real) :] == -1).all()
        assert (batch.targets[row, len(real) :] == NO_TARGET).all()
        assert (batch.weights[row, len(real) :] == 0).all()
        for number in np.unique(real):
            (source,) = np.unique(batch.source[row, ids == number])
            names = ("tokens", "positions", "piece_id", "visibility", "targets", "weights", "preference")
            packed.append((int(source), {name: arrays[name][row, ids == number] for name in names}))
    return packed


def read(batches, passes: int, records: int) -> tuple[list[tuple[int, dict]], collections.Counter]:
    """Pieces of so many passes over the records, and how often each was read."""
    packed: list = []
    while len(packed) < passes * records:
        packed += pieces(next(batches))
    return packed, collections.Counter(source for source, _ in packed)


@hypothesis.given(EXAMPLES)
@hypothesis.settings(max_examples=12, deadline=None)
def test_packing_loses_nothing_and_mixes_nothing(tmp_path_factory, examples):
    folder = shards(tmp_path_factory.mktemp("shards"), examples)
    records = [part.arrays for whole in examples for part in whole.split(ROW)]
    packed, counts = read(iter(load_batches(folder, GROUP, ROW, seed=0)), 2, len(records))
    for source, arrays in packed:
        for name, array in arrays.items():
            assert array.tolist() == records[source][name].tolist(), name
    # A group of rows holds the next records of the stream. Were any read twice in one epoch, or left out of it,
    # the counts would be two apart.
    assert set(counts) == set(range(len(records)))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_records_out_and_read_each_once_an_epoch(tmp_path, processes):
    examples = [example(2 + index % 9, 1 + index % 3) for index in range(50)]
    folder = shards(tmp_path, examples)
    shares = []
    for process in range(processes):
        batches = iter(load_batches(folder, GROUP, ROW, seed=0, process=process, processes=processes))
        _, counts = read(batches, 2, len(examples) // processes)
        assert max(counts.values()) - min(counts.values()) <= 1
        shares.append(set(counts))
    assert set.union(*shares) == set(range(50))
    assert sum(map(len, shares)) == 50, "no record is read by two processes"
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_position_restores_exactly(tmp_path):
    """Also in the midst of a group of packed rows, from a state that went through JSON, in a stream that has run on."""
    folder = shards(tmp_path, [example(1 + index % 13) for index in range(40)])
    dataset = load_batches(folder, 3, ROW, seed=0)
    for start in (0, 8):
        batches = iter(dataset)
        for _ in range(start):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        expected = list(itertools.islice(batches, 6))
        fresh = iter(load_batches(folder, 3, ROW, seed=0))
        for iterator in (batches, fresh):
            iterator.set_state(state)
            for expected_batch, batch in zip(expected, itertools.islice(iterator, 6), strict=True):
                jax.tree.map(np.testing.assert_array_equal, expected_batch, batch)


def test_epochs_and_seeds_are_shuffled_differently(tmp_path):
    """Every record fills a row, so 32 records are two groups of rows: the first of each epoch holds other records."""
    folder = shards(tmp_path, [example(ROW - 2) for _ in range(2 * GROUP)])

    def halves(seed: int, count: int) -> list[set[int]]:
        batches = iter(load_batches(folder, GROUP, ROW, seed))
        return [set(next(batches).source.flatten().tolist()) for _ in range(count)]

    first, rest, second, its_rest, third, _ = halves(seed=0, count=6)
    assert first | rest == second | its_rest == set(range(2 * GROUP)), "each epoch holds them all"
    assert first != set(range(GROUP))
    assert len({frozenset(half) for half in (first, second, third)}) == 3
    assert halves(seed=0, count=1) == [first]
    assert halves(seed=1, count=1) != [first]


def test_several_examples_share_a_row(tmp_path):
    folder = shards(tmp_path, [example(2) for _ in range(200)])
    batch = next(iter(load_batches(folder, GROUP, ROW, seed=0)))
    assert (batch.token_labels.example_id != PADDING).all()
    assert (batch.token_labels.example_id.max(axis=1) == ROW // 4).all()
    assert {array.shape for array in jax.tree.leaves(batch)} == {(GROUP, ROW)}
    assert {array.dtype for array in jax.tree.leaves(batch._replace(weights=batch.source))} == {np.dtype(np.int32)}
    assert batch.weights.dtype == np.float32


def test_counts_and_notes_are_of_the_records_written(tmp_path):
    """A prompt of 30 tokens is split in two, which share its note; the other prompts are whole."""
    examples = [example(4), example(10, 10), example(3)]
    notes = ({"example": index, "member": f"Zoë\u2028{index}"} for index in range(3))
    counts = write_shards(tmp_path, zip(examples, notes, strict=True), ROW)
    assert counts == {"shards": 1, "records": 4, "targets": 12, "tokens": 6 + 24 + 16 + 5}
    for batch in itertools.islice(load_batches(tmp_path, 2, ROW, seed=0), 4):
        described = [json.loads(line)["example"] for line in describe_sources(tmp_path, batch)]
        assert described == [[0, 1, 1, 2][source] for source in sorted({source for source, _ in pieces(batch)})]


def test_a_batch_can_be_described_on_the_device(tmp_path):
    folder = shards(tmp_path, [example(ROW - 2)])
    batch = jax.tree.map(jax.numpy.asarray, next(iter(load_batches(folder, 1, ROW, seed=0))))
    assert describe_sources(folder, batch) == ['{"example": 0}']


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no training shards there, or not all of them; run the recipe again"):
        load_batches(tmp_path, 2, ROW, seed=0)


def test_fewer_records_than_processes_are_refused(tmp_path):
    folder = shards(tmp_path, [example(4)])
    with pytest.raises(ValueError, match="1 examples are too few for 2 processes"):
        load_batches(folder, 2, ROW, seed=0, process=1, processes=2)


def test_a_prompt_whose_history_alone_fills_the_row_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=f"^example 0: a prefix of {ROW} tokens and a question of 2 do not fit in a row of {ROW}"
    ):
        shards(tmp_path, [example(ROW)])
