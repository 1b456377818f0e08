"""Every column and file name of an output folder: the interface that users and other programs rely on.

Changes only add: a new column raises `SCHEMA_VERSION`, and a reader of an older version still finds all it knew.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: 2: the features have the width and height of their image, so that a table made of them has them too.
SCHEMA_VERSION = 2

LATEST = "latest.json"
LEASE = "lease.json"
RUNS = "runs"
RUN = "run.json"
MANIFEST = "manifest.parquet"
REMOVED = "removed.parquet"  # beside the manifest: what the store has no more
PROGRESS = "progress.json"
BASE = "base"  # the bundle without a head that `extract --base` works with
STAGED = "staged"
PLAN = "plan"  # in staged/: which parts are published
SUSPECTS = "suspects"  # in staged/: which image a worker is alone with, while the run looks for one that kills
PART_SUFFIX, RECEIPT_SUFFIX = ".parquet", ".json"
REPORT = "report.json"
REPORT_PAGE = "report.html"
SUCCESS = "_SUCCESS"
KEPT_BACK = "_KEPT_BACK"  # beside _SUCCESS: complete, and not published because of `promote_if`

#: Height and width, in this order, as Keras has them.
Size = tuple[int, int]

#: Behind a bundle's address: which bundle must be found there, by the sha256 of its `bundle.json`.
PIN = "#sha256="

#: How pixels are resized, as the bundle records it: the whole picture squeezed to the model's size, as Keras does it.
RESIZE = "stretch"
INTERPOLATION = "bilinear"


def part_name(number: int) -> str:
    """File name of the `number`-th published part of a table."""
    return f"part-{number:05d}.parquet"


def _versioned(fields: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def _list_of(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value))  # the name Parquet gives it, so that a table read back has this schema


#: What a run promises to classify, one row an object, in the order of their keys. A row's place with an image's place in its
#: shard is the image's identity within the run. `format` is image, tar, parquet or tfrecord; a list of addresses may tell
#: neither size nor etag.
MANIFEST_SCHEMA = _versioned(
    [
        ("uri", pa.string()),
        ("key", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("format", pa.string()),
    ]
)

#: Objects that a night's run takes from the table, by uri and key.
REMOVED_SCHEMA = pa.schema([("uri", pa.string()), ("key", pa.string())])

#: width and height are those a person sees: pixels of the original, EXIF orientation applied.
PREDICTIONS = _versioned(
    [
        ("uri", pa.string()),
        ("key", pa.string()),
        ("label", pa.string()),
        ("score", pa.float32()),
        ("top_labels", _list_of(pa.string())),
        ("top_scores", _list_of(pa.float32())),
        ("abstained", pa.bool_()),
        ("etag", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bundle", pa.string()),
        ("run_id", pa.string()),
    ]
)

ERRORS = _versioned(
    [
        ("uri", pa.string()),
        ("key", pa.string()),
        ("stage", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
        ("transient", pa.bool_()),
        ("etag", pa.string()),
        ("run_id", pa.string()),
    ]
)


def features_schema(length: int, dtype: str) -> pa.Schema:
    """Schema of the features table: vectors of `length` numbers, `dtype` float16 or float32."""
    value = pa.float16() if dtype == "float16" else pa.float32()
    return _versioned(
        [
            ("uri", pa.string()),
            ("key", pa.string()),
            ("etag", pa.string()),
            ("features", pa.list_(pa.field("element", value), length)),
            ("base", pa.string()),
            ("run_id", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
        ]
    )


#: What one image's row gains on its way. `row` is its place in the manifest, `index` its place in a shard (0 for a
#: loose image). An image has either a `kind` or its results, never both.
_OUTCOME: list[tuple[str, pa.DataType]] = [
    ("row", pa.int64()),
    ("index", pa.int32()),
    ("uri", pa.string()),
    ("key", pa.string()),
    ("etag", pa.string()),
    ("stage", pa.string()),
    ("kind", pa.string()),
    ("message", pa.string()),
    ("attempts", pa.int32()),
    ("transient", pa.bool_()),
    ("width", pa.int32()),
    ("height", pa.int32()),
]

#: What the head says of an image.
CLASSIFIED: list[tuple[str, pa.DataType]] = [
    ("label", pa.string()),
    ("score", pa.float32()),
    ("top_labels", _list_of(pa.string())),
    ("top_scores", _list_of(pa.float32())),
    ("abstained", pa.bool_()),
]

#: How many images this one's object holds: by it the writer knows that it has all of them. Never published.
IMAGES = "images"

#: Which of a run's tables a row is for, where one pass over the images fills several. Never published.
TABLE = "table"

#: Seconds this image cost in each stage; predict is its share of a batch. Summed into the receipt, never published.
TIMINGS = ("fetch", "decode", "predict")


def outcome_schema(*, classified: bool, features_length: int | None, features_dtype: str) -> pa.Schema:
    """Schema of the rows between the model and the writer, with the columns this run asked for."""
    fields = list(_OUTCOME)
    if classified:
        fields += CLASSIFIED
    if features_length is not None:
        fields.append(("features", features_schema(features_length, features_dtype).field("features").type))
    fields.append((IMAGES, pa.int32()))
    fields += [(f"{stage}_seconds", pa.float32()) for stage in TIMINGS]
    return pa.schema(fields)


def sha256(data: bytes) -> str:
    """Hex digest, as everything tlbatch writes records it."""
    return hashlib.sha256(data).hexdigest()


def to_parquet(table: pa.Table) -> bytes:
    """A Parquet file; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer, compression="zstd", row_group_size=65_536)
    return buffer.getvalue()


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The inverse of `to_parquet`."""
    return pq.read_table(pa.BufferReader(data), columns=columns)


def seal(body: Mapping[str, Any]) -> bytes:
    """JSON with a last key `seal`, the digest of all before it, so that a flipped bit shows."""
    return json.dumps({**body, "seal": sha256(json.dumps(body).encode())}, indent=1).encode()


def unseal(data: bytes) -> dict[str, Any] | None:
    """The body `seal` was given; None where the bytes are not exactly those it made."""
    try:
        body = json.loads(data)
        del body["seal"]
        return body if data == seal(body) else None
    except (ValueError, KeyError, TypeError):
        return None


IMAGE, TAR, PARQUET, TFRECORD = "image", "tar", "parquet", "tfrecord"
