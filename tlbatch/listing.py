"""Stage 1: a store -> the manifest, the frozen list of images a run promises to classify."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from tlbatch.errors import StoreError
from tlbatch.schema import MANIFEST_SCHEMA
from tlbatch.storage import ObjectInfo, Place, require_folder

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))

#: Rows a listing holds as Python objects before they become Arrow, a tenth of the size.
_ROWS_PER_BATCH = 65_536


@dataclass(frozen=True)
class Listing:
    """What a store holds: the manifest, and how many objects were passed over."""

    manifest: pa.Table
    skipped: int


class Selection:
    """Which objects of a store are images to classify.

    A pattern without a slash is held against the object's name, one with a slash against its whole key; `*` also
    matches slashes. Without `include`, the known image suffixes decide.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self._include = [_matcher(glob) for glob in include]
        self._exclude = [_matcher(glob) for glob in exclude]

    def takes(self, key: str) -> bool:
        """Whether the object of this key belongs in the manifest."""
        if any(matches(key) for matches in self._exclude):
            return False
        if self._include:
            return any(matches(key) for matches in self._include)
        return suffix(key) in IMAGE_SUFFIXES


def _matcher(glob: str) -> Callable[[str], object]:
    pattern = re.compile(fnmatch.translate(glob))
    if "/" in glob:
        return pattern.match
    return lambda key: pattern.match(key.rsplit("/", 1)[-1])


def suffix(key: str) -> str:
    """The lower-case suffix of a key's last part, with its dot; empty where there is none."""
    name = key.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else ""


def list_store(store: Place, selection: Selection, *, avoid: Place | None = None, max_images: int | None = None) -> Listing:
    """List a store once and freeze what it holds.

    Args:
        store: a folder with images at any depth, or one image.
        selection: which objects are taken; the others are counted.
        avoid: a folder not to list, the output when it lies inside the store.
        max_images: take only the first so many keys, for a trial.

    Returns:
        The manifest, sorted by key as bytes (the order S3 lists in, so that a store copied there gives the same rows).

    Raises:
        StoreError: the store does not exist, may not be read, or holds no image.
    """
    require_folder(store)
    passed: Counter[str] = Counter()
    try:
        manifest = _to_manifest(_taken(_objects(store, avoid), selection, passed))
    except PermissionError as error:
        raise StoreError(f"The store {store.url} may not be listed: {error}.") from None
    if not manifest.num_rows:
        raise StoreError(f"The store {store.url} holds no image to classify{_what_else(passed)}.")
    manifest = manifest.sort_by("key")
    if max_images is not None:
        manifest = manifest.slice(0, max_images)
    return Listing(manifest.combine_chunks(), passed.total())


def _objects(store: Place, avoid: Place | None) -> Iterator[ObjectInfo]:
    single = store.info()
    if single is not None:
        yield single
        return
    inside = f"{avoid.url}/" if avoid is not None else None
    for found in store.walk():
        if inside is None or not found.uri.startswith(inside):
            yield found


def _taken(objects: Iterable[ObjectInfo], selection: Selection, passed: Counter[str]) -> Iterator[ObjectInfo]:
    for found in objects:
        if not _is_text(found.key):
            passed["name that is not UTF-8"] += 1
        elif selection.takes(found.key):
            yield found
        else:
            passed[suffix(found.key) or "no suffix"] += 1


def _is_text(key: str) -> bool:
    """Whether a name can stand in a table: a local disk may hold names that are no text at all."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_manifest(objects: Iterator[ObjectInfo]) -> pa.Table:
    batches: list[pa.RecordBatch] = []
    rows: list[tuple[str, str, int, str]] = []
    for found in objects:
        rows.append((found.uri, found.key, found.size, found.etag))
        if len(rows) == _ROWS_PER_BATCH:
            batches.append(_to_batch(rows))
            rows = []
    batches.append(_to_batch(rows))
    return pa.Table.from_batches(batches)


def _to_batch(rows: list[tuple[str, str, int, str]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ([] for _ in MANIFEST_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, MANIFEST_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=MANIFEST_SCHEMA)


def _what_else(passed: Counter[str]) -> str:
    if not passed:
        return ": it is empty"
    most = ", ".join(f"{count} {kind}" for kind, count in passed.most_common(3))
    return f": {passed.total()} other objects were passed over ({most}); --include says what to take"
