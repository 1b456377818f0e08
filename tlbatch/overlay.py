"""Published runs -> the table they make up: of each object, what the newest run that has it says.

A night's run holds only what was new, changed or to be done again; `removed.parquet` beside its manifest names what the store
has no more. An object is one run's as a whole: the images of a shard never come from two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.ledger import Run


class Layer(NamedTuple):
    """One run of a table, and the uris of which a newer one has something else to say."""

    run: Run
    hidden: pa.ChunkedArray

    def shows(self, table: pa.Table) -> np.ndarray:
        """(n,) bool: which rows of one of the run's tables, or of its manifest, are part of the whole table."""
        found: np.ndarray = ~pc.is_in(table["uri"], self.hidden).to_numpy()
        return found

    def visible(self, table: pa.Table) -> pa.Table:
        """Those rows."""
        return table.filter(pa.array(self.shows(table))) if len(self.hidden) else table


def layers(runs: Sequence[Run]) -> Iterator[Layer]:
    """The runs of a table, the newest first, as `ledger.published_runs` gives them the oldest first.

    Manifests are read of all but the oldest, which is the large one; only their uris are kept.
    """
    hidden: list[pa.Array] = []
    for run in reversed(runs):
        yield Layer(run, pa.chunked_array(hidden, pa.string()))
        if run is not runs[0]:
            hidden += [*run.manifest["uri"].chunks, *run.removed["uri"].chunks]


def visible_layers(runs: Sequence[Run]) -> list[Layer]:
    """Those of which anything is part of the table, the newest first."""
    return [layer for layer in layers(runs) if layer.visible(layer.run.manifest).num_rows]
