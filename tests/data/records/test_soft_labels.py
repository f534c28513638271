"""Soft labels beside shards: each target gets its question's probabilities, through splitting and packing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from brewjax.data.records.loader import NO_TARGET, load_batches
from brewjax.data.records.shards import TABLE, shard_files, write_shards
from brewjax.data.records.soft_labels import SoftLabelTable
from brewjax.data.text.encode import EncodedPrompt
from brewjax.train.teachers import SoftLabels

YES, NO = 1, 2


def prompt(number: int, questions: int, soft: bool = True) -> EncodedPrompt:
    encoded = EncodedPrompt(
        [[3, 4], [5, 6]], [[7, 8 + q] for q in range(questions)], [YES, NO], [q % 2 for q in range(questions)], "dense"
    )
    probabilities = [np.array([p := (number + q / 10) / 10, 1 - p]) for q in range(questions)]
    return dataclasses.replace(encoded, soft_labels=probabilities) if soft else encoded


def test_every_target_of_a_batch_finds_its_own_probabilities(tmp_path):
    folders = {}
    for name, first in (("a", 1), ("b", 5)):
        write_shards(tmp_path / name, [(prompt(first + n, 5), {"example": n}) for n in range(3)], capacity=10)
        folders[tmp_path / name] = 0.5
    teacher, seen = SoftLabels(folders), set()
    for _, batch in zip(range(12), load_batches(folders, 2, 32, seed=0), strict=False):
        outputs = teacher.look_up(batch)
        for row, position in zip(*np.nonzero(batch.targets != NO_TARGET), strict=True):
            ids, probabilities = outputs.ids[row, position], np.exp(outputs.log_probs[row, position])
            assert sorted(ids) == [YES, NO]
            assert probabilities.sum() == pytest.approx(1, abs=1e-5)
            question = batch.tokens[row, position] - 8
            yes = float(probabilities[list(ids).index(YES)])
            seen.add((question, round(yes, 3)))
        assert (outputs.ids[batch.targets == NO_TARGET] == -1).all()
    expected = {(q, round((first + n + q / 10) / 10, 3)) for first in (1, 5) for n in range(3) for q in range(5)}
    assert seen == expected


def test_a_record_without_soft_labels_is_as_certain_as_its_answers(tmp_path):
    write_shards(tmp_path, [(prompt(1, 2), {}), (prompt(1, 2, soft=False), {})], capacity=10)
    table = SoftLabelTable.load(shard_files(tmp_path, TABLE))
    hard = slice(table.offsets[1], table.offsets[2])
    assert table.ids[hard].tolist() == [[YES, -1], [NO, -1]]
    assert np.exp(table.log_probs[hard]).tolist() == [[1, 0], [1, 0]]


def test_shards_without_any_say_so(tmp_path):
    write_shards(tmp_path, [(prompt(1, 2, soft=False), {})], capacity=10)
    with pytest.raises(ValueError, match="no soft labels; run the recipe again"):
        SoftLabels(tmp_path)
