"""Eight devices: the same vectors, and the same training as one device. Run as a script, this file does both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brewjax.model.sharding import MeshConfig
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.index import Index, IndexConfig
from brewjax.train.metrics_writer import METRICS, read_metrics
from tests.processes import ROOT
from tests.retrieve.test_encoder import random_texts
from tests.train import test_contrastive
from tests.train.test_contrastive import assert_same, shards

__all__ = ["shards"]  # a fixture
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.long
def test_eight_devices_do_as_one(make_encoder, shards, tmp_path):
    encoder, texts = make_encoder(), random_texts(60)
    encoder.save(tmp_path / "model")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "tests.retrieve.test_on_devices", shards, tmp_path]
    child = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment)
    rows = test_contrastive.run(shards, tmp_path / "one", steps=3)
    expected = encoder.embed(texts, 8)
    assert child.wait() == 0
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=2e-5)
    np.testing.assert_array_equal(np.load(tmp_path / "ids.npy"), search_index(tmp_path / "index"))
    # Two micro-batches on eight devices: a gradient is neither cut nor off by a factor (lightly 1528, 1977).
    assert_same(read_metrics(tmp_path / "eight" / METRICS), rows)


def search_index(folder: Path) -> np.ndarray:
    """Ids that an index finds after changes, int64 [queries, k]."""
    index, rows = Index.create(folder, IndexConfig(dimensions=8)), np.random.default_rng(0).standard_normal((600, 8))
    index.upsert(list(range(500)), rows[:500], np.arange(500, dtype=np.int32) % 4 << 1)
    index.delete(list(range(0, 500, 3)))
    index.upsert(list(range(100, 200)), rows[500:])
    hits = index.search(rows[:9], 20, required=[0, 2, 4] * 3)
    index.close()
    return np.array([ids for ids, _ in hits])


if __name__ == "__main__":
    records, folder = map(Path, sys.argv[1:])
    np.save(folder / "ids.npy", search_index(folder / "index-of-eight"))
    np.save(folder / "vectors.npy", Encoder.load(folder / "model", MESH).embed(random_texts(60), 8))
    test_contrastive.run(records, folder / "eight", steps=3, mesh=MESH, gradient_accumulation_steps=2)
