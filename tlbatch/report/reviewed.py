"""A table and the one before it, read by ranges of uris -> how certain each image is, and whether it is new or changed.

Nothing is kept of an image but numbers: 20 bytes. Its names are read once it is known which images matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.images.labels import Labels, names_of
from tlbatch.output.publish import count_values
from tlbatch.output.ranges import numbered_pieces, read_in_ranges
from tlbatch.output.run import Run
from tlbatch.output.table import SOURCES, count_rows, current_of, sources_of_table

_VERSION = ["uri", "key", "etag"]


class ReviewedTable(NamedTuple):
    """The images of a table that have no label yet, in the order of `read_predictions`.

    Attributes:
        rows: (n,) int: the place of each image among all rows of the runs, the oldest run first.
        margins: (n,) differences between the best and the second-best score; a smaller one means less certain. If the table
            has only one score for some image, the distance of the best score from 0.5.
        changed: (n,) bool: whether an image is new or changed since the table before.
        labels: their labels.
    """

    rows: np.ndarray
    margins: np.ndarray
    changed: np.ndarray
    labels: set[str]


def read_reviewed(runs: Sequence[Run], before: Sequence[Run], labels: Labels | None) -> ReviewedTable:
    """Read what decides which images to review.

    Args:
        runs: the runs that form the table, the oldest first.
        before: the runs that form the table before it; without one, no image counts as changed.
        labels: the images that are labelled already, or whose labels were withdrawn; they are left out.
    """
    split, counts = SOURCES * len(runs), [count_rows(run, "predictions") for run in runs]
    starts = np.cumsum([0, *counts[:-1]]).tolist()

    def sources() -> list[Iterator[pa.Table]]:
        now = sources_of_table(runs, "predictions", [*_VERSION, "label", "score", "top_scores"])
        now[::SOURCES] = map(numbered_pieces, now[::SOURCES], reversed(starts))
        return [*now, *sources_of_table(before, "predictions", _VERSION)]

    def read(ranges: Iterator[list[pa.Table]]) -> _Reviewed:
        found = _Reviewed(sum(counts))
        for tables in ranges:
            found.add(current_of(tables[:split]), current_of(tables[split:]) if before else None, labels)
        return found

    return read_in_ranges(sources, read).without_labelled(labels)


class _Reviewed:
    """What was found so far; arrays have a place for each row of the runs."""

    def __init__(self, rows: int) -> None:
        self._current, self._changed = np.zeros(rows, bool), np.zeros(rows, bool)
        self._margins, self._distances = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self._one_score = False
        self._labels: Counter[str] = Counter()
        self._named: list[pa.Table] = []

    def add(self, rows: pa.Table, before: pa.Table | None, labels: Labels | None) -> None:
        """Add the rows of a range, beside those of the table before."""
        places = rows["row"].to_numpy()
        self._current[places] = True
        self._labels.update(count_values(rows["label"]))
        scores = rows["top_scores"]
        self._one_score |= bool(pc.any(pc.less(pc.list_value_length(scores), 2), min_count=0).as_py())
        if not self._one_score:
            self._margins[places] = pc.subtract(pc.list_element(scores, 0), pc.list_element(scores, 1)).to_numpy()
        self._distances[places] = np.abs(rows["score"].to_numpy() - np.float32(0.5))
        if before is not None:
            self._changed[places] = ~_holds(before, rows)
        if labels is not None:
            self._named.append(labels.named(rows.select(["uri", "key", "label", "row"])))

    def without_labelled(self, labels: Labels | None) -> ReviewedTable:
        """The rows that have no label, and none that was withdrawn."""
        if labels is not None and self._named:  # else the table has no rows
            named = pa.concat_tables(self._named).sort_by("row")
            found = labels.of_images(names_of(named))
            seen = found.labels.keys() | found.withdrawn
            done = named.filter(pa.array([name in seen for name in names_of(named)], pa.bool_()))
            self._current[done["row"].to_numpy()] = False
            self._labels -= count_values(done["label"])
        margins = self._distances if self._one_score else self._margins
        current = self._current
        return ReviewedTable(np.flatnonzero(current), margins[current], self._changed[current], set(self._labels))


def _holds(table: pa.Table, rows: pa.Table) -> np.ndarray:
    """(n,) bool: for each row whether a table has its version of the image."""
    versions, own = (
        pc.binary_join_element_wise(*(one[name] for name in _VERSION), "\0", null_handling="replace", null_replacement="\0")
        for one in (table, rows)
    )
    found: np.ndarray = pc.is_in(own, versions).to_numpy()
    return found
