"""Rows of a table -> small pictures of their images, for pages that a person looks at; read from the store again."""

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
from tlbatch.schema import IMAGE

#: An image's uri and key.
Name = tuple[str, str]
#: Images read at once. The store is waited for, and decoding lets other threads run.
_AT_ONCE = 16


def load_thumbnails(
    runs: Sequence[Run],
    names: Iterable[Name],
    storage_options: Mapping[str, Any],
    *,
    side: int,
    shard_bytes: int | None = None,
) -> dict[Name, str]:
    """Data URLs of small JPEGs; what cannot be read any more, or has changed, is not among them.

    Args:
        runs: those that make up the table, the oldest first.
        names: which images.
        storage_options: fsspec's options for the store.
        side: pixels of a picture's longer side.
        shard_bytes: shards are read from their beginning, until the images are found or so many bytes were read.
    """
    wanted: dict[str, set[str]] = {}
    for uri, key in names:
        wanted.setdefault(uri, set()).add(key)
    if not wanted:
        return {}
    promised = read_manifest_rows(runs, pa.array(wanted, pa.string()))
    reader = Reader(storage_options, requests=_AT_ONCE, image_field=runs[-1].facts["spec"].get("image_field"))
    loose = pc.equal(promised["format"], IMAGE)
    named = pc.is_in(promised["key"], pa.array({key for keys in wanted.values() for key in keys}, pa.string()))
    images = [row for row in promised.filter(pc.and_(loose, named)).to_pylist() if row["key"] in wanted[row["uri"]]]
    found = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for row, data in zip(images, pool.map(lambda row: _small(reader.image(row), side), images), strict=True):
            found[row["uri"], row["key"]] = data
    left = float("inf") if shard_bytes is None else shard_bytes
    for row in promised.filter(pc.invert(loose)).to_pylist():
        missing = set(wanted[row["uri"]])
        for member in reader.members(row) if left > 0 else ():
            left -= len(member.data) if isinstance(member.data, bytes) else 0
            if member.key in missing:
                missing.remove(member.key)
                found[row["uri"], member.key] = _small(member.data, side)
            if not missing or left <= 0:
                break
    return {name: data for name, data in found.items() if data is not None}


def _small(data: object, side: int) -> str | None:
    small = thumbnail(data, side=side) if isinstance(data, bytes) else None
    return "data:image/jpeg;base64," + base64.b64encode(small).decode() if isinstance(small, bytes) else None
