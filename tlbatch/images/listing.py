"""Stage 1: a store -> the manifest, the frozen list of objects that a run classifies.

There are no requests for single objects: sizes and versions come with the listing. The listing stays in columns, which take
about a hundred bytes per object.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from tlbatch.errors import StoreError
from tlbatch.images import names
from tlbatch.images.names import glob_matcher, suffix
from tlbatch.schema import IMAGE, MANIFEST_SCHEMA
from tlbatch.storage.location import Location, ObjectInfo
from tlbatch.storage.range_file import open_range_file
from tlbatch.storage.resolve import require_folder

#: Called with the number of objects listed so far.
Progress = Callable[[int], None]

_LIST_SUFFIXES = (".csv", ".txt", ".parquet")
_LIST_COLUMNS = ("uri", "key", "size", "etag")


@dataclass(frozen=True)
class Listing:
    """The result of listing a store: the manifest, the number of skipped objects, and the duration in seconds."""

    manifest: pa.Table
    skipped: int
    seconds: float


class Selection:
    """Decides which objects of a store are classified, and the format of each.

    A glob without a slash is matched with the object's name, a glob with a slash with the whole key; `*` also matches slashes.
    Without `include`, objects with a known suffix of images or shards are taken. With a `kind` other than auto, every object
    has that format.

    Args:
        include: globs of objects to take, instead of the known suffixes.
        exclude: globs of objects to skip.
        kind: auto, images, tar, parquet, tfrecord or zip.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = (), kind: str = "auto") -> None:
        self._include = [glob_matcher(glob) for glob in include]
        self._exclude = [glob_matcher(glob) for glob in exclude]
        self._kind = kind

    def formats(self, keys: pa.Array, *, named: bool) -> pa.Array:
        """The format of each key's object, null if it is skipped; objects that the user `named` need no known suffix."""
        if self._kind == "auto":
            formats = names.formats(keys)
            if self._include or named:
                formats = pc.fill_null(formats, IMAGE)
        else:
            formats = pa.array([self._kind.removesuffix("s")] * len(keys), pa.string())
        if self._include or self._exclude:
            chosen = pa.array([self._chooses(key) for key in keys.to_pylist()], pa.bool_())
            formats = pc.if_else(chosen, formats, pa.scalar(None, pa.string()))
        return formats

    def _chooses(self, key: str) -> bool:
        if any(matches(key) for matches in self._exclude):
            return False
        return not self._include or any(matches(key) for matches in self._include)


def list_store(
    store: Location,
    selection: Selection,
    *,
    avoid: Location | None = None,
    max_images: int | None = None,
    progress: Progress | None = None,
) -> Listing:
    """List a store once, as a manifest that does not change afterwards.

    Args:
        store: a folder with images or shards at any depth, a single image or shard, or a file that lists addresses.
        selection: which objects are taken; the others are counted as skipped.
        avoid: a folder that is not listed: the output, if it is inside the store.
        max_images: take only this many objects, the first by key, for a trial.
        progress: called once per batch with the number of objects listed so far.

    Returns:
        The listing. Its manifest is sorted by key as bytes, like an S3 listing, so that a copy of the store on S3 gives the
        same rows.

    Raises:
        StoreError: the store does not exist, cannot be read, or contains no images.
    """
    began = time.monotonic()
    skipped: Counter[str] = Counter()
    try:
        require_folder(store)
        single = store.info()
        objects = _walked(store, avoid) if single is None else _named(store, single)
        taken = _taken(objects, selection, skipped, progress, named=single is not None)
        manifest = pa.Table.from_batches(list(taken), MANIFEST_SCHEMA)
    except PermissionError as error:
        raise StoreError(f"No permission to read the store {store.url}: {error}.") from None
    if not manifest.num_rows:
        raise StoreError(f"The store {store.url} contains no images to classify{_why_nothing(skipped)}.")
    order = pc.sort_indices(manifest["key"])
    manifest = manifest.take(order if max_images is None else order[:max_images]).combine_chunks()
    pa.default_memory_pool().release_unused()  # only the allocating thread releases all memory, and this thread may end here
    return Listing(manifest, skipped.total(), time.monotonic() - began)


#: uri, key, size, etag.
_Objects = Iterator[pa.RecordBatch]


def _walked(store: Location, avoid: Location | None) -> _Objects:
    for batch in store.walk():
        uris = pc.binary_join_element_wise(store.url, batch["key"], "/")
        found = pa.RecordBatch.from_arrays([uris, *batch.columns], names=_LIST_COLUMNS)
        yield found if avoid is None else found.filter(pc.invert(pc.fill_null(pc.starts_with(uris, f"{avoid.url}/"), False)))


def _named(location: Location, info: ObjectInfo) -> _Objects:
    """A single object, or the objects that it lists if it is a list of addresses."""
    listed = _addresses(location, info) if suffix(info.key) in _LIST_SUFFIXES else None
    if listed is None:
        listed = pa.table({name: [getattr(info, name)] for name in _LIST_COLUMNS})
    yield from listed.to_batches()


def _addresses(location: Location, info: ObjectInfo) -> pa.Table | None:
    """The objects in a list of addresses; None for a Parquet file that contains images itself.

    An address without a protocol is a path relative to the folder of the list. `key`, `size` and `etag` are optional columns.
    Without a column `key`, the address as written is the key.

    Raises:
        StoreError: the list cannot be parsed.
    """
    try:
        return _parse_list(location, info)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise StoreError(f"The list {location.url} cannot be parsed: {str(error).splitlines()[0]}.") from None


def _parse_list(location: Location, info: ObjectInfo) -> pa.Table | None:
    if suffix(info.key) == ".parquet":
        file = pq.ParquetFile(open_range_file(location, info.size))
        if "uri" not in file.schema_arrow.names:
            return None
        table = file.read([name for name in _LIST_COLUMNS if name in file.schema_arrow.names])
    elif suffix(info.key) == ".csv":
        table = _read_csv(location)
    else:
        lines = location.read().decode().splitlines()
        table = pa.table({"uri": pa.array([line.strip() for line in lines if line.strip()], pa.string())})
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


def _read_csv(location: Location) -> pa.Table:
    types = {**dict.fromkeys(("uri", "key", "etag"), pa.string()), "size": pa.int64()}
    text = pacsv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    try:
        table = pacsv.read_csv(pa.BufferReader(location.read()), convert_options=text)
    except pa.ArrowInvalid as error:
        raise StoreError(f"The list {location.url} is not a CSV file: {str(error).splitlines()[0]}.") from None
    if "uri" not in table.column_names:
        raise StoreError(f"The list {location.url} has no column uri; its columns are {', '.join(table.column_names)}.")
    return table


def _taken(
    objects: _Objects, selection: Selection, skipped: Counter[str], progress: Progress | None, *, named: bool
) -> Iterator[pa.RecordBatch]:
    listed = 0
    for batch in objects:
        listed += batch.num_rows
        if progress is not None:
            progress(listed)
        found = batch
        if found["key"].null_count:
            skipped["name that is not UTF-8"] += found["key"].null_count
            found = found.filter(pc.is_valid(found["key"]))
        formats = selection.formats(found["key"], named=named)
        rest = found.filter(pc.is_null(formats))
        skipped.update(suffix(key) or "no suffix" for key in rest["key"].to_pylist())
        kept = [*found.columns, formats]
        yield pa.RecordBatch.from_arrays(kept, schema=MANIFEST_SCHEMA).filter(pc.is_valid(formats))


def _why_nothing(skipped: Counter[str]) -> str:
    if not skipped:
        return ": it is empty"
    most = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(3))
    return f": {skipped.total()} other objects were skipped ({most}); use --include to take them"
