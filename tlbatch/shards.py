"""What kind of object a key names, and the formats of shards: an open file -> its images, one by one.

Nothing here retries or knows where a file lies. A shard that is torn gives every image before the tear and then one failure,
for the tear; so does a shard without an image, because an object that leaves no row would not be accounted for.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO, Any, NamedTuple

import google_crc32c
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch.errors import ErrorKind, Failure, TlbatchError

IMAGE, TAR, PARQUET, TFRECORD = "image", "tar", "parquet", "tfrecord"

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_SHARD_ENDINGS = {
    TAR: (".tar", ".tar.gz", ".tgz"),
    PARQUET: (".parquet",),
    TFRECORD: (".tfrecord", ".tfrecords", ".tfrecord.gz", ".tfrecords.gz"),
}

#: Where a Parquet file or a TFRecord usually keeps an image's bytes and name, best first.
_IMAGE_FIELDS = ("image", "image/encoded", "img", "bytes", "image_bytes", "content", "data", "jpg", "png")
_KEY_FIELDS = ("key", "__key__", "path", "file_name", "filename", "image/filename", "image/key")

#: Headers of a tar that hold names and other text; a longer one is no name.
_MOST_HEADER_BYTES = 1 << 20
#: Bytes that deflate makes of one at the most.
_MOST_UNPACKED = 1032
_ROWS_AT_ONCE = 32
_BUFFER = 1 << 20
#: Bytes of a Parquet file whose row groups may be read at once.
_READ_AT_ONCE = 32 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a shard: its place in it, its name, and its bytes or the reason why there are none."""

    index: int
    key: str
    data: bytes | Failure


class Wanted(NamedTuple):
    """How a shard is read: its key, the field with the image's bytes where it has an unusual name, the most bytes of one."""

    key: str
    field: str | None
    max_bytes: int

    def limited(self, data: bytes | None) -> bytes | Failure:
        """The bytes, or why they are not taken."""
        if not data:
            return Failure("read", ErrorKind.EMPTY, "the shard holds no bytes under this name")
        return too_large(len(data), self.max_bytes) or data


class _TornError(Exception):
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


def read_members(kind: str, file: IO[bytes], wanted: Wanted) -> Iterator[Member]:
    """Every image of a shard, in its order.

    Args:
        kind: `TAR`, `PARQUET` or `TFRECORD`.
        file: the shard; for Parquet it must be able to seek.
        wanted: how to read it.

    Raises:
        OSError: what the file raises when it cannot be read, for the caller who knows why. Damage is no exception.
    """
    index = 0
    try:
        for key, data in _READERS[kind](file, wanted):
            yield Member(index, key, data)
            index += 1
    except _TornError as torn:
        yield Member(index, wanted.key, Failure("read", torn.kind, f"after {index} images: {torn}"))
        return
    if not index:
        yield Member(0, wanted.key, Failure("read", ErrorKind.EMPTY, "the shard holds no image"))


_Images = Iterator[tuple[str, bytes | Failure]]


class _Header(tarfile.TarInfo):
    """A tar header that tells its archive how the headers ended; tarfile takes damage between members for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _TEXT_HEADERS and header.size > _MOST_HEADER_BYTES:
            raise tarfile.InvalidHeaderError(f"a header of {header.size} bytes")  # type: ignore[attr-defined]
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            archive.ended_by = error  # type: ignore[attr-defined]
            raise


_TEXT_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _read_tar(file: IO[bytes], wanted: Wanted) -> _Images:
    """WebDataset's way: a member is an image by its suffix, whatever stands beside it; its key is its name."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    with _plain(file) as plain, _damage_is_a_tear():
        most = tarfile.BLOCKSIZE + (end if plain is file else end * _MOST_UNPACKED)
        with tarfile.open(fileobj=plain, mode="r|", bufsize=_BUFFER, tarinfo=_Header) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
                if archive.offset > most:  # tarfile would read on behind the end, for years
                    raise _TornError(f"a member of {member.size:,} bytes reaches behind the end of the archive")
                if member.isreg() and suffix(member.name) in IMAGE_SUFFIXES:
                    yield _text(member.name), _read_member(archive, member, wanted)
            ended_by = getattr(archive, "ended_by", None)
        if not isinstance(ended_by, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
            raise _TornError(f"the archive ends without its end mark: {ended_by}")


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, wanted: Wanted) -> bytes | Failure:
    refused = too_large(member.size, wanted.max_bytes)
    if refused is not None:
        return refused
    content = archive.extractfile(member)
    return wanted.limited(content.read() if content is not None else None)


def _text(name: str) -> str:
    """A name as text that can stand in a table: bytes that are no UTF-8 are written as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def _plain(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The file, unpacked if it is gzipped, whatever its name."""
    magic = file.read(2)
    file.seek(0)
    if magic != b"\x1f\x8b":
        yield file
        return
    with gzip.GzipFile(fileobj=file) as unpacked:
        yield unpacked  # type: ignore[misc]


@contextlib.contextmanager
def _damage_is_a_tear() -> Iterator[None]:
    """Whatever a parser raises over a stranger's bytes; what the file itself raises goes on to who opened it."""
    try:
        yield
    except (TlbatchError, _TornError):
        raise
    except OSError as error:
        damage = isinstance(error, gzip.BadGzipFile | pa.ArrowException) or (type(error) is OSError and error.errno is None)
        if not damage:
            raise
        raise _TornError(str(error)) from error
    except Exception as error:
        raise _TornError(str(error) or type(error).__name__) from error


def _read_parquet(file: IO[bytes], wanted: Wanted) -> _Images:
    """A column of bytes, or of Hugging Face's struct of bytes and path; the key is a path or a column that names it."""
    with _damage_is_a_tear():
        # Pages of a large file are fetched as they are needed, because a row group may be all of it. Not of others: Arrow then
        # takes a page for as large as it says, and fills 2 GB with zeros for a file of 2 KB that lies.
        buffer = _BUFFER if file.seek(0, io.SEEK_END) > _READ_AT_ONCE else 0
        parquet = pq.ParquetFile(file, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True)
        schema = parquet.schema_arrow
        image = _image_column(schema, wanted.field)
        names = [name for name in _KEY_FIELDS if name in schema.names and pa.types.is_string(schema.field(name).type)][:1]
        # Group by group, or damage in one would take rows of the one before it along.
        batches = (parquet.iter_batches(_ROWS_AT_ONCE, [group], [image, *names]) for group in range(parquet.num_row_groups))
        rows = (row for group in batches for batch in group for row in batch.to_pylist())
        for place, row in enumerate(rows):
            value = row[image] if isinstance(row[image], dict) else {"bytes": row[image]}
            key = value.get("path") or (row[names[0]] if names else None) or f"{wanted.key}/{place:08d}"
            yield str(key), wanted.limited(value["bytes"])


def _image_column(schema: pa.Schema, asked: str | None) -> str:
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    if asked is not None:
        candidates = [name for name in candidates if name == asked]
    if not candidates:
        what = f"no column {asked!r} of bytes" if asked else "no column of bytes"
        raise _TornError(f"there is {what}; its columns are {', '.join(schema.names)}", ErrorKind.UNSUPPORTED)
    return next((name for name in _IMAGE_FIELDS if name in candidates), str(candidates[0]))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _read_tfrecord(file: IO[bytes], wanted: Wanted) -> _Images:
    """Records of `tf.train.Example`; a record whose checksum is wrong costs only itself, a wrong length the rest."""
    with _plain(file) as plain, _damage_is_a_tear():
        place = 0
        while header := _exactly(plain, 12, or_end=True):
            (length,) = struct.unpack("<Q", header[:8])
            if _masked_crc(header[:8]) != header[8:]:
                raise _TornError("a record's length has a wrong checksum")
            name = f"{wanted.key}/{place:08d}"
            place += 1
            if length > wanted.max_bytes:
                _skip(plain, length + 4)
                yield name, Failure("read", ErrorKind.TOO_LARGE, f"a record of {length:,} bytes")
                continue
            body = _exactly(plain, length + 4)
            if _masked_crc(body[:-4]) != body[-4:]:
                yield name, Failure("read", ErrorKind.DECODE_FAILED, "the record's checksum is wrong")
            else:
                yield _from_example(body[:-4], name, wanted)


def _exactly(file: IO[bytes], size: int, *, or_end: bool = False) -> bytes:
    data = file.read(size)
    if len(data) != size and (data or not or_end):
        raise _TornError(f"a record ends after {len(data)} of {size} bytes")
    return data


def _skip(file: IO[bytes], size: int) -> None:
    while size > 0:
        size -= len(_exactly(file, min(size, _BUFFER)))


def _masked_crc(data: bytes) -> bytes:
    """TFRecord's checksum: CRC-32C, rotated and moved so that a checksum of checksums is not zero."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _from_example(record: bytes, name: str, wanted: Wanted) -> tuple[str, bytes | Failure]:
    from google.protobuf.message import DecodeError

    try:
        example = _example_type().FromString(record)
    except DecodeError as error:
        return name, Failure("read", ErrorKind.DECODE_FAILED, f"the record is no tf.train.Example: {error}")
    values = {feature.key: feature.value.bytes_list.value for feature in example.features.feature}
    key = _first(values, _KEY_FIELDS)
    fields = (wanted.field,) if wanted.field else _IMAGE_FIELDS
    data = _first(values, fields)
    if data is None:
        there = b", ".join(sorted(values)).decode(errors="backslashreplace")
        return name, Failure("read", ErrorKind.UNSUPPORTED, f"no bytes under {fields[0]!r}; its features are {there[:300]}")
    return key.decode(errors="backslashreplace") if key else name, wanted.limited(data)


def _first(values: Mapping[bytes, Sequence[bytes]], names: Sequence[str]) -> bytes | None:
    return next((values[name.encode()][0] for name in names if values.get(name.encode())), None)


@cache
def _example_type() -> Any:
    """The message `tf.train.Example` as far as it is needed, without TensorFlow: unknown fields are passed over.

    Source: tensorflow/core/example/{example,feature}.proto. Names are bytes here, because nobody checked that they are text.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="tlbatch_example.proto", package="tlbatch", syntax="proto3")
    text, message = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES, descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
    one, many = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL, descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED

    def add(name: str, *fields: tuple[str, int, int, str | None]) -> None:
        kind = file.message_type.add(name=name)
        for number, (field, label, of, type_name) in enumerate(fields, 1):
            kind.field.add(name=field, number=number, label=label, type=of, type_name=type_name and f".tlbatch.{type_name}")

    add("BytesList", ("value", many, text, None))
    add("Feature", ("bytes_list", one, message, "BytesList"))
    add("Entry", ("key", one, text, None), ("value", one, message, "Feature"))
    add("Features", ("feature", many, message, "Entry"))
    add("Example", ("features", one, message, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tlbatch.Example"))


_READERS: Mapping[str, Callable[[IO[bytes], Wanted], _Images]] = {
    TAR: _read_tar,
    PARQUET: _read_parquet,
    TFRECORD: _read_tfrecord,
}
