"""More rows than should be in memory -> a temporary file, and back as a table; in the order of a column, if that is wanted.

The table is an ordinary one whose columns lie in the file: the kernel reads what is looked at, and drops it when memory is
short. The file has no name, so nothing has to remove it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from operator import methodcaller
from typing import IO, Self, TypeAlias

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import NoRoomError
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import open_range_file

#: Where large temporary files belong, unless the user says otherwise: many systems have /tmp in memory.
_LARGE_FILES = "/var/tmp"  # noqa: S108
#: Rows of a table that are in memory, and not in a file.
ROWS_IN_MEMORY = 1 << 18
#: Small batches are put together up to this number of rows.
_ROWS_OF_CHUNK = 8_192
#: Bytes of a copy that are in memory.
_PIECE = 8 << 20
_as_text = methodcaller("as_py")

_Rows: TypeAlias = pa.Table | pa.RecordBatch


def temporary_file() -> IO[bytes]:
    """A file for many bytes, which has no name and ends with the process.

    It has a buffer: of a raw file Arrow loses what the disk does not take at once
    (`findings/pyarrow-loses-what-a-raw-file-did-not-write.sh`).
    """
    return tempfile.TemporaryFile(dir=folder_of_temporary_files())


def folder_of_temporary_files() -> str:
    """Where `temporary_file` makes its files."""
    given = any(name in os.environ for name in ("TMPDIR", "TEMP", "TMP"))
    return tempfile.gettempdir() if given or not os.access(_LARGE_FILES, os.W_OK | os.X_OK) else _LARGE_FILES


def checked_copy(location: Location, digest: str) -> IO[bytes] | None:
    """A temporary file with the bytes of a file; None if they do not have the recorded sha256.

    A second download might give other bytes than those that were checked.

    Raises:
        FileNotFoundError: it is missing.
        NoRoomError: the folder of temporary files is full.
    """
    info = location.info()
    if info is None:
        raise FileNotFoundError(location.url)
    found = hashlib.sha256()
    copy = digested_copy(location, info.size, found)
    if found.hexdigest() == digest:
        return copy
    copy.close()
    return None


def digested_copy(location: Location, size: int, digest: hashlib._Hash) -> IO[bytes]:
    """A temporary file with the bytes of a file, whose `digest` they are added to.

    Raises:
        OSError: the file cannot be read.
        NoRoomError: the folder of temporary files is full.
    """
    with contextlib.ExitStack() as opened:
        copy = opened.enter_context(temporary_file())
        with open_range_file(location, size) as whole:
            while piece := whole.read(_PIECE):
                digest.update(piece)
                with full_disk_is_said(f"{location.url} has {size:,} bytes"):
                    copy.write(piece)
                    copy.flush()
        opened.pop_all()
    return copy


def mapped(file: IO[bytes]) -> pa.Buffer:
    """The bytes of a temporary file, which take only memory that the kernel takes back when it is short.

    Read through the file, each column of a Parquet file would be copied to memory as a whole.
    """
    if not os.fstat(file.fileno()).st_size:
        return pa.py_buffer(b"")  # nothing of it can be mapped
    return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@contextlib.contextmanager
def full_disk_is_said(what: str) -> Iterator[None]:
    """Raises NoRoomError, with a sentence about what was to be written, if the block fills the disk of temporary files."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoRoomError(
            f"The folder of temporary files, {folder_of_temporary_files()}, is full: {what}. Make room, or set TMPDIR to a "
            "folder on a larger disk."
        ) from None


def stored_table(pieces: Iterable[pa.Table], columns: pa.Schema) -> pa.Table:
    """The rows of some tables as one table, in a temporary file if they are many.

    Raises:
        NoRoomError: the folder of temporary files is full.
    """
    waiting, count = list[pa.Table](), 0
    with _TemporaryFile(columns) as file:
        for piece in pieces:
            waiting.append(piece)
            count += piece.num_rows
            if count > ROWS_IN_MEMORY:
                for rows in waiting:
                    file.write(rows)
                waiting, count = [], 0
        return pa.concat_tables([columns.empty_table(), *file.tables(), *waiting])


def selected(table: pa.Table, mask: np.ndarray) -> pa.Table:
    """The rows for which an (n,) bool `mask` is true; in a temporary file if they are many, and not all."""
    count = np.count_nonzero(mask)
    if count == table.num_rows:
        return table
    if count <= ROWS_IN_MEMORY:
        return table.filter(pa.array(mask))
    starts = range(0, table.num_rows, ROWS_IN_MEMORY)
    pieces = (table.slice(at, ROWS_IN_MEMORY).filter(pa.array(mask[at : at + ROWS_IN_MEMORY])) for at in starts)
    return stored_table(pieces, table.schema)


def sorted_table(batches: Iterable[pa.RecordBatch], columns: pa.Schema, name: str) -> pa.Table:
    """The rows of some batches, sorted by a column of text as bytes; rows with the same text stay in their order.

    Stores list most folders in order, and several folders at once: whole batches are put in order, and only rows whose batches
    overlap are sorted. What is in memory at a time does not depend on the number of rows.

    Args:
        batches: they are given up as they are read.
        columns: their schema.
        name: the column.

    Raises:
        NoRoomError: the folder of temporary files is full.
    """
    waiting, count = list[pa.RecordBatch](), 0
    with _TemporaryFile(columns) as file:
        for batch in batches:
            if batch.num_rows:
                waiting.append(batch)
                count += batch.num_rows
            if count > ROWS_IN_MEMORY:
                for rows in _in_order(waiting, columns, name):
                    file.write(rows)
                waiting, count = [], 0
        rest = list(_in_order(waiting, columns, name))
        if not file.written:
            return pa.concat_tables([columns.empty_table(), *rest])
        for rows in rest:
            file.write(rows)
        chunks = file.tables()
    return _merged(chunks, columns, name)


def _in_order(batches: list[pa.RecordBatch], columns: pa.Schema, name: str) -> Iterator[pa.Table]:
    """The rows of some batches in the order of a column, in chunks."""
    order = sorted(range(len(batches)), key=lambda number: _first(batches[number], name))
    follow = all(_follows(batches[one], one, batches[other], other, name) for one, other in pairwise(order))
    if not (follow and all(schema.is_sorted(pa.chunked_array([batch[name]])) for batch in batches)):
        yield from _tables(schema.sort_rows(pa.Table.from_batches(batches, columns), name, _ROWS_OF_CHUNK))
        return
    taken, rows = list[pa.RecordBatch](), 0
    for number in order:
        if taken and rows + batches[number].num_rows > _ROWS_OF_CHUNK:
            yield pa.Table.from_batches(taken, columns).combine_chunks()
            taken, rows = [], 0
        taken.append(batches[number])
        rows += batches[number].num_rows
    if taken:
        yield pa.Table.from_batches(taken, columns).combine_chunks()


def _follows(rows: _Rows, number: int, others: _Rows, place: int, name: str) -> bool:
    """Whether all rows of the second one belong behind those of the first; of the same text, those that came later do."""
    last, first = _last(rows, name), _first(others, name)
    return last < first or (last == first and number < place)


def _merged(chunks: Sequence[pa.Table], columns: pa.Schema, name: str) -> pa.Table:
    """Chunks, each in order, as one table in order: what no other chunk overlaps stays in its file."""
    order = sorted(range(len(chunks)), key=lambda number: _first(chunks[number], name))
    groups, last = list[list[int]](), ""
    for number in order:
        first = _first(chunks[number], name)
        if groups and (first < last or (first == last and number < max(groups[-1]))):
            groups[-1].append(number)
        else:
            groups.append([number])
        last = max(last, _last(chunks[number], name))
    places: list[int | slice] = []
    with _TemporaryFile(columns) as file:
        for group in groups:
            if len(group) == 1:
                places.append(group[0])
                continue
            start = file.written
            for rows in _overlapping([chunks[number] for number in sorted(group)], name):
                file.write(rows)
            places.append(slice(start, file.written))
        merged = file.tables()
    found = [[chunks[place]] if isinstance(place, int) else merged[place] for place in places]
    return pa.concat_tables([columns.empty_table(), *(table for tables in found for table in tables)])


def _overlapping(chunks: Sequence[pa.Table], name: str) -> Iterator[pa.Table]:
    """The rows of chunks that overlap, each in order, in order: some range of the column after the other."""
    rows = sum(chunk.num_rows for chunk in chunks)
    firsts = sorted(_first(chunk, name) for chunk in chunks)
    bounds = firsts[:: max(1, len(chunks) * ROWS_IN_MEMORY // (2 * rows))][1:]
    ranges: list[list[tuple[int, int, int]]] = [[] for _ in range(len(bounds) + 1)]
    for number, chunk in enumerate(chunks):
        first, last = bisect_right(bounds, _first(chunk, name)), bisect_right(bounds, _last(chunk, name))
        text = chunk[name].chunk(0)
        inside = [bisect_left(text, bound, key=_as_text) for bound in bounds[first:last]]
        for place, (start, end) in enumerate(pairwise([0, *inside, chunk.num_rows]), first):
            ranges[place].append((number, start, end))
    for pieces in filter(None, ranges):
        whole = pa.concat_tables(chunks[number].slice(start, end - start) for number, start, end in pieces)
        yield from _tables(schema.sort_rows(whole, name, _ROWS_OF_CHUNK))


def _tables(table: pa.Table) -> Iterator[pa.Table]:
    """The chunks of a table, each as a table."""
    return (pa.Table.from_batches([batch]) for batch in table.to_batches() if batch.num_rows)


def _first(rows: _Rows, name: str) -> str:
    return str(rows[name][0].as_py())


def _last(rows: _Rows, name: str) -> str:
    return str(rows[name][-1].as_py())


class _TemporaryFile:
    """Tables of one schema in a file without a name, which ends with the tables that lie in it; `written` is their number."""

    def __init__(self, columns: pa.Schema) -> None:
        self._columns = columns
        self._ends = [0]
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def written(self) -> int:
        return len(self._ends) - 1

    def write(self, rows: pa.Table) -> None:
        """Write a table; one without rows is left out."""
        if not rows.schema.equals(self._columns):
            raise ValueError(f"the columns are {rows.schema.names} and not {self._columns.names}, or of other types")
        for batch in rows.combine_chunks().to_batches():
            data = batch.serialize()
            self._ends.append(self._ends[-1] + data.size)
            with full_disk_is_said(f"a list of objects takes {self._ends[-1]:,} bytes so far, and more is to come"):
                self._file = self._file or temporary_file()
                self._file.write(data)
                self._file.flush()

    def tables(self) -> list[pa.Table]:
        """What was written, as tables whose columns lie in the file."""
        if self._file is None or not self.written:
            return []
        whole = mapped(self._file)
        pieces = (whole.slice(start, end - start) for start, end in pairwise(self._ends))
        return [pa.Table.from_batches([pa.ipc.read_record_batch(piece, self._columns)]) for piece in pieces]
