"""Sorted tables side by side: each uri is in one range, and few rows are in memory."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import begin, manifest

from tlbatch import schema
from tlbatch.errors import CountsError
from tlbatch.output.ranges import read_in_ranges
from tlbatch.output.snapshot import UriSet
from tlbatch.storage import temporary_rows
from tlbatch.storage.resolve import resolve

URIS = st.lists(st.text("abc/é", min_size=1, max_size=3), max_size=12)
TABLES = st.lists(URIS, min_size=1, max_size=4)


def pieces(uris: list[str], size: int):
    """A table in pieces of some rows, of which the first may be empty."""
    table = pa.table({"uri": pa.array(uris, pa.string()), "row": pa.array(range(len(uris)), pa.int64())})
    yield table.slice(0, 0)
    yield from (table.slice(start, size) for start in range(0, len(uris), size))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(tables=TABLES, size=st.integers(1, 4), in_order=st.booleans())
def test_each_uri_is_in_one_range_with_all_its_rows(tables, size, in_order):
    if in_order:
        tables = [sorted(uris) for uris in tables]
    found = read_in_ranges(lambda: [pieces(uris, size) for uris in tables], list)
    ends = ""
    for rows in found:
        uris = [uri for table in rows for uri in table["uri"].to_pylist()]
        assert uris
        assert min(uris) > ends, "a uri is in one range, and ranges are in order"
        ends = max(uris)
    for number, uris in enumerate(tables):
        rows = pa.concat_tables(of_range[number] for of_range in found) if found else pa.table({"uri": [], "row": []})
        assert rows["uri"].to_pylist() == sorted(uris)
        assert sorted(rows["row"].to_pylist()) == list(range(len(uris)))


def test_of_tables_in_order_only_some_pieces_are_in_memory():
    alive = 0

    def counted(first: int):
        nonlocal alive
        for start in range(first, 60_000, 1_000):
            alive += 1
            yield pa.table({"uri": [f"{number:06d}" for number in range(start, start + 1_000, 2)]})

    def most(found) -> int:
        most, taken = 0, 0
        for rows in found:
            taken += sum(table.num_rows for table in rows)
            most = max(most, 500 * alive - taken)
        return most

    assert read_in_ranges(lambda: [counted(0), counted(1)], most) <= 2_000
    assert alive == 120


@pytest.mark.parametrize("piece", [100, 8 << 20])
def test_a_manifest_is_checked_before_it_is_read(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(temporary_rows, "_PIECE", piece)
    monkeypatch.setattr(schema, "ROWS_OF_GROUP", 4)
    run = begin(resolve(str(tmp_path)))
    found = list(run.manifest_pieces())
    assert [table.num_rows for table in found] == [0, 4, 4, 2]
    assert pa.concat_tables(found).equals(run.manifest)
    run.location.join(schema.MANIFEST).write(schema.to_parquet(manifest(11)))
    with pytest.raises(CountsError, match=r"manifest of run .* differs"):
        list(run.manifest_pieces())


@settings(deadline=None, max_examples=100, derandomize=True)
@given(members=URIS, asked=URIS)
def test_a_set_of_uris_holds_its_members(members, asked):
    column = pa.chunked_array([members[:5], members[5:]], pa.string())
    found = UriSet([column.slice(3)], UriSet([column.slice(0, 3)]))
    assert len(found) == len(members)
    assert found.holds(pa.chunked_array([asked], pa.string())).tolist() == [uri in members for uri in asked]
