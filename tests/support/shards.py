"""Shards of every format, written by hand."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq

from tlbatch.images.tfrecord import masked_crc
from tlbatch.schema import PARQUET, TAR, TFRECORD, ZIP


def tar_of(images: dict[str, bytes], kind=tarfile.PAX_FORMAT) -> bytes:
    """A tar as WebDataset writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in images.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(images: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip as Kaggle's, with deflated members; equal members give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in images.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def parquet_of(images: dict[str, bytes], **options) -> bytes:
    """Hugging Face's way: a struct of bytes and path."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": data, "path": name} for name, data in images.items()], kind)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"label": list(range(len(images))), "image": column}), buffer, **options)
    return buffer.getvalue()


def example_of(features: dict[str, bytes]) -> bytes:
    """A tf.train.Example in the bytes of the wire, written by hand: each field is its tag, its length, its content."""

    def field(number: int, content: bytes) -> bytes:
        length, size = len(content), b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    entries = [field(1, name.encode()) + field(2, field(1, field(1, value))) for name, value in features.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def record_of(content: bytes) -> bytes:
    """One record of a TFRecord."""
    length = struct.pack("<Q", len(content))
    return length + masked_crc(length) + content + masked_crc(content)


def tfrecord_of(images: dict[str, bytes]) -> bytes:
    """Images as TensorFlow's own data sets keep them."""
    examples = [example_of({"image/filename": name.encode(), "image/encoded": data}) for name, data in images.items()]
    return b"".join(map(record_of, examples))


WRITERS = {TAR: tar_of, PARQUET: parquet_of, TFRECORD: tfrecord_of, ZIP: zip_of}
