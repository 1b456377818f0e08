"""Single rows of a table by their places, and the places of current rows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tables import publish_images

from tlbatch.errors import OutputError
from tlbatch.output import rows as rows_module
from tlbatch.output.rows import RowFiles
from tlbatch.output.run import read_table_runs
from tlbatch.storage.resolve import resolve


@pytest.fixture
def output(tmp_path):
    """Two runs: ten images in four files, of which the second run has b and d anew, and has removed c."""
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "r1", {name: {"score": number / 16} for number, name in enumerate("abcdefghij")})
    publish_images(output, "r2", {"b": {"score": 0.75}, "d": {"score": 0.875}}, removed=["c"])
    return output


@pytest.fixture
def files(output):
    return RowFiles(read_table_runs(output), "predictions")


def test_rows_come_in_the_order_of_their_places(files):
    assert files.starts == [0, 10, 12]
    places = [11, 0, 9, 3, 3, 10]
    assert files.take(places, ["key"])["key"].to_pylist() == ["d", "a", "j", "d", "d", "b"]
    assert files.take(np.array([7]), ["score", "key"]).to_pylist() == [{"score": 7 / 16, "key": "h"}]
    assert files.take([], ["key"]).num_rows == 0


def test_current_rows_have_their_places(files):
    found = pa.concat_tables(files.current(["score"]))
    assert found.column_names == ["score", "place"]
    assert found["place"].to_pylist() == [0, 4, 5, 6, 7, 8, 9, 10, 11]
    keys = files.take(found["place"].to_pylist(), ["key"])["key"].to_pylist()
    assert keys == list("aefghijbd")


def test_only_row_groups_with_a_wanted_row_are_read(files, monkeypatch):
    read, before = [], rows_module._read
    monkeypatch.setattr(rows_module, "_read", lambda group, columns: read.append(group.first) or before(group, columns))
    files.take([4, 10, 5], ["key"])
    assert sorted(read) == [3, 10]
    read.clear()
    # Of the six files only one may have such keys, and it has others too; of the others only the statistics are read.
    assert [(first, found.to_pylist()) for first, found in files.holding("key", "h", "i")] == [(6, ["g", "h", "i"])]
    assert read == [6]
    assert list(files.holding("key", "a", "z")) == [(0, 3), (3, 3), (6, 3), (9, 1), (10, 2)]
    assert read == [6]


def test_a_column_that_older_files_lack_is_null(output):
    (run,) = read_table_runs(output)[:1]
    part = run.location.join("predictions", "part-00000.parquet")
    pq.write_table(pq.read_table(part.path).drop_columns(["index"]), part.path)
    files = RowFiles(read_table_runs(output), "predictions")
    assert files.take([0, 3], ["key", "index"]).to_pylist() == [{"key": "a", "index": None}, {"key": "d", "index": 0}]


def test_a_missing_file_is_a_sentence(output, monkeypatch):
    monkeypatch.setattr(rows_module, "parts_of", lambda run, folder: [run.join(folder, "part-00009.parquet")])
    with pytest.raises(OutputError, match="is missing"):
        RowFiles(read_table_runs(output), "predictions")
