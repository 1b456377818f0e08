"""Tables that are sorted by uri -> their rows side by side, one range of uris after the other; only a range is in memory."""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from typing import TypeVar

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.storage.temporary_rows import sorted_table

#: Rows of a table that are in memory at a time.
ROWS_AT_ONCE = schema.ROWS_OF_GROUP

Found = TypeVar("Found")


def numbered_pieces(pieces: Iterator[pa.Table], start: int = 0) -> Iterator[pa.Table]:
    """Pieces of a table with a column `row`, the place of each row in the table, counted from `start`."""
    for piece in pieces:
        yield piece.append_column("row", pa.array(np.arange(start, start + piece.num_rows)))
        start += piece.num_rows


def pieces_of(table: pa.Table) -> Iterator[pa.Table]:
    """A table in memory, a piece at a time."""
    return (table.slice(start, ROWS_AT_ONCE) for start in range(0, max(1, table.num_rows), ROWS_AT_ONCE))


def read_in_ranges(
    sources: Callable[[], Sequence[Iterator[pa.Table]]], read: Callable[[Iterator[list[pa.Table]]], Found], by: str = "uri"
) -> Found:
    """What `read` makes of the rows of several tables, by ranges of uris.

    Args:
        sources: gives the pieces of each table, at least one, with a column `uri`. If they do not come in the order of their
            uris, as those of a list of addresses, each table is sorted, and `read` is called once more.
        read: takes for one range after the other the rows of each table; every uri is in one range. Together they hold about
            one piece a table, and more only where a uri has more rows.
        by: the column that has the part of `uri`.
    """
    try:
        with contextlib.suppress(_UnsortedError):
            return read(_in_ranges(sources(), by))
        return read(_in_ranges([_sorted_pieces(pieces, by) for pieces in sources()], by))
    finally:
        pa.default_memory_pool().release_unused()  # Arrow keeps the memory of the ranges, which the next step may need


def iterate_ranges(
    sources: Callable[[], Sequence[Iterator[pa.Table]]], uris: Callable[[], Sequence[Iterator[pa.Table]]]
) -> Iterator[list[pa.Table]]:
    """The ranges that `read_in_ranges` gives, for what cannot start again.

    Args:
        sources: as for `read_in_ranges`.
        uris: gives at least the uris of the pieces. They are read first, to know whether they are in order.
    """
    in_order = False
    with contextlib.suppress(_UnsortedError):
        for _ in _in_ranges(uris(), "uri"):
            pass
        in_order = True
    yield from _in_ranges(sources() if in_order else [_sorted_pieces(pieces, "uri") for pieces in sources()], "uri")


def _in_ranges(sources: Sequence[Iterator[pa.Table]], by: str) -> Iterator[list[pa.Table]]:
    cursors = [_Cursor(pieces, by) for pieces in sources]
    while True:
        # Behind the last row that was read of a table, it may go on with the same value.
        bound = min((cursor.last for cursor in cursors if cursor.last is not None), default=None)
        taken = [cursor.take(bound) for cursor in cursors]
        if any(rows.num_rows for rows in taken):
            yield taken
        if bound is None:
            return
        for cursor in cursors:
            if cursor.last == bound:
                cursor.advance()


def _sorted_pieces(pieces: Iterator[pa.Table], by: str) -> Iterator[pa.Table]:
    first = next(pieces)
    batches = (batch for piece in itertools.chain([first], pieces) for batch in piece.to_batches())
    return pieces_of(sorted_table(batches, first.schema, by))


class _UnsortedError(Exception):
    """Rows do not come in the order of their uris."""


class _Cursor:
    """The rows of a table that were read and not taken; `last` is the uri of the last one, None once the table has ended."""

    def __init__(self, pieces: Iterator[pa.Table], by: str) -> None:
        first = next(pieces)
        self._by = by
        self._rows = first.slice(0, 0)
        self._pieces = itertools.chain([first], pieces)
        self.last: str | None = ""
        self.advance()

    def advance(self) -> None:
        """Read the next piece."""
        piece = next((piece for piece in self._pieces if piece.num_rows), None)
        if piece is None:
            self.last = None
            return
        uris = piece[self._by]
        if uris[0].as_py() < self.last or not schema.is_sorted(uris):
            raise _UnsortedError
        self.last = uris[-1].as_py()
        self._rows = pa.concat_tables([self._rows, piece]) if self._rows.num_rows else piece

    def take(self, bound: str | None) -> pa.Table:
        """The rows before a uri, or all if there is none."""
        rows, uris = self._rows, self._rows[self._by]
        count = len(uris) if bound is None else bisect_left(uris, bound, key=methodcaller("as_py"))
        self._rows = rows.slice(count)
        return rows.slice(0, count)
