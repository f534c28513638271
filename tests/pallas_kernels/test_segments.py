import jax
import numpy as np
from hypothesis import given, settings

from pallas_kernels.segments import ALL, PADDING, QUESTIONS, SELF, Segments, may_see, visible
from tests.pallas_kernels.layouts import Example, batches, pack, rows

LENGTH = 96
index = np.arange(LENGTH)
see = jax.jit(lambda segments: visible(segments, segments, index, index))
visit = jax.jit(may_see, static_argnums=1)


def sees(row: Segments, i: int, j: int) -> bool:
    """DESIGN.md: Token i sees token j when same example, j is not after i, and (same segment, or reach[j] = ALL, or
    reach[j] = QUESTIONS and i stands in a question)."""
    i_stands_in_a_question = row.reach[i] == SELF
    return (
        row.example[i] == row.example[j] != PADDING
        and j <= i
        and (
            row.segment[i] == row.segment[j]
            or row.reach[j] == ALL
            or (row.reach[j] == QUESTIONS and i_stands_in_a_question)
        )
    )


def brute_force(row: Segments) -> np.ndarray:
    tokens = range(len(row.example))
    return np.array([[sees(row, i, j) for j in tokens] for i in tokens])


def pairs_to_visit(row: Segments, block: int) -> np.ndarray:
    """bool [N, N]: which pairs of blocks hold a visible pair of tokens."""
    count = len(row.example) // block
    return brute_force(row).reshape(count, block, count, block).any((1, 3))


@settings(deadline=None, max_examples=30)
@given(batches(2, LENGTH))
def test_visible_is_the_sentence_of_the_design(batch):
    expected = [brute_force(Segments(*(labels[b] for labels in batch))) for b in range(2)]
    np.testing.assert_array_equal(see(batch), expected)


def test_visible_between_parts_of_a_row():
    row = pack([Example(20, [8, 8], [4] * 6, star=True), Example(10, [3], [5, 5])], LENGTH)
    queries, keys = slice(30, 70), slice(10, 50)
    part = visible(*(Segments(*(labels[at] for labels in row)) for at in (queries, keys)), index[queries], index[keys])
    np.testing.assert_array_equal(part, brute_force(row)[queries, keys])


@settings(deadline=None, max_examples=40)
@given(rows(LENGTH))
def test_every_visible_pair_is_visited(row):
    for block in (8, 32):
        missed = pairs_to_visit(row, block) & ~np.asarray(visit(row, block))
        assert not missed.any()


def test_exactly_the_visible_pairs_are_visited_where_pieces_are_blocks():
    for star in (False, True):
        row = pack([Example(16, [16, 16], [16, 16, 16], star)], LENGTH)
        np.testing.assert_array_equal(visit(row, 16), pairs_to_visit(row, 16))


def test_items_do_not_visit_each_other():
    row = pack([Example(64, [], [5] * 192)], 1024)
    visited, causal = np.asarray(visit(row, 16)), np.tri(64, dtype=bool)
    np.testing.assert_array_equal(visited, pairs_to_visit(row, 16))
    assert visited.sum() < 0.2 * causal.sum()


def test_star_history_is_visited_by_its_questions_only():
    row = pack([Example(32, [16] * 60, [16, 16], star=True)], 1024)
    visited = np.asarray(visit(row, 16))
    np.testing.assert_array_equal(visited, pairs_to_visit(row, 16))
    assert visited[2:62].sum() == 60 * (2 + 1)  # an event: the center and itself
    assert visited[62:].sum() == 2 * (2 + 60 + 1)


def test_padding_is_never_visited():
    row = pack([Example(20)], LENGTH)
    assert np.asarray(visit(row, 16)).sum() == 3  # 0-0, 1-0, 1-1
    assert not np.asarray(visit(pack([], LENGTH), 16)).any()
