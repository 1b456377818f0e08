"""A TFRecord of `tf.train.Example` -> its images, without TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from typing import IO, Any, NoReturn

import google_crc32c

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.shards import (
    BUFFER_BYTES,
    ID_FIELDS,
    IMAGE_FIELDS,
    KEY_FIELDS,
    ShardImages,
    ShardOptions,
    TornShardError,
    damage_as_torn_shard,
    decompressed,
    looks_like_image,
)

#: First bytes of a file of Riegeli, which ArrayRecord is built on.
RIEGELI = b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f"
_OTHER_NAMES = (".array_record", ".riegeli")
_IMAGES = tuple(name.encode() for name in IMAGE_FIELDS)
_KEYS = tuple(name.encode() for name in (*KEY_FIELDS, *ID_FIELDS))


def read_tfrecord(file: IO[bytes], wanted: ShardOptions) -> ShardImages:
    """Read records of `tf.train.Example`; a wrong checksum of data loses one record, a wrong checksum of a length the rest."""
    with decompressed(file) as plain, damage_as_torn_shard():
        position = 0
        while header := _exactly(plain, 12, or_end=True):
            (length,) = struct.unpack("<Q", header[:8])
            if masked_crc(header[:8]) != header[8:]:
                _raise_wrong_length(header, position, wanted.key)
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
                yield from images_of_example(body[:-4], name, wanted)


def _raise_wrong_length(header: bytes, position: int, key: str) -> NoReturn:
    """Say why the next record cannot be found."""
    if position:
        raise TornShardError("the checksum of a record's length is wrong")
    if header.startswith(RIEGELI) or any(name in key.rsplit("/", 1)[-1].lower() for name in _OTHER_NAMES):
        raise TornShardError(
            "it is an ArrayRecord or Riegeli file, which tlbatch does not read; write the data set as TFRecord "
            "(TFDS: `file_format='tfrecord'`)",
            ErrorKind.UNSUPPORTED,
        )
    raise TornShardError("the checksum of its first record's length is wrong: it is damaged, or is no TFRecord")


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


def images_of_example(record: bytes, name: str, wanted: ShardOptions) -> ShardImages:
    """The images of a serialized `tf.train.Example`: the values of one feature, by their keys or else by `name`."""
    from google.protobuf.message import DecodeError

    try:
        example = _example_type().FromString(record)
    except DecodeError as error:
        yield name, Failure("read", ErrorKind.DECODE_FAILED, f"the record is not a tf.train.Example: {error}")
        return
    features = {feature.key: feature.value for feature in example.features.feature}
    key = _key(features) or name
    asked = (wanted.field.encode(),) if wanted.field else _IMAGES
    taken = next((name for name in asked if name in features and features[name].bytes_list.value), None)
    if taken is None:
        named = b", ".join(sorted(features)).decode(errors="backslashreplace")
        message = f"the record has no bytes in feature {wanted.field or IMAGE_FIELDS[0]!r}; its features are {named[:300]}"
        yield name, Failure("read", ErrorKind.UNSUPPORTED, message)
        return
    for other, feature in () if wanted.field else features.items():
        values = feature.bytes_list.value
        if other != taken and values and looks_like_image(values[0]):
            wanted.skip(f"feature {other.decode(errors='backslashreplace')}", len(values))
    images = features[taken].bytes_list.value
    for place, data in enumerate(images):
        yield key if len(images) == 1 else f"{key}/{place}", wanted.limited(data)


def is_example(record: bytes) -> bool:
    """Whether bytes are a serialized `tf.train.Example` with any feature."""
    from google.protobuf.message import DecodeError

    try:
        return bool(_example_type().FromString(record).features.feature)
    except DecodeError:
        return False


def _key(features: Mapping[bytes, Any]) -> str | None:
    """The first usual feature of text, or else of integers; None if there is none."""
    named = [features[name] for name in _KEYS if name in features]
    texts = (feature.bytes_list.value for feature in named)
    text = next((values[0] for values in texts if values and values[0]), None)
    if text is not None:
        return str(text.decode(errors="backslashreplace"))
    numbers = (feature.int64_list.value for feature in named)
    return next((str(values[0]) for values in numbers if values), None)


@cache
def _example_type() -> Any:
    """The part of the message `tf.train.Example` that is needed, without TensorFlow; unknown fields are skipped.

    Source: tensorflow/core/example/{example,feature}.proto. Names are bytes here, because they may not be valid text.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="tlbatch_example.proto", package="tlbatch", syntax="proto3")
    text, message = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES, descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
    one, many = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL, descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED

    def add(name: str, *fields: tuple[str, int, int, int, str | None]) -> None:
        kind = file.message_type.add(name=name)
        for field, number, label, of, type_name in fields:
            kind.field.add(name=field, number=number, label=label, type=of, type_name=type_name and f".tlbatch.{type_name}")

    add("BytesList", ("value", 1, many, text, None))
    add("Int64List", ("value", 1, many, descriptor_pb2.FieldDescriptorProto.TYPE_INT64, None))
    add("Feature", ("bytes_list", 1, one, message, "BytesList"), ("int64_list", 3, one, message, "Int64List"))
    add("Entry", ("key", 1, one, text, None), ("value", 2, one, message, "Feature"))
    add("Features", ("feature", 1, many, message, "Entry"))
    add("Example", ("features", 1, one, message, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tlbatch.Example"))
