"""An index by the command line: built, searched, changed and exported."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from brewjax.cli_index import app


def brewjax_index(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_vectors(path, ids, vectors) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1])
    pq.write_table(pa.table({"id": ids, "vector": lists}), path)


@pytest.mark.parametrize("ids", [list(range(100)), [f"job-{n}" for n in range(100)]])
def test_an_index_goes_round(tmp_path, ids):
    vectors = np.random.default_rng(0).standard_normal((101, 4)).astype(np.float32)
    write_vectors(tmp_path / "items.parquet", ids, vectors[:100])
    assert "100 vectors of 4 dimensions" in brewjax_index("build", tmp_path / "i", tmp_path / "items.parquet").output
    write_vectors(tmp_path / "more.parquet", ids[:1], vectors[100:])
    assert "100 vectors" in brewjax_index("add", tmp_path / "i", tmp_path / "more.parquet").output
    write_vectors(tmp_path / "queries.parquet", ids[:2], vectors[:2])
    out = tmp_path / "hits.parquet"
    brewjax_index("search", tmp_path / "i", tmp_path / "queries.parquet", "--k", 5, "--out", out)
    current = np.concatenate([vectors[100:], vectors[1:100]])
    expected = [ids[n] for query in vectors[:2] for n in np.argsort(-current @ query)[:5]]
    assert pq.read_table(out)["id"].to_pylist() == expected
    brewjax_index("export", tmp_path / "i", tmp_path / "all.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), current)
    assert pq.read_table(tmp_path / "all.ids.parquet")["id"].to_pylist() == ids


def test_a_mistake_names_the_file_and_what_would_be_right(tmp_path):
    pq.write_table(pa.table({"ids": [1], "vector": [[1.0]]}), tmp_path / "t.parquet")
    refused = brewjax_index("build", tmp_path / "i", tmp_path / "t.parquet")
    assert "t.parquet: no column 'id'; did you mean 'ids'?" in str(refused.exception)
    (tmp_path / "csv.parquet").write_text("id,vector")
    assert "not a Parquet file" in str(brewjax_index("build", tmp_path / "i", tmp_path / "csv.parquet").exception)
