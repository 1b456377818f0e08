"""What the readers of all shard formats share.

Nothing here retries or depends on where a file is stored.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import pyarrow as pa

from tlbatch.errors import ErrorKind, Failure, TlbatchError

#: Usual columns or features of an image's bytes and name in a Parquet file or TFRecord, in order of preference.
IMAGE_FIELDS = ("image", "image/encoded", "img", "bytes", "image_bytes", "content", "data", "jpg", "png")
KEY_FIELDS = ("key", "__key__", "path", "file_name", "filename", "image/filename", "image/key")
#: Deflate's maximum compression ratio: bytes that one compressed byte can become.
MAX_DEFLATE_RATIO = 1032
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a shard: its index, its name, and its bytes or the reason why it could not be read."""

    index: int
    key: str
    data: bytes | Failure


class ShardOptions(NamedTuple):
    """How to read a shard.

    Attributes:
        key: key of the shard.
        field: column or feature with the bytes of the images; None for the usual names.
        max_bytes: maximum size of one image in bytes.
        passed: called with the kind of each member that is passed over, such as its suffix or `names.litter_kind`.
    """

    key: str
    field: str | None
    max_bytes: int
    passed: Callable[[str], None] = lambda _: None

    def limited(self, data: bytes | None) -> bytes | Failure:
        """The bytes of an image, or a Failure if they are empty or exceed `max_bytes`."""
        if not data:
            return Failure("read", ErrorKind.EMPTY, "the shard has no bytes for this image")
        return too_large(len(data), self.max_bytes) or data


class TornShardError(Exception):
    """The rest of this shard cannot be read; `kind` is the reason."""

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.TRUNCATED) -> None:
        super().__init__(message)
        self.kind = kind


def too_large(size: int, most: int) -> Failure | None:
    """The failure of an image of `size` bytes if it is larger than `most` bytes, else None."""
    if size <= most:
        return None
    return Failure("read", ErrorKind.TOO_LARGE, f"{size:,} bytes exceed max_bytes={most}")


ShardImages = Iterator[tuple[str, bytes | Failure]]


@contextlib.contextmanager
def decompressed(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The file, decompressed if its content is gzip, whatever its name."""
    magic = file.read(2)
    file.seek(0)
    if magic != b"\x1f\x8b":
        yield file
        return
    with gzip.GzipFile(fileobj=file) as unpacked:
        yield unpacked  # type: ignore[misc]


@contextlib.contextmanager
def damage_as_torn_shard() -> Iterator[None]:
    """Turn exceptions of a parser on untrusted bytes into TornShardError; errors of reading the file itself are re-raised."""
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
