"""A file that lists addresses -> the objects it names: CSV or Parquet with a column `uri`, or lines of text."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from tlbatch.errors import StoreError, line_of
from tlbatch.images.names import suffix
from tlbatch.storage.location import Location, ObjectInfo
from tlbatch.storage.range_file import RangeFile, open_range_file

#: Columns of a list; all but the first are optional.
LIST_COLUMNS = ("uri", "key", "size", "etag")
_LIST_SUFFIXES = (".csv", ".txt", ".parquet")
#: Rows of a list that are in memory at a time, and bytes of a CSV file.
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1 << 16, 1 << 20


def is_list(key: str) -> bool:
    """Whether an object, by its name, may be a list of addresses."""
    return suffix(key) in _LIST_SUFFIXES


def read_list(location: Location, info: ObjectInfo) -> Iterator[pa.RecordBatch] | None:
    """The objects in a list of addresses, some at a time; None for a Parquet file that contains images itself.

    An address without a protocol is a path relative to the folder of the list. `key`, `size` and `etag` are optional columns.
    Without a column `key`, the address as written is the key.

    Raises:
        StoreError: the list cannot be parsed; also while it is read.
    """
    file = open_range_file(location, info.size)
    if suffix(info.key) == ".parquet" and not _has_addresses(location, file):
        return None
    return _objects(location, file, suffix(info.key))


def _has_addresses(location: Location, file: RangeFile) -> bool:
    try:
        return "uri" in pq.ParquetFile(file).schema_arrow.names
    except pa.ArrowException as error:
        raise _not_parsed(location, error) from None


def _objects(location: Location, file: RangeFile, kind: str) -> Iterator[pa.RecordBatch]:
    parse = {".parquet": _of_parquet, ".csv": _of_csv, ".txt": _of_lines}[kind]
    folder, without = location.url.rsplit("/", 1)[0], 0
    try:
        with file:
            for rows in parse(location, file):
                without += rows["uri"].null_count
                if not without:
                    yield _listed(rows, folder)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _not_parsed(location, error) from None
    if without:
        raise StoreError(f"The list {location.url} has {without} rows without a uri.")


def _not_parsed(location: Location, error: Exception) -> StoreError:
    return StoreError(f"The list {location.url} cannot be parsed: {line_of(error)}.")


def _listed(rows: pa.RecordBatch, folder: str) -> pa.RecordBatch:
    """Rows of a list with all columns, and with whole addresses."""
    written = rows["uri"].cast(pa.string())
    whole = pc.or_(pc.match_substring(written, "://"), pc.starts_with(written, "/"))
    types = {"key": pa.string(), "size": pa.int64(), "etag": pa.string()}
    given = {name: rows[name].cast(kind) for name, kind in types.items() if name in rows.schema.names}
    columns = [
        pc.if_else(whole, written, pc.binary_join_element_wise(folder, written, "/")),
        pc.coalesce(given["key"], written) if "key" in given else written,
        *(given.get(name, pa.nulls(len(written), types[name])) for name in ("size", "etag")),
    ]
    return pa.RecordBatch.from_arrays(columns, names=list(LIST_COLUMNS))


def _columns_of(location: Location, names: Sequence[str]) -> list[str]:
    """The columns that are read."""
    twice = next((name for name in LIST_COLUMNS if names.count(name) > 1), None)
    if twice:
        raise StoreError(f"The list {location.url} has the column {twice} twice; keep one of them.")
    if "uri" not in names:
        raise StoreError(f"The list {location.url} has no column uri; its columns are {', '.join(names)}.")
    return [name for name in LIST_COLUMNS if name in names]


def _of_parquet(location: Location, file: RangeFile) -> Iterator[pa.RecordBatch]:
    table = pq.ParquetFile(file)
    columns = _columns_of(location, table.schema_arrow.names)
    yield from table.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False)


def _of_csv(location: Location, file: RangeFile) -> Iterator[pa.RecordBatch]:
    _require_utf8(location, file)
    try:
        columns = _columns_of(location, _csv(file).schema.names)
        file.seek(0)
        yield from _csv(file, columns)
    except pa.ArrowInvalid as error:
        raise StoreError(f"The list {location.url} is not a CSV file: {line_of(error)}.") from None


def _csv(file: RangeFile, columns: Sequence[str] = ()) -> pacsv.CSVStreamingReader:
    """The rows of a CSV file; of some columns, if they are known."""
    types = {name: pa.int64() if name == "size" else pa.string() for name in LIST_COLUMNS}
    convert = pacsv.ConvertOptions(
        column_types=types, null_values=[""], strings_can_be_null=True, include_columns=list(columns)
    )
    return pacsv.open_csv(file, pacsv.ReadOptions(use_threads=False, block_size=_BYTES_AT_ONCE), convert_options=convert)


def _of_lines(location: Location, file: RangeFile) -> Iterator[pa.RecordBatch]:
    _require_utf8(location, file)
    text = io.TextIOWrapper(io.BufferedReader(file), "utf-8-sig")  # without the byte order mark that Windows writes
    written = (line.strip() for line in text)
    filled = filter(None, written)
    while lines := list(islice(filled, _ROWS_AT_ONCE)):
        yield pa.RecordBatch.from_arrays([pa.array(lines, pa.string())], names=["uri"])


def _require_utf8(location: Location, file: RangeFile) -> None:
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise StoreError(f"The list {location.url} is in UTF-16; save it as UTF-8.")
    file.seek(0)
