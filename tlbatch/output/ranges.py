"""Tables that are sorted by uri -> their rows side by side, one range of uris after the other; only a range is in memory."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from typing import TypeVar

import pyarrow as pa

from tlbatch import schema
from tlbatch.storage.temporary_rows import sorted_table

#: Rows of a table that are in memory at a time.
ROWS_AT_ONCE = schema.ROWS_OF_GROUP

Found = TypeVar("Found")


def pieces_of(table: pa.Table) -> Iterator[pa.Table]:
    """A table in memory, a piece at a time."""
    return (table.slice(start, ROWS_AT_ONCE) for start in range(0, max(1, table.num_rows), ROWS_AT_ONCE))


def read_in_ranges(
    sources: Callable[[], Sequence[Iterator[pa.Table]]], read: Callable[[Iterator[list[pa.Table]]], Found]
) -> Found:
    """What `read` makes of the rows of several tables, by ranges of uris.

    Args:
        sources: gives the pieces of each table, at least one, with a column `uri`. If they do not come in the order of their
            uris, as those of a list of addresses, each table is sorted, and `read` is called once more.
        read: takes for one range after the other the rows of each table; every uri is in one range. Together they hold about
            one piece a table, and more only where a uri has more rows.
    """
    try:
        return read(_in_ranges(sources()))
    except _UnsortedError:
        return read(_in_ranges([_sorted_pieces(pieces) for pieces in sources()]))


def _in_ranges(sources: Sequence[Iterator[pa.Table]]) -> Iterator[list[pa.Table]]:
    cursors = [_Cursor(pieces) for pieces in sources]
    while True:
        # Behind the last row that was read of a table, it may go on with the same uri.
        bound = min((cursor.last for cursor in cursors if cursor.last is not None), default=None)
        taken = [cursor.take(bound) for cursor in cursors]
        if any(rows.num_rows for rows in taken):
            yield taken
        if bound is None:
            return
        for cursor in cursors:
            if cursor.last == bound:
                cursor.advance()


def _sorted_pieces(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    first = next(pieces)
    batches = (batch for piece in itertools.chain([first], pieces) for batch in piece.to_batches())
    return pieces_of(sorted_table(batches, first.schema, "uri"))


class _UnsortedError(Exception):
    """Rows do not come in the order of their uris."""


class _Cursor:
    """The rows of a table that were read and not taken; `last` is the uri of the last one, None once the table has ended."""

    def __init__(self, pieces: Iterator[pa.Table]) -> None:
        first = next(pieces)
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
        uris = piece["uri"]
        if uris[0].as_py() < self.last or not schema.is_sorted(uris):
            raise _UnsortedError
        self.last = uris[-1].as_py()
        self._rows = pa.concat_tables([self._rows, piece]) if self._rows.num_rows else piece

    def take(self, bound: str | None) -> pa.Table:
        """The rows before a uri, or all if there is none."""
        rows, uris = self._rows, self._rows["uri"]
        count = len(uris) if bound is None else bisect_left(uris, bound, key=methodcaller("as_py"))
        self._rows = rows.slice(count)
        return rows.slice(0, count)
