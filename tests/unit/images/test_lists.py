"""A list of addresses is read a piece at a time, in each of its formats."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from tlbatch.errors import StoreError
from tlbatch.images import lists
from tlbatch.images.listing import Selection, list_store
from tlbatch.images.lists import read_list
from tlbatch.storage.resolve import resolve

ROWS = 500


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(lists, "_ROWS_AT_ONCE", 64)
    monkeypatch.setattr(lists, "_BYTES_AT_ONCE", 2_000)


def write(path: Path, columns: dict[str, list]) -> None:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=100)
    elif path.suffix == ".csv":
        pacsv.write_csv(table, path)
    else:
        path.write_text("".join(f"{uri or ''}\n" for uri in columns["uri"]))


def batches(path: Path) -> list[pa.RecordBatch]:
    location = resolve(str(path))
    return list(read_list(location, location.info()))


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.parquet"])
def test_a_list_is_read_in_pieces(tmp_path, name):
    names = [f"{number * 7 % ROWS:03d}.jpg" for number in range(ROWS)]
    # A later piece of a column that nobody needs has another type than the first one.
    write(tmp_path / name, {"note": ["1"] * (ROWS - 1) + ["no number"], "uri": names})
    found = batches(tmp_path / name)
    assert len(found) > 3
    assert max(batch.num_rows for batch in found) <= 200
    manifest = list_store(resolve(str(tmp_path / name)), Selection()).manifest
    assert manifest["key"].to_pylist() == sorted(names)
    assert manifest["uri"].to_pylist() == [f"{tmp_path}/{key}" for key in sorted(names)]


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_rows_without_an_address_are_counted_in_all_pieces(tmp_path, name):
    write(tmp_path / name, {"uri": [None if number % 100 == 50 else "/a/1.jpg" for number in range(ROWS)], "size": [1] * ROWS})
    with pytest.raises(StoreError, match="has 5 rows without a uri"):
        batches(tmp_path / name)


def test_only_the_end_of_a_line_ends_an_address(tmp_path):
    names = ["a\u2028b.jpg", "c\x0cd.jpg", "e\x85f.jpg"]
    (tmp_path / "list.txt").write_bytes("\r\n".join([*names, "", "  g.jpg "]).encode())
    keys = [key for batch in batches(tmp_path / "list.txt") for key in batch["key"].to_pylist()]
    assert keys == [*names, "g.jpg"]


def test_a_list_that_is_torn_later_says_so(tmp_path):
    (tmp_path / "list.csv").write_text("uri,key\n" + "/a/1.jpg,1\n" * ROWS + "/a/2.jpg\n")
    with pytest.raises(StoreError, match=r"list.csv is not a CSV file: .*Expected 2 columns, got 1"):
        batches(tmp_path / "list.csv")
    (tmp_path / "list.txt").write_bytes(b"/a/1.jpg\n" * ROWS + b"\xff.jpg\n")
    with pytest.raises(StoreError, match=r"list.txt cannot be parsed: .*utf-8"):
        batches(tmp_path / "list.txt")
