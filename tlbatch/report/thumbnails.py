"""Rows of a table -> thumbnails of their images for HTML pages; the images are read from the store again."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.images.decode import thumbnail
from tlbatch.images.reader import Reader
from tlbatch.output.run import Run
from tlbatch.output.table import read_manifest_rows
from tlbatch.schema import IMAGE, PixelRules

#: An image's uri and key.
Name = tuple[str, str]
#: Images read at the same time. Threads suffice: they wait for the store, and decoding releases Python's global lock.
_THREADS = 16


def load_thumbnails(
    runs: Sequence[Run],
    names: Iterable[Name],
    storage_options: Mapping[str, Any],
    *,
    side: int,
    shard_bytes: int | None = None,
) -> dict[Name, str]:
    """Data URLs of small JPEGs. Images that can no longer be read, or have changed, are missing from the result.

    They are decoded by the rules of the newest run, so they show what its model was given. Of images of one shard with equal
    keys, the first is shown.

    Args:
        runs: the runs that form the table, the oldest first.
        names: the images.
        storage_options: fsspec's options for the store.
        side: pixels of the longer side of a thumbnail.
        shard_bytes: most bytes of image data read from all shards together; each shard is read from its beginning.
    """
    wanted: dict[str, set[str]] = {}
    for uri, key in names:
        wanted.setdefault(uri, set()).add(key)
    if not wanted:
        return {}
    listed = read_manifest_rows(runs, pa.array(wanted, pa.string()))
    spec, rules = runs[-1].facts["spec"], PixelRules(**runs[-1].facts.get("pixel_rules", {}))
    field, exclude = spec.get("image_field"), spec.get("exclude", ())
    reader = Reader(storage_options, requests=_THREADS, image_field=field, exclude=exclude)
    loose = pc.equal(listed["format"], IMAGE)
    named = pc.is_in(listed["key"], pa.array({key for keys in wanted.values() for key in keys}, pa.string()))
    images = [row for row in listed.filter(pc.and_(loose, named)).to_pylist() if row["key"] in wanted[row["uri"]]]
    found = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for row, data in zip(images, pool.map(lambda row: as_data_url(reader.image(row), side, rules), images), strict=True):
            found[row["uri"], row["key"]] = data
    left = float("inf") if shard_bytes is None else shard_bytes
    for row in listed.filter(pc.invert(loose)).to_pylist():
        missing = set(wanted[row["uri"]])
        for member in reader.members(row) if left > 0 else ():
            left -= len(member.data) if isinstance(member.data, bytes) else 0
            if member.key in missing:
                missing.remove(member.key)
                found[row["uri"], member.key] = as_data_url(member.data, side, rules)
            if not missing or left <= 0:
                break
    return {name: data for name, data in found.items() if data is not None}


def as_data_url(data: object, side: int, rules: PixelRules) -> str | None:
    """A small JPEG of an encoded image as a data URL; None if it cannot be decoded."""
    small = thumbnail(data, side=side, rules=rules) if isinstance(data, bytes) else None
    return "data:image/jpeg;base64," + base64.b64encode(small).decode() if isinstance(small, bytes) else None
