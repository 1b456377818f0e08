"""A file that lists addresses -> the objects it names: CSV or Parquet with a column `uri`, or lines of text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from tlbatch.errors import StoreError, line_of
from tlbatch.images.names import suffix
from tlbatch.storage.location import Location, ObjectInfo
from tlbatch.storage.range_file import open_range_file

#: Columns of a list; all but the first are optional.
LIST_COLUMNS = ("uri", "key", "size", "etag")
_LIST_SUFFIXES = (".csv", ".txt", ".parquet")


def is_list(key: str) -> bool:
    """Whether an object, by its name, may be a list of addresses."""
    return suffix(key) in _LIST_SUFFIXES


def read_list(location: Location, info: ObjectInfo) -> pa.Table | None:
    """The objects in a list of addresses; None for a Parquet file that contains images itself.

    An address without a protocol is a path relative to the folder of the list. `key`, `size` and `etag` are optional columns.
    Without a column `key`, the address as written is the key.

    Raises:
        StoreError: the list cannot be parsed.
    """
    try:
        table = _parse(location, info)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise StoreError(f"The list {location.url} cannot be parsed: {line_of(error)}.") from None
    if table is None:
        return None
    written = table["uri"].cast(pa.string())
    if written.null_count:
        raise StoreError(f"The list {location.url} has {written.null_count} rows without a uri.")
    folder = location.url.rsplit("/", 1)[0]
    whole = pc.or_(pc.match_substring(written, "://"), pc.starts_with(written, "/"))
    columns = {
        "uri": pc.if_else(whole, written, pc.binary_join_element_wise(folder, written, "/")),
        "key": pc.coalesce(table["key"].cast(pa.string()), written) if "key" in table.column_names else written,
        "size": table["size"].cast(pa.int64()) if "size" in table.column_names else pa.nulls(len(written), pa.int64()),
        "etag": table["etag"].cast(pa.string()) if "etag" in table.column_names else pa.nulls(len(written), pa.string()),
    }
    return pa.table(columns).combine_chunks()


def _require_each_column_once(location: Location, names: Sequence[str]) -> None:
    twice = next((name for name in LIST_COLUMNS if names.count(name) > 1), None)
    if twice:
        raise StoreError(f"The list {location.url} has the column {twice} twice; keep one of them.")


def _parse(location: Location, info: ObjectInfo) -> pa.Table | None:
    if suffix(info.key) == ".parquet":
        file = pq.ParquetFile(open_range_file(location, info.size))
        if "uri" not in file.schema_arrow.names:
            return None
        _require_each_column_once(location, file.schema_arrow.names)
        return file.read([name for name in LIST_COLUMNS if name in file.schema_arrow.names], use_threads=False)
    if suffix(info.key) == ".csv":
        return _parse_csv(location)
    lines = _utf8(location).decode("utf-8-sig").splitlines()  # without the byte order mark that Windows writes
    return pa.table({"uri": pa.array([line.strip() for line in lines if line.strip()], pa.string())})


def _utf8(location: Location) -> bytes:
    """A file that is not in UTF-16."""
    data = location.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise StoreError(f"The list {location.url} is in UTF-16; save it as UTF-8.")
    return data


def _parse_csv(location: Location) -> pa.Table:
    types = {**dict.fromkeys(("uri", "key", "etag"), pa.string()), "size": pa.int64()}
    text = pacsv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    try:
        table = pacsv.read_csv(pa.BufferReader(_utf8(location)), convert_options=text)
    except pa.ArrowInvalid as error:
        raise StoreError(f"The list {location.url} is not a CSV file: {line_of(error)}.") from None
    if "uri" not in table.column_names:
        raise StoreError(f"The list {location.url} has no column uri; its columns are {', '.join(table.column_names)}.")
    _require_each_column_once(location, table.column_names)
    return table
