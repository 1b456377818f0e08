"""Which object a key names by its suffix, and what the readers of shard formats share.

Nothing here retries or knows where a file lies.
"""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.errors import ErrorKind, Failure, TlbatchError
from tlbatch.schema import IMAGE, PARQUET, TAR, TFRECORD

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_SHARD_ENDINGS = {
    TAR: (".tar", ".tar.gz", ".tgz"),
    PARQUET: (".parquet",),
    TFRECORD: (".tfrecord", ".tfrecords", ".tfrecord.gz", ".tfrecords.gz"),
}

#: Where a Parquet file or a TFRecord usually keeps an image's bytes and name, best first.
IMAGE_FIELDS = ("image", "image/encoded", "img", "bytes", "image_bytes", "content", "data", "jpg", "png")
KEY_FIELDS = ("key", "__key__", "path", "file_name", "filename", "image/filename", "image/key")
#: Bytes that deflate makes of one at the most.
MAX_DEFLATE_RATIO = 1032
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a shard: its place in it, its name, and its bytes or the reason why there are none."""

    index: int
    key: str
    data: bytes | Failure


class ShardOptions(NamedTuple):
    """How a shard is read: its key, the field with the image's bytes where it has an unusual name, the most bytes of one."""

    key: str
    field: str | None
    max_bytes: int

    def limited(self, data: bytes | None) -> bytes | Failure:
        """The bytes, or why they are not taken."""
        if not data:
            return Failure("read", ErrorKind.EMPTY, "the shard holds no bytes under this name")
        return too_large(len(data), self.max_bytes) or data


class TornShardError(Exception):
    """The rest of this shard cannot be read; `kind` says why."""

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.TRUNCATED) -> None:
        super().__init__(message)
        self.kind = kind


def suffix(key: str) -> str:
    """The lower-case suffix of a key's last part, with its dot; empty where there is none."""
    name = key.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else ""


def formats(keys: pa.Array) -> pa.Array:
    """What each key's object is by its ending: an image, or a kind of shard; null where the ending is unknown."""
    found = pa.nulls(len(keys), pa.string())
    for kind, endings in {IMAGE: tuple(IMAGE_SUFFIXES), **_SHARD_ENDINGS}.items():
        pattern = "(" + "|".join(re.escape(ending) for ending in sorted(endings)) + ")$"
        found = pc.if_else(pc.match_substring_regex(keys, pattern, ignore_case=True), kind, found)
    return found


def too_large(size: int, most: int) -> Failure | None:
    """The failure of an image of more bytes than are allowed."""
    if size <= most:
        return None
    return Failure("read", ErrorKind.TOO_LARGE, f"{size:,} bytes; max_bytes allows {most:,}")


ShardImages = Iterator[tuple[str, bytes | Failure]]


@contextlib.contextmanager
def decompressed(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The file, unpacked if it is gzipped, whatever its name."""
    magic = file.read(2)
    file.seek(0)
    if magic != b"\x1f\x8b":
        yield file
        return
    with gzip.GzipFile(fileobj=file) as unpacked:
        yield unpacked  # type: ignore[misc]


@contextlib.contextmanager
def damage_as_torn_shard() -> Iterator[None]:
    """Whatever a parser raises over a stranger's bytes; what the file itself raises goes on to who opened it."""
    try:
        yield
    except (TlbatchError, TornShardError):
        raise
    except OSError as error:
        damage = isinstance(error, gzip.BadGzipFile | pa.ArrowException) or (type(error) is OSError and error.errno is None)
        if not damage:
            raise
        raise TornShardError(str(error)) from error
    except Exception as error:
        raise TornShardError(str(error) or type(error).__name__) from error
