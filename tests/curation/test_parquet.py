"""Embeddings out of Parquet columns."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from curation.parquet import is_parquet, parquet_to_npy

ROWS = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def column_of(rows, kind):
    flat = pa.array(rows.reshape(-1))
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    return pa.array(rows.tolist(), pa.list_(pa.float32()))


@pytest.mark.parametrize("kind", ["fixed", "list"])
def test_files_in_order_become_one_array(tmp_path, kind):
    for name, part in (("b", ROWS[20:]), ("a", ROWS[:20])):
        table = pa.table({"id": list(range(len(part))), "embedding": column_of(part, kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    assert is_parquet(str(tmp_path))
    found = parquet_to_npy(str(tmp_path), tmp_path / "cache")
    np.testing.assert_array_equal(np.load(found, mmap_mode="r"), ROWS)
    written = found.stat().st_mtime_ns
    assert parquet_to_npy(str(tmp_path / "*.parquet"), tmp_path / "cache") == found
    assert found.stat().st_mtime_ns == written
    assert os.listdir(tmp_path / "cache") == [found.name]


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array([[1.0, 2.0], [3.0]]), "rows hold 1 to 2 numbers"),
        (pa.array([[1.0], None]), "1 rows are empty"),
        (pa.array([[1.0], [None]]), "floating-point numbers are needed"),
        (pa.array([[1], [2]]), "floating-point numbers are needed"),
        (pa.array([1.0, 2.0]), "a column of lists"),
        (pa.array([], pa.list_(pa.float32())), "no rows"),
    ],
)
def test_columns_that_are_no_embeddings(tmp_path, column, told):
    pq.write_table(pa.table({"embedding": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=told):
        parquet_to_npy(str(tmp_path / "a.parquet"), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_bad_files(tmp_path):
    pq.write_table(pa.table({"vector": column_of(ROWS, "fixed")}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'embedding'"):
        parquet_to_npy(str(tmp_path / "a.parquet"), tmp_path)
    os.truncate(tmp_path / "a.parquet", 100)
    with pytest.raises(UserError, match="not a whole Parquet file"):
        parquet_to_npy(str(tmp_path / "a.parquet"), tmp_path)
