"""Tables in temporary files: the order of their rows, their memory, and a full disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlbatch.errors import NoRoomError
from tlbatch.schema import MANIFEST_SCHEMA, REMOVED_SCHEMA
from tlbatch.storage import temporary_rows
from tlbatch.storage.temporary_rows import mapped, selected, sorted_table, stored_table, temporary_file


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    pages=st.lists(st.lists(st.text("ab/é🐱", max_size=3), max_size=6), max_size=12),
    page_order=st.booleans(),
    most=st.sampled_from([1, 5, 12, 1000]),
    chunk=st.sampled_from([1, 4, 8_192]),
)
def test_batches_in_any_order_give_one_order(pages, page_order, most, chunk):
    """Folders are listed concurrently: most pages are in order, each in itself, and come in any order."""
    if page_order:
        pages = [sorted(keys, key=str.encode) for keys in pages]
    columns = (
        [[f"s/{key}" for key in keys], keys, range(len(keys)), [f"e{number}"] * len(keys), ["image"] * len(keys)]
        for number, keys in enumerate(pages)
    )
    batches = [pa.record_batch([pa.array(one) for one in page], schema=MANIFEST_SCHEMA) for page in columns]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(temporary_rows, "ROWS_IN_MEMORY", most)
        patch.setattr(temporary_rows, "_ROWS_OF_CHUNK", chunk)
        found = sorted_table(iter(batches), MANIFEST_SCHEMA, "key")
    assert found.schema.equals(MANIFEST_SCHEMA, check_metadata=True)
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert found.to_pylist() == sorted(rows, key=lambda row: row["key"].encode()), "rows of the same key stay in their order"


def test_rows_with_the_same_text_stay_in_their_order(monkeypatch):
    monkeypatch.setattr(temporary_rows, "ROWS_IN_MEMORY", 3)
    keys = [["b", "a", "b"], ["c", "b"], ["b", "a", "b", "c"]]
    numbers = iter(range(9))
    batches = [pa.record_batch([[f"{next(numbers)}" for _ in page], page], schema=REMOVED_SCHEMA) for page in keys]
    found = sorted_table(iter(batches), REMOVED_SCHEMA, "key")
    assert found["uri"].to_pylist() == ["1", "6", "0", "2", "4", "5", "7", "3", "8"]


def test_a_few_rows_write_no_file(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: pytest.fail("a file was opened"))
    rows = REMOVED_SCHEMA.empty_table()
    assert stored_table([rows, rows], REMOVED_SCHEMA).equals(rows)
    assert sorted_table(rows.to_batches(), REMOVED_SCHEMA, "key").equals(rows)


def test_selected_rows_are_those_of_a_filter(monkeypatch):
    table = pa.table({"uri": [str(number) for number in range(100)], "key": ["k"] * 100}, schema=REMOVED_SCHEMA)
    some = np.arange(100) % 3 > 0
    expected = table.filter(pa.array(some))
    assert selected(table, some).equals(expected)
    monkeypatch.setattr(temporary_rows, "ROWS_IN_MEMORY", 7)
    assert selected(table, some).equals(expected)
    assert selected(table, ~some & False).num_rows == 0
    assert selected(table, some | True) is table


def test_a_table_of_other_columns_is_refused(monkeypatch):
    monkeypatch.setattr(temporary_rows, "ROWS_IN_MEMORY", 1)
    with pytest.raises(ValueError, match="the columns are"):
        stored_table([pa.table({"uri": ["a", "b"], "key": [1, 2]})], REMOVED_SCHEMA)


def test_a_file_of_no_bytes_is_no_parquet_file():
    with temporary_file() as file, pytest.raises(pa.ArrowInvalid, match="size is 0 bytes"):
        pq.ParquetFile(mapped(file))


def test_a_full_disk_is_one_sentence(monkeypatch):
    class Full:
        def write(self, _data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            pass

    monkeypatch.setattr(temporary_rows, "ROWS_IN_MEMORY", 1)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    rows = pa.table({"uri": ["a", "b"], "key": ["a", "b"]}, schema=REMOVED_SCHEMA)
    with pytest.raises(NoRoomError, match=r"is full: .* TMPDIR"):
        stored_table([rows], REMOVED_SCHEMA)


_MANY = """
import pyarrow as pa, resource
from tlbatch.schema import REMOVED_SCHEMA
from tlbatch.storage.temporary_rows import sorted_table
def batches(count):
    for start in range(count):
        text = [f"{(number * 7_919 + start) % 8_192:06d}-{start:06d}-{'x' * 80}" for number in range(8_192)]
        yield pa.record_batch([text, text], schema=REMOVED_SCHEMA)
peaks = []
for count in (50, 150):
    table = sorted_table(batches(count), REMOVED_SCHEMA, "uri")
    assert table.num_rows == count * 8_192
    peaks.append(pa.default_memory_pool().max_memory())
print(*peaks)
"""


def test_the_memory_of_a_sort_does_not_grow_with_the_rows():
    """Shuffled rows of 200 bytes, four hundred thousand and over a million; what is mapped from the file is not counted."""
    done = subprocess.run([sys.executable, "-c", _MANY], stdout=subprocess.PIPE, text=True, check=True)
    fewer, more = map(int, done.stdout.split())
    assert more < 1.25 * fewer
