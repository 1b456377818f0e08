"""Published runs -> the table they make up: for each object, the rows of the newest run that lists it.

An incremental run lists only what was new, changed or to be done again; `removed.parquet` beside its manifest names the objects
that the store no longer has. An object belongs to one run as a whole: the images of a shard never come from two runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.output.run import Run


class SnapshotRun(NamedTuple):
    """One run of a table, and the uris that newer runs of the table have superseded."""

    run: Run
    superseded: pa.ChunkedArray

    def is_current(self, table: pa.Table) -> np.ndarray:
        """(n,) bool: which rows of one of the run's tables, or of its manifest, belong to the whole table."""
        found: np.ndarray = ~pc.is_in(table["uri"], self.superseded).to_numpy()
        return found

    def current_rows(self, table: pa.Table) -> pa.Table:
        """The rows that belong to the whole table."""
        return table.filter(pa.array(self.is_current(table))) if len(self.superseded) else table


def snapshot(runs: Sequence[Run]) -> Iterator[SnapshotRun]:
    """The runs of a table, the newest first.

    Manifests are read of all runs but the oldest, which has the largest one; only their uris are kept.

    Args:
        runs: the runs of the table, the oldest first.
    """
    superseded: list[pa.Array] = []
    for run in reversed(runs):
        yield SnapshotRun(run, pa.chunked_array(superseded, pa.string()))
        if run is not runs[0]:
            superseded += [*run.manifest["uri"].chunks, *run.removed["uri"].chunks]


def current_runs(runs: Sequence[Run]) -> list[SnapshotRun]:
    """The runs of a table that have any current rows, the newest first."""
    return [one for one in snapshot(runs) if one.current_rows(one.run.manifest).num_rows]
