"""A few objects' bytes -> what names do not tell: the format of objects with an unknown suffix, and shards without images."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.errors import StoreError
from tlbatch.images.members import may_hold_images
from tlbatch.images.names import formats, suffix
from tlbatch.images.tfrecord import masked_crc
from tlbatch.schema import ARCHIVED, IMAGE, PARQUET, TAR, TFRECORD, ZIP
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import open_range_file

#: Bytes at the beginning of an object that show its format.
_HEAD = 1024
#: Unknown suffixes of which an object is looked at, the most common ones.
_MOST_SUFFIXES = 16
#: Parquet files and zips whose ends are read if other objects are beside them. With more, all are taken for shards.
_MOST_FOOTERS, _READERS = 256, 16

#: The location of an object by its uri.
Locate = Callable[[str], Location]


def with_formats_of_content(manifest: pa.Table, locate: Locate) -> pa.Table:
    """Judge objects with an unknown suffix, taken as images so far, by the content of one object of each suffix.

    Raises:
        StoreError: the only object is a document and not an image, a shard or a list.
    """
    unknown = pc.and_(pc.equal(manifest["format"], IMAGE), pc.is_null(formats(manifest["key"].combine_chunks())))
    numbers = np.flatnonzero(unknown.to_numpy())
    if not len(numbers):
        return manifest
    suffixes = [suffix(key) for key in manifest["key"].take(numbers).to_pylist()]
    found = manifest["format"].to_pylist()
    asked = {ending for ending, _ in Counter(suffixes).most_common(_MOST_SUFFIXES)}
    formats_of: dict[str, str] = {}
    for number, ending in zip(numbers.tolist(), suffixes, strict=True):
        if ending in asked and ending not in formats_of:
            formats_of[ending] = _format_of(locate(manifest["uri"][number].as_py()), alone=manifest.num_rows == 1)
        found[number] = formats_of.get(ending, IMAGE)
    if set(formats_of.values()) <= {IMAGE}:
        return manifest
    return manifest.set_column(manifest.column_names.index("format"), "format", pa.array(found, pa.string()))


def _format_of(location: Location, *, alone: bool) -> str:
    try:
        head = location.fetch(0, _HEAD)
    except OSError:
        return IMAGE  # the run reads it again, with retries, and its row has the reason
    if alone and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        kind = "a manifest of S3 Inventory, which is" if b"fileSchema" in location.fetch(0, 1 << 16) else "a JSON document,"
        raise StoreError(
            f"The store {location.url} is {kind} not an image, a shard or a list; lists are CSV, text, or Parquet with a "
            "column uri."
        )
    return format_of_content(head) or IMAGE


def format_of_content(head: bytes) -> str | None:
    """The format of a shard by its first kilobyte; None if it is no shard."""
    if head.startswith(b"\x1f\x8b"):
        head = zlib.decompressobj(wbits=31).decompress(head, _HEAD)
    if head.startswith(b"PAR1"):
        return PARQUET
    if head.startswith(b"PK\3\4"):
        return ZIP
    if head[257:262] == b"ustar":
        return TAR
    if len(head) >= 16 and head[4:8] == b"\0\0\0\0" and masked_crc(head[:8]) == head[8:12]:
        return TFRECORD
    return None


def without_metadata(manifest: pa.Table, locate: Locate) -> tuple[pa.Table, int]:
    """The manifest without Parquet files that only describe the images beside them, and their number.

    img2dataset writes `00000.parquet` beside `00000.tar`, and ImageFolder reads `metadata.parquet` beside images. If a store
    has nothing but Parquet files, all of them are shards.
    """
    is_parquet = pc.equal(manifest["format"], PARQUET).to_numpy()
    others = ~is_parquet & pc.not_equal(manifest["format"], ARCHIVED).to_numpy()
    if not is_parquet.any() or not others.any():
        return manifest, 0
    numbers = np.flatnonzero(is_parquet)
    keys = manifest["key"].take(numbers)
    tars = pc.replace_substring_regex(manifest["key"].filter(pa.array(others)), r"\.(tar|tar\.gz|tgz)$", "")
    beside_tar = pc.is_in(pc.replace_substring_regex(keys, r"\.parquet$", ""), tars).to_numpy()
    unsure = numbers[~beside_tar]
    described = np.zeros(manifest.num_rows, bool)
    described[numbers[beside_tar]] = True
    if len(unsure) <= _MOST_FOOTERS:
        described[unsure] = _without_images(manifest, unsure, PARQUET, locate)
    return manifest.filter(pa.array(~described)), int(described.sum())


def without_other_zips(manifest: pa.Table, locate: Locate) -> tuple[pa.Table, int]:
    """The manifest without zips in which no member is named like an image, and their number, if other objects remain."""
    numbers = np.flatnonzero(pc.equal(manifest["format"], ZIP).to_numpy())
    if not len(numbers) or len(numbers) > _MOST_FOOTERS:
        return manifest, 0
    others = np.zeros(manifest.num_rows, bool)
    others[numbers] = _without_images(manifest, numbers, ZIP, locate)
    return (manifest, 0) if others.all() else (manifest.filter(pa.array(~others)), int(others.sum()))


def _without_images(manifest: pa.Table, numbers: np.ndarray, kind: str, locate: Locate) -> list[bool]:
    uris, sizes = (manifest[name].take(numbers).to_pylist() for name in ("uri", "size"))
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda uri, size: _lacks_images(locate(uri), size, kind), uris, sizes))


def _lacks_images(location: Location, size: int | None, kind: str) -> bool:
    """Whether a shard holds no images (`may_hold_images`); False if it cannot be read, so that its row has the reason."""
    try:
        if size is None:
            return False
        with open_range_file(location, size) as file:
            return not may_hold_images(kind, io.BufferedReader(file))
    except OSError:
        return False
