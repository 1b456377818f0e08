"""Inventories as S3 writes them: `manifest.json`, its checksum, and data files of each format."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pyarrow import orc

KINDS = ("CSV", "ORC", "Parquet")
CREATED = datetime(2026, 11, 28, 1, tzinfo=UTC)
#: Columns: their names in CSV files, in the other files, and their types.
_COLUMNS: list[tuple[str, str, pa.DataType]] = [
    ("Bucket", "bucket", pa.string()),
    ("Key", "key", pa.string()),
    ("VersionId", "version_id", pa.string()),
    ("IsLatest", "is_latest", pa.bool_()),
    ("IsDeleteMarker", "is_delete_marker", pa.bool_()),
    ("Size", "size", pa.int64()),
    ("LastModifiedDate", "last_modified_date", pa.timestamp("ms")),
    ("ETag", "e_tag", pa.string()),
    ("StorageClass", "storage_class", pa.string()),
]
_OF_VERSIONS = ("version_id", "is_latest", "is_delete_marker")
#: What one configures for an inventory of current versions.
FIELDS = tuple(name for _, name, _ in _COLUMNS if name not in _OF_VERSIONS)
ALL_VERSIONS = tuple(name for _, name, _ in _COLUMNS)


def table_of(bucket: str, objects: Sequence[dict[str, Any]], fields: Sequence[str] = FIELDS) -> pa.Table:
    """Rows with the usual values where an object has none of its own."""
    usual = {
        "bucket": bucket,
        "version_id": None,
        "is_latest": True,
        "is_delete_marker": False,
        "last_modified_date": CREATED.replace(tzinfo=None),
        "storage_class": "STANDARD",
    }
    wanted = pa.schema([(name, kind) for _, name, kind in _COLUMNS if name in fields])
    return pa.Table.from_pylist([{**usual, **one} for one in objects], wanted)


def data_file(rows: pa.Table, kind: str) -> bytes:
    """Rows as the bytes of a data file."""
    buffer = io.BytesIO()
    if kind == "Parquet":
        pq.write_table(rows, buffer, row_group_size=1 << 16, compression="snappy")
    elif kind == "ORC":
        orc.write_table(rows, buffer, compression="zlib")
    else:
        keys = pa.array([quote_plus(key, safe="/") for key in rows["key"].to_pylist()], pa.string())
        rows = rows.set_column(rows.column_names.index("key"), "key", keys)
        pacsv.write_csv(rows, buffer, pacsv.WriteOptions(include_header=False, quoting_style="all_valid"))
        return gzip.compress(buffer.getvalue(), 5, mtime=0)
    return buffer.getvalue()


def schema_text(rows: pa.Table, kind: str) -> str:
    """`fileSchema`, which only readers of CSV files need."""
    if kind == "CSV":
        return ", ".join(name for name, other, _ in _COLUMNS if other in rows.column_names)
    return f"struct<{','.join(rows.column_names)}>" if kind == "ORC" else f"message s3.inventory {{ {rows.column_names} }}"


def write_inventory(
    put: Callable[[str, bytes], object],
    tables: Sequence[pa.Table],
    kind: str,
    bucket: str,
    destination: str,
    created: datetime = CREATED,
    root: str = "inventory/photos/daily",
    **changes: Any,
) -> str:
    """Write an inventory, one data file a table; returns its address.

    Args:
        put: stores bytes under a key of the destination bucket.
        tables: the rows of each data file.
        kind: the format of the data files.
        bucket: the bucket that the inventory is of.
        destination: the bucket that it lies in.
        created: when S3 began to make it.
        root: the folder that it lies in.
        changes: other values for fields of the manifest.
    """
    files = []
    for number, rows in enumerate(tables):
        key, data = f"{root}/data/{number:04d}.{ {'CSV': 'csv.gz'}.get(kind, kind.lower()) }", data_file(rows, kind)
        put(key, data)
        files.append({"key": key, "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()})
    manifest = {
        "sourceBucket": bucket,
        "destinationBucket": f"arn:aws:s3:::{destination}",
        "version": "2016-11-30",
        "creationTimestamp": str(int(created.timestamp() * 1000)),
        "fileFormat": kind,
        "fileSchema": schema_text(tables[0], kind) if tables else "Bucket, Key",
        "files": files,
        **changes,
    }
    folder = f"{root}/{created:%Y-%m-%dT%H-%MZ}"
    data = json.dumps(manifest, indent=2).encode()
    put(f"{folder}/manifest.json", data)
    put(f"{folder}/manifest.checksum", hashlib.md5(data).hexdigest().encode())
    return f"s3://{destination}/{folder}/manifest.json"
