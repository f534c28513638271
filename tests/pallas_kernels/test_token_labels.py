import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pallas_kernels.token_labels import ALL, PADDING, QUESTIONS, SELF, TokenLabels, dense_mask
from pallas_kernels.worklist import BlockVisibility, block_table, block_visibility, worklist
from tests.pallas_kernels.layouts import Example, batches, pack, rows

LENGTH = 96
index = np.arange(LENGTH)
see = jax.jit(lambda token_labels: dense_mask(token_labels, token_labels, index, index))


@functools.partial(jax.jit, static_argnums=1)
def seen(row: TokenLabels, tile: int):
    """`block_visibility` of one row over itself."""
    batch = TokenLabels(*(labels[None] for labels in row))
    return jax.tree.map(lambda x: x[0], block_visibility(batch, batch, 0, tile, tile))


def sees(row: TokenLabels, i: int, j: int) -> bool:
    """Token i attends to token j if they are of the same example, j is not after i, and (they are of the same piece, or
    visibility[j] = ALL, or visibility[j] = QUESTIONS and i is in a question)."""
    i_stands_in_a_question = row.visibility[i] == SELF
    return (
        row.example_id[i] == row.example_id[j] != PADDING
        and j <= i
        and (
            row.piece_id[i] == row.piece_id[j]
            or row.visibility[j] == ALL
            or (row.visibility[j] == QUESTIONS and i_stands_in_a_question)
        )
    )


def brute_force(row: TokenLabels) -> np.ndarray:
    tokens = range(len(row.example_id))
    return np.array([[sees(row, i, j) for j in tokens] for i in tokens])


def tiled(pairs: np.ndarray, q_tile: int, kv_tile: int) -> np.ndarray:
    """bool [NQ, NK, q_tile * kv_tile] of bool [T, S]: the visible pairs of each pair of tiles."""
    T, S = pairs.shape
    pairs = pairs.reshape(T // q_tile, q_tile, S // kv_tile, kv_tile)
    return pairs.transpose(0, 2, 1, 3).reshape(T // q_tile, S // kv_tile, -1)


def assert_sight(actual: BlockVisibility, pairs: np.ndarray, queries: TokenLabels, q_tile: int, kv_tile: int) -> None:
    """`found` misses no visible pair, and does not promise one that is not; nobody asks what padding sees."""
    some, every = map(np.asarray, actual)
    assert not (tiled(pairs, q_tile, kv_tile).any(-1) & ~some).any()
    unasked = (queries.example_id == PADDING)[:, None]
    assert not (every & ~tiled(pairs | unasked, q_tile, kv_tile).all(-1)).any()


@settings(deadline=None, max_examples=30)
@given(batches(2, LENGTH))
def test_visible_is_the_sentence_of_the_design(batch):
    expected = [brute_force(TokenLabels(*(labels[b] for labels in batch))) for b in range(2)]
    np.testing.assert_array_equal(see(batch), expected)


def test_visible_between_parts_of_a_row():
    row = pack([Example(20, [8, 8], [4] * 6, star=True), Example(10, [3], [5, 5])], LENGTH)
    queries, keys = slice(30, 70), slice(10, 50)
    part = dense_mask(
        *(TokenLabels(*(labels[at] for labels in row)) for at in (queries, keys)), index[queries], index[keys]
    )
    np.testing.assert_array_equal(part, brute_force(row)[queries, keys])


@settings(deadline=None, max_examples=40)
@given(rows(LENGTH))
def test_sight_of_tiles_misses_nobody_and_promises_nobody_too_much(row):
    for tile in (8, 32):
        assert_sight(seen(row, tile), brute_force(row), row, tile, tile)


def test_sight_is_exact_where_pieces_are_tiles():
    for star in (False, True):
        row = pack([Example(16, [16, 16], [16, 16, 16], star)], LENGTH)
        some, every = seen(row, 16)
        np.testing.assert_array_equal(some, tiled(brute_force(row), 16, 16).any(-1))
        np.testing.assert_array_equal(every, tiled(brute_force(row), 16, 16).all(-1))


def test_items_do_not_meet_each_other():
    row = pack([Example(64, [], [5] * 192)], 1024)
    some, causal = np.asarray(seen(row, 16).any), np.tri(64, dtype=bool)
    np.testing.assert_array_equal(some, tiled(brute_force(row), 16, 16).any(-1))
    assert some.sum() < 0.2 * causal.sum()


def test_star_history_is_met_by_its_questions_only():
    row = pack([Example(32, [16] * 60, [16, 16], star=True)], 1024)
    some = np.asarray(seen(row, 16).any)
    np.testing.assert_array_equal(some, tiled(brute_force(row), 16, 16).any(-1))
    assert some[2:62].sum() == 60 * (2 + 1)  # an event: the preamble and itself
    assert some[62:].sum() == 2 * (2 + 60 + 1)


def test_padding_is_never_met():
    assert np.asarray(seen(pack([Example(20)], LENGTH), 16).any).sum() == 3  # 0-0, 1-0, 1-1
    assert not np.asarray(seen(pack([], LENGTH), 16).any).any()


@settings(deadline=None, max_examples=30)
@given(rows(LENGTH))
def test_queries_in_the_middle_of_a_row_see_what_they_see_there(row):
    start = 30
    queries, keys = (TokenLabels(*(x[None, at] for x in row)) for at in (slice(start, start + 32), slice(None)))
    actual = BlockVisibility(*(x[0] for x in block_visibility(queries, keys, start, 16, 8)))
    assert_sight(actual, brute_force(row)[start : start + 32], TokenLabels(*(x[0] for x in queries)), 16, 8)


@settings(deadline=None, max_examples=10)
@given(rows(LENGTH), st.sampled_from([2, 3, 6]))
def test_sight_of_queries_that_stand_several_times_in_a_row(row, repeats):
    start, tile = 30, 16  # which `repeats` need not divide
    queries = TokenLabels(*(labels[None, start : start + 32].repeat(repeats, 1) for labels in row))
    actual = BlockVisibility(
        *(x[0] for x in block_visibility(queries, TokenLabels(*(x[None] for x in row)), start, tile, 8, repeats))
    )
    pairs = brute_force(row)[start : start + 32].repeat(repeats, 0)
    assert_sight(actual, pairs, TokenLabels(*(x[0] for x in queries)), tile, 8)


@settings(deadline=None, max_examples=10)
@given(arrays(np.int32, (2, 3, 5), elements=st.integers(0, 2)))
def test_meetings_are_the_blocks_seen_whole_and_then_those_seen_in_part(kind):
    for by_key in (False, True):
        table = jax.tree.map(np.asarray, block_table(BlockVisibility(kind > 0, kind == 2), by_key))
        lines = kind.transpose(0, 2, 1) if by_key else kind
        for at in np.ndindex(lines.shape[:2]):
            assert set(table.indices[at][: table.num_full[at]]) == set(np.flatnonzero(lines[at] == 2))
            assert set(table.indices[at][table.num_full[at] : table.num_active[at]]) == set(
                np.flatnonzero(lines[at] == 1)
            )
            assert table.num_active[at] == np.count_nonzero(lines[at])


@settings(deadline=None, max_examples=30)
@given(arrays(np.int32, (2, 3, 5), elements=st.integers(0, 2)))
def test_a_worklist_holds_every_pair_once_and_keeps_a_block_together(kind):
    for by_key, limit in ((False, kind.size), (True, max(1, np.count_nonzero(kind)))):
        visits = jax.tree.map(np.asarray, worklist(kind, limit, by_key))
        q_block, kv_block, kinds = (x[: visits.length] for x in visits[:3])
        actual = np.zeros_like(kind)
        for q, kv, value in zip(q_block, kv_block, kinds, strict=True):
            row, kv_row = q // 3, kv // 5
            assert row == kv_row
            assert actual[row, q % 3, kv % 5] == 0
            actual[row, q % 3, kv % 5] = value
        np.testing.assert_array_equal(actual, kind)
        assert (np.diff(kv_block if by_key else q_block) >= 0).all()
