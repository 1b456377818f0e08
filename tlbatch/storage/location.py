"""What a storage location offers, whatever holds it: a folder or an object, local or remote."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import pyarrow as pa

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What a listing knows of each object: its key below the listed folder, and what tells its version.
LISTED = pa.schema([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
_OBJECTS_PER_BATCH = 8_192


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a store: its full address, its path below the place that listed it, and what tells its version.

    `written` is when, in seconds since the epoch by the store's clock; 0 where it does not say.
    """

    uri: str
    key: str
    size: int
    etag: str
    written: float = 0.0


class Upload(NamedTuple):
    """An object in parts that was begun and never became one; who keeps it is paid for it. `began` as `ObjectInfo.written`."""

    key: str
    began: float
    number: str


class Location(Protocol):
    """A folder or an object, local or remote; cheap to make, safe to pickle, without a credential in it."""

    @property
    def url(self) -> str:
        """Full address: an absolute path on a local disk, `protocol://…` elsewhere."""

    def join(self, *names: str) -> Location:
        """The place `names` below this one."""

    def read(self) -> bytes:
        """The whole object, waiting for a store that has a bad minute. Raises an OSError."""

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The object, or its bytes from `start` to `end`, in one attempt.

        Raises:
            ChangedError: it is not the version `etag`, where the store can tell.
            OSError: what else went wrong; `passes` says whether trying again makes sense.
        """

    def info(self) -> ObjectInfo | None:
        """Size and version of this object, its key being its name; None where there is no such object."""

    def write(self, data: bytes) -> None:
        """Put a whole object; readers see the old one or the new one."""

    def create(self, data: bytes) -> bool:
        """Put a whole object if there is none yet; False if there is."""

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Replace the object if it still holds `old` (None: if it does not exist); False if somebody was faster."""

    def names(self) -> list[str]:
        """Names directly below this folder, sorted; empty where the folder does not exist."""

    def walk(self) -> Iterator[pa.RecordBatch]:
        """Every object below this folder, as `LISTED`. Names that begin with a dot are passed over, except `.` and `..`.

        A name that is no text (a local disk may have them) is null.
        """

    def contents(self) -> Iterator[ObjectInfo]:
        """Every object below this folder whatever its name, those of writes that were cut short among them."""

    def uploads(self) -> Iterator[Upload]:
        """Uploads in parts that were begun below this folder and are not ended."""

    def abort(self, upload: Upload) -> None:
        """Give up an upload that `uploads` named."""

    def delete(self) -> None:
        """Remove this object, or this folder with all below it. What does not exist is removed already."""

    def remove(self, old: bytes) -> bool:
        """Remove this object if it still holds `old`; False if it does not."""

    def exists(self) -> bool:
        """Whether there is an object here, or anything below."""


def in_batches(found: Iterable[tuple[str, int, str]]) -> Iterator[pa.RecordBatch]:
    """(key, size, etag) of many objects, in columns: a tenth of the memory."""
    rows = iter(found)
    while chunk := list(itertools.islice(rows, _OBJECTS_PER_BATCH)):
        yield to_batch(chunk)


def to_batch(rows: Sequence[tuple[str, int, str]]) -> pa.RecordBatch:
    """(key, size, etag) of some objects as `LISTED`."""
    keys, sizes, etags = zip(*rows, strict=True)
    try:
        text = pa.array(keys, pa.string())
    except UnicodeEncodeError:
        text = pa.array([key if _is_text(key) else None for key in keys], pa.string())
    return pa.RecordBatch.from_arrays([text, pa.array(sizes, pa.int64()), pa.array(etags, pa.string())], schema=LISTED)


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


TEMPORARY_SUFFIX, PROBE_INFIX = ".tmp", ".probe-"


def is_leftover(key: str) -> bool:
    """Whether an object is one that only a write which was cut short leaves behind."""
    name = key.rsplit("/", 1)[-1]
    return (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)) or PROBE_INFIX in name
