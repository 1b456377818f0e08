"""A TFRecord of `tf.train.Example` -> its images, without TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import IO, Any

import google_crc32c

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.shards import (
    BUFFER_BYTES,
    IMAGE_FIELDS,
    KEY_FIELDS,
    ShardImages,
    ShardOptions,
    TornShardError,
    damage_as_torn_shard,
    decompressed,
)


def read_tfrecord(file: IO[bytes], wanted: ShardOptions) -> ShardImages:
    """Read records of `tf.train.Example`; a wrong checksum of data loses one record, a wrong checksum of a length the rest."""
    with decompressed(file) as plain, damage_as_torn_shard():
        position = 0
        while header := _exactly(plain, 12, or_end=True):
            (length,) = struct.unpack("<Q", header[:8])
            if masked_crc(header[:8]) != header[8:]:
                raise TornShardError("the checksum of a record's length is wrong")
            name = f"{wanted.key}/{position:08d}"
            position += 1
            if length > wanted.max_bytes:
                _skip(plain, length + 4)
                message = f"a record of {length:,} bytes exceeds max_bytes={wanted.max_bytes}"
                yield name, Failure("read", ErrorKind.TOO_LARGE, message)
                continue
            body = _exactly(plain, length + 4)
            if masked_crc(body[:-4]) != body[-4:]:
                yield name, Failure("read", ErrorKind.DECODE_FAILED, "the record's checksum is wrong")
            else:
                yield _from_example(body[:-4], name, wanted)


def _exactly(file: IO[bytes], size: int, *, or_end: bool = False) -> bytes:
    data = file.read(size)
    if len(data) != size and (data or not or_end):
        raise TornShardError(f"a record ends after {len(data)} of {size} bytes")
    return data


def _skip(file: IO[bytes], size: int) -> None:
    while size > 0:
        size -= len(_exactly(file, min(size, BUFFER_BYTES)))


def masked_crc(data: bytes) -> bytes:
    """TFRecord's checksum: CRC-32C, rotated and with a constant added, so that a checksum of checksums is not zero."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _from_example(record: bytes, name: str, wanted: ShardOptions) -> tuple[str, bytes | Failure]:
    from google.protobuf.message import DecodeError

    try:
        example = _example_type().FromString(record)
    except DecodeError as error:
        return name, Failure("read", ErrorKind.DECODE_FAILED, f"the record is not a tf.train.Example: {error}")
    values = {feature.key: feature.value.bytes_list.value for feature in example.features.feature}
    key = _first(values, KEY_FIELDS)
    fields = (wanted.field,) if wanted.field else IMAGE_FIELDS
    data = _first(values, fields)
    if data is None:
        features = b", ".join(sorted(values)).decode(errors="backslashreplace")
        message = f"the record has no bytes in feature {fields[0]!r}; its features are {features[:300]}"
        return name, Failure("read", ErrorKind.UNSUPPORTED, message)
    return key.decode(errors="backslashreplace") if key else name, wanted.limited(data)


def _first(values: Mapping[bytes, Sequence[bytes]], names: Sequence[str]) -> bytes | None:
    return next((values[name.encode()][0] for name in names if values.get(name.encode())), None)


@cache
def _example_type() -> Any:
    """The part of the message `tf.train.Example` that is needed, without TensorFlow; unknown fields are skipped.

    Source: tensorflow/core/example/{example,feature}.proto. Names are bytes here, because they may not be valid text.
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
