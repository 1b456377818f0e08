"""Published runs -> the table they make up: for each object, the rows of the newest run that lists it.

An incremental run lists only what was new, changed or to be done again; `removed.parquet` beside its manifest names the objects
that the store no longer has. An object belongs to one run as a whole: the images of a shard never come from two runs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from operator import methodcaller
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.output.run import Run

_as_text = methodcaller("as_py")


class UriSet:
    """A set of uris in sorted columns, so that the few between two uris are found without a look at the others.

    Args:
        columns: of uris, in any order.
        more: a set whose uris it also has. They are not copied.
    """

    def __init__(self, columns: Sequence[pa.ChunkedArray] = (), more: UriSet | None = None) -> None:
        self._sorted: list[pa.Array] = [] if more is None else list(more._sorted)
        for column in columns:
            # `large_string`: many uris are more than the 2 GiB that one array of `string` can have.
            whole = column.cast(pa.large_string())
            self._sorted += [whole.take(pc.sort_indices(whole)).combine_chunks()] if len(whole) else []

    def __len__(self) -> int:
        return sum(map(len, self._sorted))

    def holds(self, uris: pa.ChunkedArray) -> np.ndarray:
        """(n,) bool: which uris are in the set. Fast where they are near each other, as the rows of a sorted table are."""
        ends = pc.min_max(uris).as_py()
        near = list[pa.Array]()
        for column in self._sorted if len(uris) else ():
            first, last = bisect_left(column, ends["min"], key=_as_text), bisect_right(column, ends["max"], key=_as_text)
            near += [column.slice(first, last - first)] if first < last else []
        if not near:
            return np.zeros(len(uris), bool)
        found: np.ndarray = pc.is_in(uris.cast(pa.large_string()), pa.chunked_array(near)).to_numpy()
        return found


class SnapshotRun(NamedTuple):
    """One run of a table, and the uris that newer runs of the table have superseded."""

    run: Run
    superseded: UriSet

    def is_current(self, table: pa.Table) -> np.ndarray:
        """(n,) bool: which rows of one of the run's tables, or of its manifest, belong to the whole table."""
        return ~self.superseded.holds(table["uri"])

    def current_rows(self, table: pa.Table) -> pa.Table:
        """The rows that belong to the whole table."""
        return table.filter(pa.array(self.is_current(table))) if len(self.superseded) else table


def snapshot(runs: Sequence[Run]) -> Iterator[SnapshotRun]:
    """The runs of a table, the newest first.

    Manifests are read of all runs but the oldest, which has the largest one; only their uris are kept.

    Args:
        runs: the runs of the table, the oldest first.
    """
    superseded = UriSet()
    for run in reversed(runs):
        yield SnapshotRun(run, superseded)
        if run is not runs[0]:
            superseded = UriSet([run.manifest["uri"], run.removed["uri"]], superseded)


def current_in_range(rows: Sequence[pa.Table], listed: Sequence[pa.Table], removed: Sequence[pa.Table]) -> list[pa.Table]:
    """Of each run, the newest first, its rows in a range of uris that belong to the whole table.

    Args:
        rows: of each run, the newest first, all of its rows in the range.
        listed: of each run the objects that it lists in the range; they hide the rows of older runs.
        removed: of each run the objects that it removes in the range; they hide them, too.
    """
    found, superseded = list[pa.Table](), list[pa.Array]()
    for own, *newer in zip(rows, listed, removed, strict=True):
        hidden = superseded and own.num_rows and pc.is_in(own["uri"], pa.chunked_array(superseded))
        found.append(own.filter(pc.invert(hidden)) if hidden else own)
        superseded += [chunk for table in newer for chunk in table["uri"].chunks]
    return found
