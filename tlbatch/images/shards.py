"""What the readers of all shard formats share.

Nothing here retries or depends on where a file is stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO

import pyarrow as pa

from tlbatch.errors import ErrorKind, Failure, TlbatchError
from tlbatch.images.names import IMAGE_SUFFIXES, glob_matcher, litter_kind, suffix

#: Usual columns or features of an image's bytes and name in a Parquet file or TFRecord, in order of preference.
IMAGE_FIELDS = ("image", "image/encoded", "img", "bytes", "image_bytes", "content", "data", "jpg", "png")
#: Columns or features of identifiers, as TFDS, COCO and Kaggle name them.
ID_FIELDS = ("image/source_id", "image/id", "image_id", "image_name", "id", "tfds_id")
KEY_FIELDS = ("key", "__key__", "path", "file_name", "filename", "image/filename", "image/key", "file.path")
#: Deflate's maximum compression ratio: bytes that one compressed byte can become.
MAX_DEFLATE_RATIO = 1032
BUFFER_BYTES = 1 << 20
#: Kinds of skipped members that are neither suffixes nor litter: links, which have no bytes; members that `--exclude` names;
#: and what WebDataset stores beside each image.
LINKS, EXCLUDED, SIDECARS = "links", "excluded", "sidecars"
_SIDECAR_SUFFIXES = frozenset(
    (
        *(".json", ".jsonl", ".txt", ".text", ".caption", ".cls", ".cls2", ".id", ".index", ".csv", ".xml", ".yaml", ".yml"),
        *(".npy", ".npz", ".pth", ".pt", ".pyd", ".pickle", ".pkl", ".ten", ".tb", ".mp", ".msg"),
    )
)
#: Most kinds of skipped members that are counted, and the longest name of one.
_MOST_KINDS, _LONGEST_KIND = 64, 48


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a shard: its index, its name, and its bytes or the reason why it could not be read."""

    index: int
    key: str
    data: bytes | Failure


@dataclass(frozen=True)
class ShardOptions:
    """How to read a shard.

    Attributes:
        key: key of the shard.
        field: column or feature with the bytes of the images, or extension of the members; None for the usual ones.
        max_bytes: maximum size of one image in bytes.
        exclude: globs of members of an archive to skip.
        skipped: how many members or rows were skipped so far, by kind: a suffix, or words such as `recycle bin`.
    """

    key: str
    field: str | None
    max_bytes: int
    exclude: Sequence[str] = ()
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)

    def limited(self, data: bytes | None) -> bytes | Failure:
        """The bytes of an image, or a Failure if they are empty or exceed `max_bytes`."""
        if not data:
            return Failure("read", ErrorKind.EMPTY, "the shard has no bytes for this image")
        return too_large(len(data), self.max_bytes) or data

    def takes(self, name: str) -> bool:
        """Whether the member of an archive with this name is an image that is wanted; if not, it is counted as skipped."""
        kind = self._kind_of_skipped(name)
        if kind is not None:
            self.skip(kind)
        return kind is None

    def skip(self, kind: str, count: int = 1) -> None:
        """Count what is skipped. Names come from strangers, so the number of kinds is limited."""
        known = kind in self.skipped or (len(self.skipped) < _MOST_KINDS and len(kind) <= _LONGEST_KIND)
        self.skipped[kind if known else "other"] += count

    def _kind_of_skipped(self, name: str) -> str | None:
        litter = litter_kind(name)
        if litter is not None:
            return litter
        if any(matches(name) for matches in self._excluded):
            return EXCLUDED
        ending = suffix(name)
        if self._extension is not None:
            own = extension(name)
            if own == self._extension:
                return None
            # A name that is no image's, such as `photo`, is that of a column of other shards of the store.
            if suffix(f".{self._extension}") in IMAGE_SUFFIXES and ending in IMAGE_SUFFIXES:
                return f".{own}"
        if ending in IMAGE_SUFFIXES:
            return None
        return SIDECARS if ending in _SIDECAR_SUFFIXES else ending or "no suffix"

    @cached_property
    def _extension(self) -> str | None:
        return None if self.field is None else self.field.lower().removeprefix(".")

    @cached_property
    def _excluded(self) -> Sequence[Callable[[str], object]]:
        return [glob_matcher(glob) for glob in self.exclude]


def extension(name: str) -> str:
    """WebDataset's extension of a member: its last part from the first dot, in lower case and without that dot."""
    return name.rsplit("/", 1)[-1].partition(".")[2].lower()


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


def looks_like_image(data: bytes) -> bool:
    """Whether bytes begin like a file of an image format; what decodes is for `images/decode.py` to say."""
    return (
        data.startswith(_BEGINNINGS)
        or data[4:8] == b"ftyp"
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or (data[:2] == b"BM" and data[6:10] == bytes(4))
        or (data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace())
    )


#: First bytes of JPEG, PNG, GIF, TIFF and BigTIFF, JPEG XL, JPEG 2000, Photoshop, QOI and SVG.
_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\xff\x0a"),
    *(b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS", b"qoif", b"<svg", b"<?xml"),
)


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
