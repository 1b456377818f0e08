"""The interface of a storage location: a folder or an object, local or remote -> bytes, listings and conditional writes."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

#: Columns of a listing: key below the listed folder, size, a string that identifies the version, and whether the object is in
#: an archive and must be restored before it can be read.
LISTED = pa.schema([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("archived", pa.bool_())])
OBJECTS_PER_BATCH = 8_192
#: Key, size and version of one object; a local file in a folder that may not be entered has neither size nor version.
Listed = tuple[str, int | None, str | None]


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a store.

    Attributes:
        uri: its full address.
        key: its path below the listed location.
        size: in bytes.
        etag: identifies its version.
        written: the time of the write, in seconds since the epoch by the store's clock; 0 if the store does not give it.
        archived: whether it must be restored before it can be read.
    """

    uri: str
    key: str
    size: int
    etag: str
    written: float = 0.0
    archived: bool = False


class Upload(NamedTuple):
    """An unfinished multipart upload, for which the provider charges storage; `began` is a time like `ObjectInfo.written`."""

    key: str
    began: float
    number: str


#: Why a walk passes over something: the folder's listing is refused; a link leads nowhere, or to a folder above it; a pipe, a
#: socket or a device.
UNREADABLE, BROKEN_LINK, NO_FILE = "folder that cannot be opened", "broken link", "no regular file"
#: In a bucket: an object with content that is named like a folder.
SLASH_AT_END = "name that ends with a slash"


class WalkRules(NamedTuple):
    """What a walk does with folders.

    Attributes:
        skips: whether a folder, a key that ends with a slash, is not opened.
        passed: called with a key below the walk's folder, and the reason why it is skipped.
        closed: a folder on a disk that is not entered, through whatever links or mounts; empty: none.
        away: called with the key of a link that leads nowhere.
        bounds: keys below the walk's folder, sorted, that cut it into parts of a similar size. A bucket lists the parts
            concurrently.
    """

    skips: Callable[[str], bool] = lambda _: False
    passed: Callable[[str, str], None] = lambda *_: None
    closed: str = ""
    away: Callable[[str], None] = lambda _: None
    bounds: Sequence[str] = ()


#: No folder is skipped, and nothing is told.
EVERYTHING = WalkRules()


class Location(Protocol):
    """A folder or an object, local or remote; cheap to create, safe to pickle, and without credentials."""

    @property
    def url(self) -> str:
        """Full address: an absolute path on a local disk, `protocol://…` elsewhere."""

    def join(self, *names: str) -> Location:
        """The location `names` below this one."""

    def read(self) -> bytes:
        """The whole object, with retries of transient errors; raises OSError."""

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The object, or its bytes from `start` to `end`, in one attempt.

        Raises:
            ChangedError: the object is not the version `etag`; only stores that can check the version raise it.
            OSError: any other error; `is_transient` says whether a retry makes sense.
        """

    def info(self) -> ObjectInfo | None:
        """Size and version of this object, with its name as key; None if the object does not exist."""

    def write(self, data: bytes | mmap.mmap) -> None:
        """Write a whole object; readers see the old object or the new object. Of a large file only pieces are in memory."""

    def create(self, data: bytes) -> bool:
        """Write a whole object if it does not exist; False if it exists."""

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Replace the object if its content is still `old` (None: if it does not exist); False if another process was first."""

    def names(self) -> list[str]:
        """Names directly below this folder, sorted; empty if the folder does not exist."""

    def folders(self) -> list[str]:
        """Names of the folders directly below this one, sorted; a bucket has no empty ones."""

    def walk(self, rules: WalkRules = EVERYTHING) -> Iterator[pa.RecordBatch]:
        """Every object below this folder, as `LISTED`. A name that is not valid UTF-8 (a local disk allows such names) is null.

        A folder that may not be opened is skipped. In a bucket, a folder may be listed although the rules skip it.

        Raises:
            PermissionError: this folder itself may not be listed.
        """

    def contents(self) -> Iterator[ObjectInfo]:
        """Every object below this folder, whatever its name, including the leftovers of interrupted writes."""

    def uploads(self) -> Iterator[Upload]:
        """Unfinished multipart uploads below this folder."""

    def abort(self, upload: Upload) -> None:
        """Abort an upload that `uploads` returned."""

    def unlink(self) -> None:
        """Remove this object; do nothing if it does not exist."""

    def delete(self) -> None:
        """Remove this object, or this folder with everything below it; do nothing if it does not exist."""

    def remove(self, old: bytes) -> bool:
        """Remove this object if its content is still `old`; False if it is not."""

    def exists(self) -> bool:
        """Whether this object exists, or any object below this folder."""


def in_batches(found: Iterable[Listed]) -> Iterator[pa.RecordBatch]:
    """Batches of `LISTED` from (key, size, etag) of many objects; columns take a tenth of the memory."""
    rows = iter(found)
    while chunk := list(itertools.islice(rows, OBJECTS_PER_BATCH)):
        yield to_batch(chunk)


def to_batch(rows: Sequence[Listed]) -> pa.RecordBatch:
    """One batch of `LISTED` from (key, size, etag) of some objects, none of them in an archive."""
    keys, sizes, etags = zip(*rows, strict=True)
    try:
        text = pa.array(keys, pa.string())
    except UnicodeEncodeError:
        text = pa.array([key if _is_text(key) else None for key in keys], pa.string())
    archived = pa.repeat(pa.scalar(False), len(rows))
    return pa.RecordBatch.from_arrays(
        [text, pa.array(sizes, pa.int64()), pa.array(etags, pa.string()), archived], schema=LISTED
    )


def objects_below(listed: pa.RecordBatch, root: str, rules: WalkRules) -> pa.RecordBatch:
    """A listing with keys relative to `root`, without folder markers and whatever else is named like a folder."""
    keys = pc.utf8_slice_codeunits(listed["key"], len(root)) if root else listed["key"]
    markers = pc.fill_null(pc.or_(pc.ends_with(keys, "/"), pc.equal(keys, "")), False)
    for key in keys.filter(pc.and_(markers, pc.greater(listed["size"], 0))).to_pylist():
        rules.passed(key, SLASH_AT_END)
    listed = listed.set_column(0, LISTED.field("key"), keys) if root else listed
    return listed.filter(pc.invert(markers)) if pc.any(markers).as_py() else listed


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


#: The object by which a command finds out what a bucket's server keeps, and a part of its name in earlier versions.
PROBE, _EARLIER_PROBE = ".tlbatch-probe", ".probe-"
TEMPORARY_SUFFIX = ".tmp"


def is_leftover(key: str) -> bool:
    """Whether an object is the leftover of an interrupted write."""
    name = key.rsplit("/", 1)[-1]
    return (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)) or name == PROBE or _EARLIER_PROBE in name
