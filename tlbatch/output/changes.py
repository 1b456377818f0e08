"""The runs of a table as they were, and as they are -> what has to change in a copy of its predictions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.output.run import OutputState, Run
from tlbatch.output.snapshot import UriSet, snapshot
from tlbatch.output.table import pieces_of_parts

#: The columns of a copy, and what stands in its commits: the names of the runs that make up the table.
COPIED, RUNS_OF_COPY = schema.PREDICTIONS.remove_metadata(), "tlbatch.runs"


@dataclass(frozen=True)
class Changes:
    """What turns a copy of an earlier table into one of the table of now.

    Attributes:
        gone: (n,) string, sorted, each once: the uris whose rows are to be removed. A copy need not have rows of all of them.
        rows: the rows to be added after that, with the columns `COPIED`, in the order of their uris.
    """

    gone: pa.Array
    rows: pa.Table


def changes_since(state: OutputState, earlier: Sequence[str]) -> Changes | None:
    """What has changed in the predictions of an output. What runs share that are in both tables is not read.

    Args:
        state: the output.
        earlier: the names of the runs that made up the table then, the oldest first.

    Returns:
        The changes; None if the tables share no run, or a run is gone, so that the whole table has to be copied.
    """
    now = state.table
    pairs = zip(earlier, (run.run_id for run in now), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    undone = [state.by_id.get(run_id) for run_id in earlier[common:]]
    if not common or not all(run is not None and run.has_manifest() for run in undone):
        return None
    newer = now[common:]
    touched = _uris_of([*newer, *(run for run in undone if run is not None)])
    rows = _current(now, {run.run_id for run in newer}, UriSet([touched]) if undone else UriSet())
    return Changes(_each_once(touched), schema.sort_rows(rows, "uri").cast(COPIED))


def _uris_of(runs: Sequence[Run]) -> pa.ChunkedArray:
    """The uris that runs list or remove: those of which rows may differ."""
    columns = [table["uri"] for run in runs for table in (run.manifest, run.removed)]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())


def _each_once(uris: pa.ChunkedArray) -> pa.Array:
    found = pc.unique(uris.cast(pa.large_string()))
    return found.take(pc.sort_indices(found))


def _current(now: Sequence[Run], newer: Collection[str], touched: UriSet) -> pa.Table:
    """The current rows of the newer runs, which are named, and of the older ones those of some uris."""
    found = [schema.PREDICTIONS.empty_table()]
    for one in snapshot(now):
        is_newer = one.run.run_id in newer
        if is_newer or len(touched):
            pieces = map(one.current_rows, pieces_of_parts(one.run, "predictions", schema.PREDICTIONS.names))
            found += pieces if is_newer else (piece.filter(pa.array(touched.holds(piece["uri"]))) for piece in pieces)
    return pa.concat_tables(found)
