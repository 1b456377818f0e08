"""The places of rows in a table -> these rows, read where they lie. Of a file, only row groups with a wanted row are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tlbatch.output.run import READS_AT_ONCE, Run
from tlbatch.output.snapshot import snapshot
from tlbatch.output.table import part_size, parts_of, pieces_of_parts, read_group
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import open_range_file

#: Row groups that are read at once.
_GROUPS_AT_ONCE = 4


class _Group(NamedTuple):
    """A row group: its file, its number in the file, and the place of its first row."""

    file: _File
    number: int
    first: int


class _File(NamedTuple):
    """A published file and its footer."""

    location: Location
    size: int
    footer: pq.FileMetaData

    @classmethod
    def of(cls, location: Location) -> _File:
        size = part_size(location)
        return cls(location, size, pq.ParquetFile(open_range_file(location, size)).metadata)

    def opened(self) -> pq.ParquetFile:
        """A reader of the file. It is cheap: the footer is known, and a file on this machine is mapped."""
        if isinstance(self.location, LocalLocation):
            return pq.ParquetFile(self.location.path, metadata=self.footer, memory_map=True)
        return pq.ParquetFile(open_range_file(self.location, self.size), metadata=self.footer)


class RowFiles:
    """The files of one table of some published runs. The place of a row is its number among all rows of the runs.

    Superseded rows count too. Only footers are in memory. Safe to use from many threads.

    Args:
        runs: the runs, the oldest first.
        folder: `predictions`, `errors` or `features`.

    Attributes:
        starts: the place of the first row of each run, and the number of all rows.

    Raises:
        OutputError: a file is missing.
    """

    def __init__(self, runs: Sequence[Run], folder: str) -> None:
        self._runs, self._folder = runs, folder
        parts = [parts_of(run.location, folder) for run in runs]
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            files = pool.map(_File.of, chain.from_iterable(parts))
            self._groups, self.starts, self._empty = list[_Group](), [0], pa.table({})
            for of_run in parts:
                rows = self.starts[-1]
                for file in (next(files) for _ in of_run):
                    self._empty = file.footer.schema.to_arrow_schema().empty_table()
                    for number in range(file.footer.num_row_groups):
                        self._groups.append(_Group(file, number, rows))
                        rows += file.footer.row_group(number).num_rows
                self.starts.append(rows)
        self._firsts = [group.first for group in self._groups]

    def current(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows that newer runs have not superseded, a piece at a time, each with its place in a column `place`."""
        known = {one.run.run_id: one for one in snapshot(self._runs)}
        for run, place in zip(self._runs, self.starts, strict=False):
            one = known[run.run_id]
            needed = dict.fromkeys([*columns, *(["uri"] if len(one.superseded) else [])])
            for piece in pieces_of_parts(run, self._folder, list(needed)):
                places = pa.array(np.arange(place, place + piece.num_rows))
                place += piece.num_rows  # noqa: PLW2901 - of the next piece
                numbered = piece.append_column("place", places)
                yield (one.current_rows(numbered) if piece.num_rows else numbered).select([*columns, "place"])

    def take(self, places: Sequence[int] | np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The rows at some places, in the order of these.

        Args:
            places: (n,) int, each below the number of all rows.
            columns: the columns to read; `index` is null in files that are older than this column.
        """
        order = np.argsort(np.asarray(places, np.int64), kind="stable")
        wanted = np.asarray(places, np.int64)[order].tolist()
        by_group = [(self._groups[at], list(found)) for at, found in groupby(wanted, self._group_of)]
        with ThreadPoolExecutor(_GROUPS_AT_ONCE) as pool:
            rows = list(pool.map(lambda one: _rows_of(one[0], one[1], columns), by_group))
        if not rows:
            return self._empty.select(list(columns))
        return pa.concat_tables(rows, promote_options="default").take(pa.array(np.argsort(order)))

    def holding(self, column: str, first: str, last: str) -> Iterator[tuple[int, pa.ChunkedArray | int]]:
        """Where a text column may have values from `first` to `last`.

        Args:
            column: a column of texts.
            first: the first text of the range.
            last: the text with which all texts of the range compare as less.

        Yields:
            For each row group with such values, the place of its first row, and its values; or only how many, if all are.
        """
        for group in self._groups:
            footer = group.file.footer.row_group(group.number)
            limits = _limits(footer, group.file.footer.schema.names.index(column))
            if limits and (limits[1] < first or limits[0] >= last):
                continue
            if limits and limits[0] >= first and limits[1] < last:
                yield group.first, footer.num_rows
            else:
                yield group.first, _read(group, [column])[column]

    def _group_of(self, place: int) -> int:
        return bisect_right(self._firsts, place) - 1


def _rows_of(group: _Group, places: Sequence[int], columns: Sequence[str]) -> pa.Table:
    return _read(group, columns).take(pa.array([place - group.first for place in places]))


def _read(group: _Group, columns: Sequence[str]) -> pa.Table:
    return read_group(group.file.opened(), group.number, columns).select(list(columns))


def _limits(group: Any, column: int) -> tuple[str, str] | None:
    """The least and the greatest text of a column of a row group, if its statistics have them."""
    statistics = group.column(column).statistics
    return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None
