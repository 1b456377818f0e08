"""A Parquet file with a column of image bytes -> its images."""

from __future__ import annotations

import io
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from tlbatch.errors import ErrorKind
from tlbatch.images.shards import (
    BUFFER_BYTES,
    IMAGE_FIELDS,
    KEY_FIELDS,
    ShardImages,
    ShardOptions,
    TornShardError,
    damage_as_torn_shard,
)

_ROWS_AT_ONCE = 32
#: Largest size in bytes of a Parquet file whose row groups are read in one piece.
_READ_AT_ONCE = 32 << 20


def read_parquet(file: IO[bytes], wanted: ShardOptions) -> ShardImages:
    """Read a column of bytes, or of Hugging Face's struct of bytes and path.

    The key is the path in the struct, or else a column with a usual name, or else the shard's key and the row number.
    """
    with damage_as_torn_shard():
        # A large file is read page by page, because one row group may be the whole file. A small file is not: in that mode
        # Arrow trusts the page size in the header, and fills 2 GB with zeros for a damaged file of 2 KB.
        buffer = BUFFER_BYTES if file.seek(0, io.SEEK_END) > _READ_AT_ONCE else 0
        parquet = pq.ParquetFile(file, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True)
        schema = parquet.schema_arrow
        image = _image_column(schema, wanted.field)
        names = [name for name in KEY_FIELDS if name in schema.names and pa.types.is_string(schema.field(name).type)][:1]
        # One row group at a time, so that damage in one group does not lose rows of the group before it.
        batches = (parquet.iter_batches(_ROWS_AT_ONCE, [group], [image, *names]) for group in range(parquet.num_row_groups))
        rows = (row for group in batches for batch in group for row in batch.to_pylist())
        for position, row in enumerate(rows):
            value = row[image] if isinstance(row[image], dict) else {"bytes": row[image]}
            key = value.get("path") or (row[names[0]] if names else None) or f"{wanted.key}/{position:08d}"
            yield str(key), wanted.limited(value["bytes"])


def _image_column(schema: pa.Schema, asked: str | None) -> str:
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    if asked is not None:
        candidates = [name for name in candidates if name == asked]
    if not candidates:
        missing = f"no column {asked!r} of bytes" if asked else "no column of bytes"
        raise TornShardError(f"the file has {missing}; its columns are {', '.join(schema.names)}", ErrorKind.UNSUPPORTED)
    return next((name for name in IMAGE_FIELDS if name in candidates), str(candidates[0]))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
