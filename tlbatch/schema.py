"""Every column and file name of an output folder: the interface that users and other programs rely on.

Changes only add columns and files. A new column raises `SCHEMA_VERSION`, and readers of an older version keep working.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import pandas as pd

#: Version 2 adds width and height to the features table, so that a table rescored from it has them too. Version 3 adds the
#: index to the three tables.
SCHEMA_VERSION = 3
#: The manifest did not change since. Its bytes are part of the fingerprint, by which a published run is found to be the same.
_MANIFEST_VERSION = 2

LATEST = "latest.json"
LEASE = "lease.json"
RUNS = "runs"
RUN = "run.json"
MANIFEST = "manifest.parquet"
REMOVED = "removed.parquet"  # beside the manifest: objects that the store no longer has
PROGRESS = "progress.json"
BASE = "base"  # the bundle without a head that `extract --base` uses
STAGED = "staged"
PLAN = "plan"  # in staged/: which parts are published
SUSPECTS = "suspects"  # in staged/: which image a worker processes alone, while the run searches for the one that kills it
PART_SUFFIX, RECEIPT_SUFFIX, GROUP_SUFFIX = ".parquet", ".json", ".receipts"
REPORT = "report.json"
REPORT_PAGE = "report.html"
SUCCESS = "_SUCCESS"
KEPT_BACK = "_KEPT_BACK"  # beside _SUCCESS: complete, but not published because of `promote_if`

#: Height and width, in this order, as in Keras.
Size = tuple[int, int]


def in_words(size: Size) -> str:
    """A size as people write it: 160, or 200x300 (height x width)."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


#: Separates a bundle's URL from the sha256 that its `bundle.json` must have.
PIN = "#sha256="


Background = Literal["white", "black", "hidden"]


class PixelRules(NamedTuple):
    """How an image file becomes a model's pixels, as recorded in the bundle: training and inference follow the same rules.

    Attributes:
        white_level: the value that is white in samples of more than 8 bits whose file does not say it; `auto` finds it.
        color_profiles: `to_srgb` converts embedded colour profiles to sRGB; `ignored` takes the numbers as they are.
        resize: `stretch` brings the whole image to the model's input size; `crop` and `pad` keep its aspect ratio. `crop` cuts
            at whole pixels, `crop_exact` at fractions of them. `center_crop` brings the shorter side to `shorter_side` and cuts
            the middle out; `central_crop` cuts out seven eighths of each side and stretches them.
        interpolation: `bilinear`, `bicubic` and `lanczos` by Pillow, with antialiasing; `bilinear_cykooz`, which is `bilinear`
            by `cykooz_resizer`; `bilinear_pillow`, which is `bilinear` from all pixels of a JPEG; `bilinear_tensorflow` without
            antialiasing, `bilinear_tensorflow1` from the corners of pixels, `nearest`, or `bilinear_no_antialias`, which older
            bundles have.
        jpeg: the transform of JPEG's decoder: `accurate`, or `fast`, which is TensorFlow's default.
        shorter_side: for `center_crop`, in pixels.
        background: what shows where an image is transparent: `white`, `black`, or the `hidden` colours of the file.
    """

    white_level: float | Literal["auto"] = "auto"
    color_profiles: Literal["to_srgb", "ignored"] = "to_srgb"
    resize: Literal["stretch", "crop", "crop_exact", "pad", "center_crop", "central_crop"] = "stretch"
    interpolation: Literal[
        "bilinear",
        "bilinear_cykooz",
        "bilinear_pillow",
        "bilinear_tensorflow",
        "bilinear_tensorflow1",
        "bilinear_no_antialias",
        "nearest",
        "bicubic",
        "lanczos",
    ] = "bilinear"
    jpeg: Literal["accurate", "fast"] = "accurate"
    shorter_side: int | None = None
    background: Background = "white"

    @property
    def dtype(self) -> Literal["uint8", "float32"]:
        """The type of the pixels, which are from 0 to 255 in any case: TensorFlow's are not rounded after resizing."""
        return "float32" if self.interpolation in ("bilinear_tensorflow", "bilinear_tensorflow1") else "uint8"


#: The rules of a bundle that records none: it was made before there were any.
UNRECORDED_RULES = PixelRules(color_profiles="ignored")
#: The rules of a base that `train` or `extract` freezes. The defaults of the fields are those of bundles without them.
NEW_RULES = PixelRules(interpolation="bilinear_cykooz")


def part_name(number: int) -> str:
    """File name of the `number`-th published part of a table."""
    return f"part-{number:05d}.parquet"


def _versioned(fields: list[tuple[str, pa.DataType]], version: int = SCHEMA_VERSION) -> pa.Schema:
    return pa.schema(fields, metadata={"schema_version": str(version)})


def _list_of(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value))  # Parquet's name for it, so that a table that is read back has this schema


#: The objects that a run classifies, one row for each object, sorted by key. An image is identified within the run by the
#: number of its manifest row and its index in the shard. `format` is image, tar, zip, parquet, tfrecord or archived. `size`
#: and `etag` are null if a list of addresses does not give them.
MANIFEST_SCHEMA = _versioned(
    [
        ("uri", pa.string()),
        ("key", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("format", pa.string()),
    ],
    _MANIFEST_VERSION,
)


def is_loose(manifest: pa.Table) -> pa.ChunkedArray:
    """Whether each object of a manifest is an image of its own, and not a shard."""
    return pc.is_in(manifest["format"], pa.array([IMAGE, ARCHIVED]))


#: Objects that an incremental run removes from the table, by uri and key.
REMOVED_SCHEMA = pa.schema([("uri", pa.string()), ("key", pa.string())])

#: An image's place in its shard, 0 for a loose image. Names may repeat in a shard, uri and index never do. Null in files older
#: than version 3, and for a shard with failed images that was copied or rescored from such files.
INDEX = "index"
#: Unknown places are numbered from here on, which keeps the order of the images until they are published.
UNKNOWN_INDEX = -(1 << 31)

#: `width` and `height` are in pixels of the original image, after its EXIF orientation is applied.
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
        (INDEX, pa.int32()),
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
        (INDEX, pa.int32()),
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
            (INDEX, pa.int32()),
        ]
    )


#: The value that was taken as white in an image of more than 8 bits. Counted in the report, never published.
WHITE_LEVEL = "white_level"

#: Columns that every image's outcome has. `row` is the number of its manifest row, `index` its index in the shard (0 for a
#: loose image). An image has either a `kind` or results, never both.
_OUTCOME: list[tuple[str, pa.DataType]] = [
    ("row", pa.int64()),
    (INDEX, pa.int32()),
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
    (WHITE_LEVEL, pa.float64()),
]

#: The head's results for an image.
CLASSIFIED: list[tuple[str, pa.DataType]] = [
    ("label", pa.string()),
    ("score", pa.float32()),
    ("top_labels", _list_of(pa.string())),
    ("top_scores", _list_of(pa.float32())),
    ("abstained", pa.bool_()),
]

#: The number of images in this image's object, from which the writer knows whether it has all of them. Never published.
IMAGES = "images"

#: What was skipped in the shard, as JSON from kind to number, in the row of the shard's first image. Never published.
PASSED = "passed"

#: The table that a row belongs to, if one pass over the images fills several tables. Never published.
TABLE = "table"

#: The part that a row is staged in, if a block is staged as several parts. Never published.
PART = "part"

#: Seconds that this image took in each stage; predict is its share of a batch. Summed into the receipt, never published.
TIMINGS = ("fetch", "decode", "predict")


def outcome_schema(*, classified: bool, features_length: int | None, features_dtype: str) -> pa.Schema:
    """Schema of the rows between the model and the writer, with the columns that this run needs."""
    fields = list(_OUTCOME)
    if classified:
        fields += CLASSIFIED
    if features_length is not None:
        fields.append(("features", features_schema(features_length, features_dtype).field("features").type))
    fields += [(IMAGES, pa.int32()), (PASSED, pa.string())]
    fields += [(f"{stage}_seconds", pa.float32()) for stage in TIMINGS]
    return pa.schema(fields)


def sha256(data: bytes | mmap.mmap) -> str:
    """Hex digest, in the form that tlbatch records everywhere."""
    return hashlib.sha256(data).hexdigest()


#: Rows of a row group, and of a piece of a table that is in memory by itself.
ROWS_OF_GROUP = 65_536


def sort_rows(table: pa.Table, name: str, rows: int = ROWS_OF_GROUP) -> pa.Table:
    """A table sorted by a column of text as bytes, in chunks of some rows: columns may be larger than one array can be.

    An array of `string` has at most 2 GiB, one of `large_string` any size.
    """
    large = pa.schema([field.with_type(_LARGE.get(field.type, field.type)) for field in table.schema])
    whole = table.cast(large).combine_chunks()
    order = pc.sort_indices(whole[name])
    pieces = (whole.take(order.slice(start, rows)).cast(table.schema) for start in range(0, len(order), rows))
    return pa.concat_tables([table.schema.empty_table(), *pieces])


_LARGE = {pa.string(): pa.large_string()}


def is_sorted(column: pa.ChunkedArray) -> bool:
    """Whether no value of a column of text is before the one above it, as bytes."""
    return bool(pc.all(pc.less_equal(column.slice(0, len(column) - 1), column.slice(1)), min_count=0).as_py())


def to_parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file; equal tables give equal bytes."""
    buffer = io.BytesIO()
    write_parquet(table, buffer)
    return buffer.getvalue()


def parquet_sha256(table: pa.Table) -> str:
    """The digest of what `to_parquet` gives, which is not kept."""
    sink = _Digest()
    write_parquet(table, cast("IO[bytes]", sink))
    return sink.digest.hexdigest()


class _Digest:
    """A file that keeps the digest of what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: everything is digested at once."""


def write_parquet(table: pa.Table, file: IO[bytes]) -> None:
    """Write what `to_parquet` gives, a piece at a time."""
    with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
        # Chunks would show in the bytes, and all rows in one chunk may be more than the 2 GiB that it can have.
        for start in range(0, max(1, table.num_rows), ROWS_OF_GROUP):
            writer.write_table(table.slice(start, ROWS_OF_GROUP).combine_chunks(), row_group_size=ROWS_OF_GROUP)


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The inverse of `to_parquet`.

    A process in which Arrow has just started threads may abort when it ends (pyarrow 26). `pq.read_table` starts some even
    with use_threads=False.
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """A table as pandas shows it, made without Arrow's threads, as `from_parquet` says."""
    return cast("pd.DataFrame", table.to_pandas(use_threads=False))


#: The etag of a local file, in hex: modification time and size; in newer tables also the time of status change and the inode.
_LOCAL_ETAG = "^(([0-9a-f]+-[0-9a-f]+)-[0-9a-f]+)-[0-9a-f]+$"


def same_version(stored: pa.ChunkedArray, listed: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether etags of a table are those of a listing; null if either is null. Older tables have shorter etags of files."""
    found = pc.equal(stored, listed)
    if pc.all(found).as_py():
        return found
    for shorter in (r"\1", r"\2"):
        found = pc.or_(found, pc.equal(stored, pc.replace_substring_regex(listed, _LOCAL_ETAG, shorter)))
    return found


def seal(body: Mapping[str, Any]) -> bytes:
    """JSON whose last key `seal` is the digest of everything before it, so that a flipped bit is detected."""
    return json.dumps({**body, "seal": sha256(json.dumps(body).encode())}, indent=1).encode()


def unseal(data: bytes) -> dict[str, Any] | None:
    """The body that was passed to `seal`; None if the bytes are not exactly what `seal` returned."""
    try:
        body = json.loads(data)
        del body["seal"]
        return body if data == seal(body) else None
    except (ValueError, KeyError, TypeError):
        return None


IMAGE, TAR, PARQUET, TFRECORD, ZIP = "image", "tar", "parquet", "tfrecord", "zip"
#: The format of an image or shard that the store keeps in an archive: it cannot be read before it is restored.
ARCHIVED = "archived"
