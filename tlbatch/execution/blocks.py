"""Manifest rows that are to do -> the blocks that actors process; and, in an actor, the place of a block -> its rows."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tlbatch import schema
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import open_range_file

#: The column of `RowBlocks.places`.
PLACES = "places"


@dataclass(frozen=True)
class RowBlocks:
    """Rows of a manifest, each with its number in a column `row`, cut into blocks of consecutive rows.

    Attributes:
        rows: the rows.
        starts: (n,) int: where each block begins.
    """

    rows: pa.Table
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[pa.Table]:
        """The blocks as tables."""
        ends = [*self.starts.tolist(), self.rows.num_rows]
        return (self.rows.slice(start, end - start) for start, end in itertools.pairwise(ends))

    def places(self) -> pa.Table:
        """For each block where its rows are in the manifest: starts and ends of ranges in turn, some bytes for a block."""
        numbers = self.rows["row"].to_numpy()
        starts = np.union1d(self.starts, np.flatnonzero(np.diff(numbers) != 1) + 1)
        ends = np.append(starts[1:], len(numbers)) - 1
        ranges = np.stack([numbers[starts], numbers[ends] + 1], axis=1).ravel()
        offsets = 2 * np.append(np.searchsorted(starts, self.starts), len(starts))
        return pa.table({PLACES: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ranges, pa.int64()))})


class ManifestRows:
    """Rows of the manifest in a run's folder by their place, read from the store; a row group is in memory at a time.

    It may be used by several threads. The driver has checked the whole file against its digest.
    """

    def __init__(self, run: Location) -> None:
        self._location = run.join(schema.MANIFEST)
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        self._starts: np.ndarray = np.zeros(1, np.int64)
        self._group: tuple[int, pa.Table] | None = None

    def of_block(self, place: pa.Table) -> pa.Table:
        """The rows of a block, each with its number in a column `row`.

        Args:
            place: one row of `RowBlocks.places`.
        """
        ranges: Sequence[int] = place[PLACES][0].as_py()
        return pa.concat_tables(self.between(start, end) for start, end in zip(ranges[::2], ranges[1::2], strict=True))

    def between(self, start: int, end: int) -> pa.Table:
        """The rows from `start` to `end`, at least one, each with its number in a column `row`."""
        with self._lock:
            return pa.concat_tables(self._pieces(start, end))

    def _pieces(self, start: int, end: int) -> Iterator[pa.Table]:
        while start < end:
            first, group = self._group_of(start)
            rows = group.slice(start - first, end - start)
            yield rows.append_column("row", pa.array(np.arange(start, start + rows.num_rows)))
            start += rows.num_rows

    def _group_of(self, row: int) -> tuple[int, pa.Table]:
        """The row group with a row, and the number of its first row."""
        if self._file is None:
            info = self._location.info()
            if info is None:
                raise FileNotFoundError(self._location.url)
            self._file = pq.ParquetFile(open_range_file(self._location, info.size))
            facts = self._file.metadata
            counts = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
            self._starts = np.cumsum([0, *counts])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        if self._group is None or self._group[0] != number:
            self._group = number, self._file.read_row_group(number, use_threads=False)
        return int(self._starts[number]), self._group[1]
