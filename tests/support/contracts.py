"""What each reader of strangers' bytes promises for any bytes at all, and files to begin with: for fuzzers of both kinds."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image

from support.hostile import corpus, saved
from support.shards import parquet_of, tar_of, tfrecord_of, zip_of
from tlbatch.errors import BundleError, ErrorKind, Failure
from tlbatch.images import decode
from tlbatch.images.members import read_members
from tlbatch.images.shards import ShardOptions
from tlbatch.images.tfrecord import masked_crc
from tlbatch.model import bundle
from tlbatch.schema import NEW_RULES, PARQUET, TAR, TFRECORD, ZIP

MAX_BYTES = 1 << 20


def check_decode(data: bytes) -> None:
    """Pixels of the asked size, or a failure of the closed set with a sentence."""
    found = decode.decode(data, (64, 64), max_pixels=1_000_000, rules=NEW_RULES)
    if isinstance(found, Failure):
        require(found.kind in ErrorKind and found.stage == "decode" and bool(found.message))
    else:
        require(found.array.shape == (64, 64, 3) and found.width * found.height <= 8_000_000)  # of a JPEG
    decode.thumbnail(data, max_pixels=1_000_000)


def check_tar(data: bytes) -> None:
    """As it is, and with headers whose checksums are right: mutation alone does not get past them."""
    check_shard(TAR, data)
    mended = bytearray(data)
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            block = data[start : start + 148] + b" " * 8 + data[start + 156 : start + 512]
            mended[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    check_shard(TAR, bytes(mended))


def check_tfrecord(data: bytes) -> None:
    """As it is, and with right checksums."""
    check_shard(TFRECORD, data)
    mended, start = b"", 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        record = data[start + 12 : start + 12 + min(length, len(data))]
        mended += data[start : start + 8] + masked_crc(data[start : start + 8]) + record + masked_crc(record)
        start += 16 + len(record)
    check_shard(TFRECORD, mended)


def check_zip(data: bytes) -> None:
    """As it is, and with right checksums of what its members hold."""
    check_shard(ZIP, data)
    mended, start = bytearray(data), data.find(b"PK\1\2")
    while 0 <= start <= len(data) - 46:
        method, packed, claimed, offset = struct.unpack_from("<10xH8xII14xI", data, start)
        lengths = data[offset + 26 : offset + 30].ljust(4, b"\0")
        begin = offset + 30 + sum(struct.unpack("<HH", lengths))
        body = data[begin : begin + packed]
        with contextlib.suppress(zlib.error):
            body = zlib.decompressobj(-15).decompress(body, MAX_BYTES) if method == zipfile.ZIP_DEFLATED else body
            struct.pack_into("<I", mended, start + 16, zlib.crc32(body[:claimed]))
        start = data.find(b"PK\1\2", start + 4)
    check_shard(ZIP, bytes(mended))


def check_shard(kind: str, data: bytes) -> None:
    """At least one member; numbers without a gap, names that can stand in a table, bytes within the limit."""
    wanted = ShardOptions("s", None, MAX_BYTES)
    count = 0
    for count, member in enumerate(read_members(kind, io.BytesIO(data), wanted), 1):
        require(member.index == count - 1)
        member.key.encode()
        if isinstance(member.data, Failure):
            require(member.data.kind in ErrorKind and bool(member.data.message))
        else:
            require(0 < len(member.data) <= MAX_BYTES)
    require(count > 0)


def check_bundle(data: bytes) -> None:
    """A bundle whose every property can be read, or one sentence."""
    FOLDER.joinpath(bundle.BUNDLE).write_bytes(data)
    try:
        found = bundle.load_bundle(str(FOLDER))
    except BundleError as error:
        require("\n" not in str(error))
        return
    require([type(side) for side in found.size] == [int, int] and min(found.size) > 0)
    require(all(isinstance(label, str) for label in found.labels))
    require(found.features_length > 0 and len(found.base_digest) == 64)
    _ = found.abstain_threshold, found.label_thresholds, found.for_run
    require(all((FOLDER / name).resolve().is_relative_to(FOLDER.resolve()) for name in found.facts["files"]))


def require(holds: bool) -> None:
    """Stop the fuzzer where something does not hold, with `python -O` as well."""
    if not holds:
        raise RuntimeError("the reader broke its word")


_KEPT = tempfile.TemporaryDirectory(prefix="tlbatch-promises-")  # until this process ends
FOLDER = Path(_KEPT.name)

TARGETS: dict[str, Callable[[bytes], None]] = {
    "decode": check_decode,
    "tar": check_tar,
    "tfrecord": check_tfrecord,
    "parquet": lambda data: check_shard(PARQUET, data),
    "zip": check_zip,
    "bundle": check_bundle,
}


@cache
def seeds(target: str) -> list[bytes]:
    """Valid files, small, and hostile ones."""
    small = {f"{number}.png": _tiny(number, "PNG") for number in range(3)}
    tar = tar_of(small)
    odd = [one.data for one in corpus() if len(one.data) < 16_384] if target == "decode" else []
    return {
        "decode": [*odd, *(_tiny(1, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"))],
        "tar": [tar, gzip.compress(tar), tar_of({"n" * 300 + ".jpg": b""})],
        "tfrecord": [tfrecord_of(small)],
        "parquet": [parquet_of(small, row_group_size=2), parquet_of(small, use_dictionary=False)],
        "zip": [zip_of(small), zip_of(small, zipfile.ZIP_STORED), zip_of({"n" * 300 + ".jpg": b""})],
        "bundle": [json.dumps(FACTS).encode()],
    }[target]


def _tiny(number: int, kind: str) -> bytes:
    return saved(Image.new("RGB", (12 + number, 9), (200, 10 * number, 30)), kind)


_DIGEST = "0" * 64
FACTS = {
    "format_version": 1,
    "base": {"name": "MobileNetV2", "weights": "random", "weights_digest": _DIGEST, "scaling": "tf"},
    "input": {"size": [96, 96], "resize": "stretch", "interpolation": "bilinear", "color": "rgb"},
    "features_length": 1280,
    "labels": ["a", "b"],
    "abstain_threshold": 0.5,
    "label_thresholds": None,
    "files": {"model.keras": _DIGEST, "openvino/model.xml": _DIGEST},
}
