"""A few objects' bytes -> what names do not tell: the format of objects with an unknown suffix, and shards without images."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.errors import StoreError
from tlbatch.images.members import may_hold_images
from tlbatch.images.names import formats, kind_of_name
from tlbatch.images.tfrecord import RIEGELI, masked_crc
from tlbatch.schema import IMAGE, PARQUET, TAR, TFRECORD, ZIP
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import open_range_file
from tlbatch.storage.temporary_rows import selected

#: Bytes at the beginning of an object that show its format.
_HEAD = 1024
#: Unknown suffixes of which an object is looked at, the most common ones.
_MOST_SUFFIXES = 16
#: Shards without images, and the kind under which they are counted.
_WITHOUT_IMAGES = {TAR: "tar without images", PARQUET: "Parquet without images", ZIP: "zip without images"}
#: Shards with names like each other that are looked into; if these agree, the others are taken to be like them.
_MOST_ALIKE, _READERS = 16, 16
#: Bytes that are read of a shard at a time to look into it.
_PIECE = 1 << 20

#: The location of an object by its uri.
Locate = Callable[[str], Location]


def with_formats_of_content(manifest: pa.Table, locate: Locate) -> pa.Table:
    """Judge objects with an unknown suffix, taken as images so far, by the content of one object of each suffix.

    Raises:
        StoreError: the only object is a document and not an image, a shard or a list.
    """
    is_unknown = [pc.is_null(formats(keys)) for keys in manifest["key"].chunks]
    unknown = pc.and_(pc.equal(manifest["format"], IMAGE), pa.chunked_array(is_unknown, pa.bool_()))
    numbers = np.flatnonzero(unknown.to_numpy())
    if not len(numbers):
        return manifest
    suffixes = [kind_of_name(key) for key in manifest["key"].filter(unknown).to_pylist()]
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
        if b"fileSchema" in location.fetch(0, 1 << 16):
            raise StoreError(f"The store {location.url} seems to be the manifest of an S3 Inventory: name it manifest.json.")
        raise StoreError(
            f"The store {location.url} is a JSON document, not an image, a shard or a list; lists are CSV, text, or Parquet "
            "with a column uri."
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
    if head.startswith(RIEGELI):
        return TFRECORD  # whose reader says what it is
    if len(head) >= 16 and head[4:8] == b"\0\0\0\0" and masked_crc(head[:8]) == head[8:12]:
        return TFRECORD
    return None


def without_other_shards(manifest: pa.Table, locate: Locate, field: str | None) -> tuple[pa.Table, Counter[str]]:
    """The manifest without shards that hold no images, and their number by kind; as it is if no other object would remain.

    img2dataset writes `00000.parquet` beside `00000.tar`, ImageFolder reads `metadata.parquet` beside images, and archives of
    annotations lie beside archives of images. What is inside decides, never a name alone.

    Args:
        manifest: the objects.
        locate: gives the location of a uri.
        field: column or feature with the images, or extension of the members, if not the usual ones.
    """
    is_shard = pc.is_in(manifest["format"], pa.array([*_WITHOUT_IMAGES]))
    numbers, shards = np.flatnonzero(is_shard.to_numpy()), manifest.filter(is_shard)
    alike = _alike(shards, numbers)
    if not alike or (len(alike) == 1 and len(numbers) == manifest.num_rows):
        return manifest, Counter()
    some = [one[np.unique(np.linspace(0, len(one) - 1, min(len(one), _MOST_ALIKE)).astype(np.int64))] for one in alike]
    lacks = np.zeros(manifest.num_rows, bool)

    def look_into(which: np.ndarray) -> None:
        rows = shards.select(["uri", "size", "format"]).take(np.searchsorted(numbers, which)).to_pylist()
        with ThreadPoolExecutor(_READERS) as pool:
            lacks[which] = list(pool.map(partial(_lacks_images, locate, field), rows))

    look_into(np.concatenate(some))
    mixed = [numbers[:0]]
    for every, first in zip(alike, some, strict=True):
        if lacks[first].all() or not lacks[first].any():
            lacks[every] = lacks[first[0]]
        else:
            mixed.append(np.setdiff1d(every, first))
    look_into(np.concatenate(mixed))
    if lacks.all():
        return manifest, Counter()
    dropped = manifest["format"].filter(pa.array(lacks)).to_pylist()
    return selected(manifest, ~lacks), Counter(_WITHOUT_IMAGES[kind] for kind in dropped)


def _alike(shards: pa.Table, numbers: np.ndarray) -> list[np.ndarray]:
    """The `numbers` of shards, one array for the shards of a format whose names differ only in numbers, hexadecimal or not."""
    if not len(numbers):
        return []
    names = pc.replace_substring_regex(shards["key"], "[0-9a-f-]*[0-9][0-9a-f-]*", "0")
    joined = pc.binary_join_element_wise(shards["format"], names, "/").combine_chunks()
    codes = joined.dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    return np.split(numbers[order], np.flatnonzero(np.diff(codes[order])) + 1)


def _lacks_images(locate: Locate, field: str | None, row: Mapping[str, Any]) -> bool:
    """Whether a shard holds no images (`may_hold_images`); False if it cannot be read, so that its row has the reason."""
    try:
        if row["size"] is None:
            return False
        with open_range_file(locate(row["uri"]), row["size"], _PIECE) as file:
            return not may_hold_images(row["format"], io.BufferedReader(file), field)
    except OSError:
        return False
