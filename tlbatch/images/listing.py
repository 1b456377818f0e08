"""Stage 1: a store -> the manifest, the frozen list of objects that a run classifies.

There are no requests for single objects: sizes and versions come with the listing. The listing stays in columns, a large one in
a temporary file.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.errors import StoreError
from tlbatch.images import names
from tlbatch.images.contents import Locate, with_formats_of_content, without_other_shards
from tlbatch.images.inventory import Inventory, InventoryCheck
from tlbatch.images.layouts import layout_kinds, sentences
from tlbatch.images.lists import is_list, read_list
from tlbatch.images.names import glob_matcher, kind_of_name
from tlbatch.images.shards import EXCLUDED
from tlbatch.schema import ARCHIVED, IMAGE, MANIFEST_SCHEMA
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.location import UNREADABLE, Location, ObjectInfo, WalkRules
from tlbatch.storage.resolve import not_permitted, require_folder
from tlbatch.storage.temporary_rows import selected, sorted_table

log = logging.getLogger(__name__)

#: Called with the number of objects listed so far.
Progress = Callable[[int], None]

_COLUMNS = ("uri", "key", "size", "etag", "archived")
#: Kinds of skipped objects that are counted by name; suffixes may be any text.
_MOST_KINDS = 40
#: Folders that a message names.
_NAMED = 5
NOT_INCLUDED, OWN_OUTPUT = "not included", "output of tlbatch"


@dataclass(frozen=True)
class Listing:
    """The result of listing a store.

    Attributes:
        manifest: the objects to classify.
        skipped: the number of objects that were skipped; a folder that is not opened counts as one.
        seconds: the duration.
        skipped_by_kind: the same by kind: a suffix, a kind of litter, a layout of other software.
        unreadable: keys of folders that could not be opened, each with a slash at its end.
        away: keys of links that lead nowhere.
        check: looks objects up that the inventory, which was read in place of the store, may lack; None: the store was listed.
    """

    manifest: pa.Table
    skipped: int
    seconds: float
    skipped_by_kind: Mapping[str, int] = field(default_factory=dict)
    unreadable: Sequence[str] = ()
    away: Sequence[str] = ()
    check: InventoryCheck | None = None


class Selection:
    """Decides which objects of a store are classified, and the format of each.

    A glob without a slash is matched with the object's name, a glob with a slash with the whole key; `*` also matches slashes.
    A glob that ends with a slash means a folder with everything below it. Without `include`, objects with a known suffix of
    images or shards are taken. Litter (`names.py`) is never taken. With a `kind` other than auto, every object has that format.

    Args:
        include: globs of objects to take, instead of the known suffixes.
        exclude: globs of objects to skip.
        kind: auto, images, tar, parquet, tfrecord or zip.
        image_field: where shards have their images, if not at a usual place.
    """

    def __init__(
        self, include: Sequence[str] = (), exclude: Sequence[str] = (), kind: str = "auto", image_field: str | None = None
    ) -> None:
        self.includes = bool(include)
        self._include = [glob_matcher(glob) for glob in include]
        self._exclude = [glob_matcher(glob) for glob in exclude]
        self._closed = [glob_matcher(glob) for glob in exclude if "/" in glob and glob.endswith(("*", "/"))]
        self.kind = kind
        self.image_field = image_field

    def formats(self, keys: pa.Array, *, named: bool) -> tuple[pa.Array, pa.Array]:
        """The format of each key's object, and for those without one the kind under which they are counted as skipped.

        Objects that the user `named` need no known suffix, and may lie among litter.
        """
        reasons = pa.nulls(len(keys), pa.string()) if named else names.litter(keys)
        if self._include or self._exclude:
            chosen = pa.array([self._why_not(key) for key in keys.to_pylist()], pa.string())
            reasons = pc.coalesce(reasons, chosen)
        if self.kind == "auto":
            formats = names.formats(keys)
            if self._include or named:
                formats = pc.fill_null(formats, IMAGE)
        else:
            formats = pa.array([self.kind.removesuffix("s")] * len(keys), pa.string())
        return pc.if_else(pc.is_null(reasons), formats, pa.scalar(None, pa.string())), reasons

    def takes(self, keys: pa.Array) -> pa.Array:
        """Whether each key's object is taken, if it is in a folder that is listed."""
        return pc.is_valid(self.formats(keys, named=False)[0])

    def closes(self, folder: str) -> str | None:
        """Why a folder, a key with a slash at its end, is not opened: a kind of skipped objects; None if it is opened."""
        if any(matches(folder) for matches in self._closed):
            return EXCLUDED
        kind = names.litter_kind(folder)
        return kind if kind in names.UNOPENED else None

    def _why_not(self, key: str) -> str | None:
        if any(matches(key) for matches in self._exclude):
            return EXCLUDED
        return None if not self._include or any(matches(key) for matches in self._include) else NOT_INCLUDED


def list_store(
    store: Location | Inventory,
    selection: Selection,
    *,
    avoid: Location | None = None,
    max_images: int | None = None,
    progress: Progress | None = None,
    locate: Locate | None = None,
    folder: bool = False,
    bounds: Sequence[str] = (),
) -> Listing:
    """List a store once, as a manifest that does not change afterwards.

    Args:
        store: a folder with images or shards at any depth, a single image or shard, or a file that lists addresses; or the
            inventory of a bucket.
        selection: which objects are taken; the others are counted as skipped.
        avoid: a folder that is not listed: the output, if it is inside the store, by whatever links.
        max_images: take only this many objects, the first by key, for a trial.
        progress: called once per batch with the number of objects listed so far.
        folder: whether the address ends with a slash: then it means a folder, though an object may have the same name.
        locate: gives the location of a uri, for the few objects that are judged by their content; None: by their names alone.
        bounds: some keys of the store, sorted, between which a bucket is listed concurrently.

    Returns:
        The listing. Its manifest is sorted by key as bytes, like an S3 listing, so that a copy of the store on S3 gives the
        same rows.

    Raises:
        StoreError: the store does not exist, cannot be read, or contains no images.
    """
    began = time.monotonic()
    walk = _Walk(store, selection, avoid, bounds)
    try:
        single = None if isinstance(store, Inventory) else _single(store, folder=folder)
        objects = walk.objects() if isinstance(store, Inventory) or single is None else _named(store, single)
        manifest = sorted_table(walk.taken(objects, progress, named=single is not None), MANIFEST_SCHEMA, "key")
    except PermissionError as error:
        raise not_permitted(store, error) from None
    manifest = walk.without_own_outputs(manifest)
    if locate is not None and selection.kind == "auto" and (single is None or manifest.num_rows == 1):
        if selection.includes or single is not None:
            manifest = with_formats_of_content(manifest, locate)
        manifest, others = without_other_shards(manifest, locate, selection.image_field)
        walk.skipped.update(others)
    walk.warn(alone=not manifest.num_rows)
    if not manifest.num_rows:
        raise StoreError(f"The store {store.url} contains no images to classify{walk.why_nothing()}")
    manifest = manifest.slice(0, max_images)
    pa.default_memory_pool().release_unused()  # only the allocating thread releases all memory, and this thread may end here
    seconds = time.monotonic() - began
    unreadable = tuple(sorted(walk.unreadable))
    check = InventoryCheck(store, selection.takes) if isinstance(store, Inventory) else None
    return Listing(manifest, walk.skipped.total(), seconds, walk.kinds(), unreadable, tuple(walk.away), check)


def _single(store: Location, *, folder: bool) -> ObjectInfo | None:
    """The object at the address itself; None if it means a folder.

    Raises:
        StoreError: nothing is there, or a bucket has an object and a folder of this name, and nothing says which one is meant.
    """
    require_folder(store)
    found = None if folder else store.info()
    if found is None or isinstance(store, LocalLocation) or not any(batch.num_rows for batch in store.walk()):
        return found
    if found.size:
        raise StoreError(
            f"{store.url} is an object of {found.size:,} bytes, and {store.url}/ is a folder: write the address with a slash "
            "at its end for the folder, or give the object in a list of addresses."
        )
    return None  # an empty object that some programs write to mark a folder


#: Of the columns `_COLUMNS`.
_Objects = Iterator[pa.RecordBatch]


def _named(location: Location, info: ObjectInfo) -> _Objects:
    """A single object, or the objects that it lists if it is a list of addresses."""
    listed = read_list(location, info) if is_list(info.key) else None
    if listed is None:
        yield pa.RecordBatch.from_pydict({name: [getattr(info, name)] for name in _COLUMNS})
        return
    for batch in listed:
        yield batch.append_column("archived", pa.repeat(pa.scalar(False), batch.num_rows))


class _Walk:
    """One pass over a store: what is taken, and what is skipped for which reason."""

    def __init__(
        self, store: Location | Inventory, selection: Selection, avoid: Location | None, bounds: Sequence[str]
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.unreadable: list[str] = []
        self.away: list[str] = []
        self._store, self._selection, self._bounds = store, selection, bounds
        self._avoid = avoid.url.removeprefix(f"{store.url}/") + "/" if avoid and avoid.url.startswith(f"{store.url}/") else None
        self._closed = avoid.url if isinstance(avoid, LocalLocation) else ""
        self._runs: list[str] = []

    def objects(self) -> _Objects:
        """Every object of the store, but for those below folders that are not opened."""
        for batch in self._store.walk(WalkRules(self._skips, self._passed, self._closed, self.away.append, self._bounds)):
            found = batch
            if self._avoid is not None:
                found = batch.filter(pc.invert(pc.fill_null(pc.starts_with(batch["key"], self._avoid), False)))
            uris = pc.binary_join_element_wise(self._store.url, found["key"], "/")
            yield pa.RecordBatch.from_arrays([uris, *found.columns], names=_COLUMNS)

    def _skips(self, folder: str) -> bool:
        if folder == self._avoid:
            return True
        why = self._selection.closes(folder)
        if why is None:
            return False
        layout = None if why == EXCLUDED else layout_kinds(pa.array([folder]))[0].as_py()  # Hudi's folder is a hidden one
        self.skipped[layout or why] += 1
        return True

    def _passed(self, key: str, reason: str) -> None:
        self.skipped[reason] += 1
        if reason == UNREADABLE:
            self.unreadable.append(key)

    def taken(self, objects: _Objects, progress: Progress | None, *, named: bool) -> Iterator[pa.RecordBatch]:
        """The rows of the manifest, in the order of the walk."""
        listed = 0
        for batch in objects:
            listed += batch.num_rows
            if progress is not None:
                progress(listed)
            found = batch
            if found["key"].null_count:
                self.skipped["name that is not UTF-8"] += found["key"].null_count
                found = found.filter(pc.is_valid(found["key"]))
            formats, reasons = self._selection.formats(found["key"], named=named)
            self._count(found["key"], formats, reasons)
            formats = pc.if_else(pc.and_(found["archived"], pc.is_valid(formats)), ARCHIVED, formats)
            kept = [*found.columns[:-1], formats]
            yield pa.RecordBatch.from_arrays(kept, schema=MANIFEST_SCHEMA).filter(pc.is_valid(formats))

    def _count(self, keys: pa.Array, formats: pa.Array, reasons: pa.Array) -> None:
        is_rest = pc.is_null(formats)
        rest = keys.filter(is_rest)
        if not len(rest):
            return
        kinds = pc.coalesce(layout_kinds(rest), reasons.filter(is_rest))
        self.skipped.update(kind or kind_of_name(key) for key, kind in zip(rest.to_pylist(), kinds.to_pylist(), strict=True))
        self._runs += rest.filter(pc.match_substring_regex(rest, r"(^|/)runs/[^/]+/run\.json$")).to_pylist()

    def without_own_outputs(self, manifest: pa.Table) -> pa.Table:
        """The manifest without the files of tlbatch's own runs, whatever the runs are called."""
        for key in self._runs:
            own = pc.starts_with(manifest["key"], key.removesuffix("run.json"))
            if pc.any(own).as_py():
                self.skipped[OWN_OUTPUT] += pc.sum(own).as_py()
                manifest = selected(manifest, pc.invert(own).to_numpy())
        return manifest

    def kinds(self) -> dict[str, int]:
        """The number of skipped objects by kind, the most common first."""
        common = dict(self.skipped.most_common(_MOST_KINDS))
        left = self.skipped.total() - sum(common.values())
        return {**common, "other": left} if left else common

    def warn(self, *, alone: bool) -> None:
        """Log what a user should know of a store that has images as well."""
        if self.unreadable:
            log.warning(
                "Folders of %s that cannot be opened, and whose images are missing: %s. Permit it, or use --exclude FOLDER/.",
                *self._first(self.unreadable),
            )
        if self.away:
            log.warning("Links of %s that lead nowhere: %s. They are not taken for deleted.", *self._first(self.away))
        for sentence in () if alone else sentences(set(self.skipped), alone=False):
            log.warning("%s", sentence)

    def _first(self, names: Sequence[str]) -> tuple[str, str]:
        """The store, and a few names of it, for a sentence."""
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return self._store.url, ", ".join(sorted(names)[:_NAMED]) + more

    def why_nothing(self) -> str:
        """The end of the sentence about a store without images."""
        if not self.skipped:
            return ": it is empty."
        most = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common(3))
        known = list(sentences(set(self.skipped), alone=True))
        advice = "." if known else "; use --include to take them."
        return " ".join([f": {self.skipped.total()} other objects were skipped ({most}){advice}", *known])
