"""A zip gives every image it holds; a member that cannot be read costs itself, and a missing directory is one row."""

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
from support.shards import zip_of

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images import zip_archive
from tlbatch.images.listing import Selection, list_store
from tlbatch.images.members import read_members
from tlbatch.images.shards import Member, ShardOptions
from tlbatch.schema import ZIP
from tlbatch.storage.range_file import RangeFile
from tlbatch.storage.resolve import resolve

IMAGES = {f"dir/{number}.jpg": np.random.default_rng(number).bytes(3000 + number) for number in range(4)}
#: Positions of fields in a member's header of the central directory.
FLAGS, METHOD, CHECKSUM, PACKED, SIZE, OFFSET = 8, 10, 16, 20, 24, 42


def members(data: bytes, skipped: Counter | None = None, max_bytes: int = 1 << 20) -> list[Member]:
    wanted = ShardOptions("s/x.zip", None, max_bytes, (), Counter() if skipped is None else skipped)
    return list(read_members(ZIP, io.BytesIO(data), wanted))


def changed(data: bytes, number: int, field: int, value: bytes) -> bytes:
    """An archive in which a field of a member's header in the directory, and of its own header, has another value."""
    found, start = bytearray(data), -1
    for _ in range(number + 1):
        start = data.index(b"PK\1\2", start + 1)
    (offset,) = struct.unpack_from("<I", data, start + OFFSET)
    found[start + field : start + field + len(value)] = value
    if field != OFFSET:
        found[offset + field - 2 : offset + field - 2 + len(value)] = value
    return bytes(found)


def only_failure(data: bytes, number: int = 1, **options) -> Failure:
    """The failure of one member, while all the others are read."""
    found = members(data, **options)
    assert [one.key for one in found] == list(IMAGES)
    assert [one.data for one in found if one.index != number] == [data for n, data in enumerate(IMAGES.values()) if n != number]
    assert isinstance(found[number].data, Failure), found[number]
    return found[number].data


@pytest.mark.parametrize(
    ("field", "value", "kind", "words"),
    [
        (FLAGS, b"\1\0", ErrorKind.UNSUPPORTED, "encrypted"),
        (METHOD, struct.pack("<H", 9), ErrorKind.UNSUPPORTED, "compressed with deflate64"),
        (METHOD, struct.pack("<H", 14), ErrorKind.UNSUPPORTED, "compressed with lzma"),
        (METHOD, struct.pack("<H", 77), ErrorKind.UNSUPPORTED, "compressed with method 77"),
        (CHECKSUM, b"\0\0\0\0", ErrorKind.DECODE_FAILED, "CRC-32"),
        (SIZE, struct.pack("<I", 2_000), ErrorKind.DECODE_FAILED, "CRC-32"),
        (SIZE, struct.pack("<I", 4_000), ErrorKind.TRUNCATED, "claims 4,000 bytes"),
        (PACKED, struct.pack("<I", 9_000), ErrorKind.DECODE_FAILED, "overlaps"),
    ],
)
def test_a_member_that_cannot_be_read_costs_only_itself(field, value, kind, words):
    failure = only_failure(changed(zip_of(IMAGES), 1, field, value))
    assert failure.kind is kind
    assert words in failure.message


def test_a_member_without_its_own_header_costs_only_itself():
    data = zip_of(IMAGES)
    second = data.index(b"PK\3\4", 4)
    failure = only_failure(data[:second] + b"gone" + data[second + 4 :])
    assert failure.kind is ErrorKind.DECODE_FAILED
    assert "the member is damaged" in failure.message


def test_two_members_that_share_their_bytes_are_refused():
    """The usual way to make a small archive large."""
    data = zip_of(IMAGES)
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    found = members(changed(data, 2, OFFSET, data[second + OFFSET : second + OFFSET + 4]))
    assert "overlaps" in next(one.data.message for one in found if isinstance(one.data, Failure))
    assert sum(isinstance(one.data, bytes) for one in found) <= 3


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_more_bytes_than_the_limit_are_not_decompressed(method):
    failure = only_failure(zip_of(IMAGES, method), number=3, max_bytes=3002)
    assert failure.kind is ErrorKind.TOO_LARGE


def test_a_member_gives_no_more_bytes_than_it_claims():
    """It claims 100 bytes and inflates to 8 MiB; `ZipFile.read` would make all of them before it cuts."""
    whole = bytes(8 << 20)
    claimed = changed(zip_of({"a.jpg": whole}), 0, SIZE, struct.pack("<I", 100))
    claimed = changed(claimed, 0, CHECKSUM, struct.pack("<I", zlib.crc32(whole[:100])))
    tracemalloc.start()
    (only,) = members(claimed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert only.data == whole[:100]
    assert peak < 1 << 20


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
def test_an_archive_without_its_directory_is_one_row(cut):
    data = zip_of(IMAGES)
    (only,) = members(data[: int(len(data) * cut)])
    assert (only.key, only.data.kind) == ("s/x.zip", ErrorKind.TRUNCATED)
    assert "central directory, which is at the end, is missing or damaged" in only.data.message


def test_a_directory_over_the_limit_is_not_read(monkeypatch):
    data = zip_of(IMAGES)
    size = struct.unpack_from("<I", data, len(data) - 10)[0]
    monkeypatch.setattr(zip_archive, "_MAX_DIRECTORY_BYTES", size)
    assert len(members(data)) == 4
    monkeypatch.setattr(zip_archive, "_MAX_DIRECTORY_BYTES", size - 1)
    (only,) = members(data)
    assert only.data.kind is ErrorKind.TOO_LARGE


def test_zip64_and_bytes_before_the_archive(monkeypatch):
    expected = list(IMAGES.values())
    assert [one.data for one in members(b"#!/bin/sh\n" * 100 + zip_of(IMAGES))] == expected
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in IMAGES.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(data)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)  # so that the directory is of Zip64, too
    assert b"PK\6\6" in buffer.getvalue()
    assert [one.data for one in members(buffer.getvalue())] == expected


def test_names_of_other_systems():
    """Backslashes as on Windows, UTF-8 that does not say so as on macOS, and a name in code page 437."""
    data = zip_of({"a\\b.jpg": b"1", "Zo__.jpg": b"2", "Zo_.jpg": b"3", "größe.jpg": b"4"})
    data = data.replace(b"Zo__.jpg", "Zoë.jpg".encode()).replace(b"Zo_.jpg", "Zoë.jpg".encode("cp437"))
    assert [one.key for one in members(data)] == ["a/b.jpg", "Zoë.jpg", "Zoë.jpg", "größe.jpg"]


def test_what_is_no_image_is_counted_by_kind():
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, b"1.jpg")
        archive.mkdir("folder.jpg")
        for name in ("1.jpg", "1.JSON", "1.txt", "__MACOSX/1.jpg", "._2.jpg", "film.mp4", "README", "more.tar"):
            archive.writestr(name, b"x")
    skipped = Counter()
    assert [one.key for one in members(buffer.getvalue(), skipped)] == ["1.jpg"]
    assert skipped == {"links": 1, "sidecars": 2, "._*": 1, "__MACOSX": 1, ".mp4": 1, "no suffix": 1, ".tar": 1}


def test_an_archive_is_read_forwards_whatever_the_order_of_its_directory():
    data = zip_of({f"{number}.jpg": np.random.default_rng(number).bytes(100_000) for number in range(20)}, zipfile.ZIP_STORED)
    parts = data[: (start := data.index(b"PK\1\2"))], data[start : (end := data.index(b"PK\5\6"))], data[end:]
    entries = parts[1].split(b"PK\1\2")[1:]
    data = parts[0] + b"".join(b"PK\1\2" + one for one in reversed(entries)) + parts[2]
    asked = []

    def fetch(start: int, end: int) -> bytes:
        asked.append(end - start)
        return data[start:end]

    with RangeFile(fetch, len(data)) as file:
        file._PIECE = 256 << 10
        found = list(read_members(ZIP, io.BufferedReader(file), ShardOptions("s", None, 1 << 20)))
    assert [one.key for one in found] == [f"{number}.jpg" for number in range(20)]
    assert all(isinstance(one.data, bytes) for one in found)
    assert sum(asked) < len(data) + (1 << 20)


def test_a_zip_without_images_is_skipped_where_others_are(tmp_path):
    texts, alone = zip_of({"labels.csv": b"a,b", "__MACOSX/._x.jpg": b""}), tmp_path / "alone"
    alone.mkdir()
    for folder in (tmp_path, alone):
        (folder / "labels.csv.zip").write_bytes(texts)
    (tmp_path / "images.zip").write_bytes(zip_of(IMAGES))
    (tmp_path / "torn.zip").write_bytes(zip_of(IMAGES)[:-30])
    listing = list_store(resolve(str(tmp_path)), Selection(exclude=["alone/*"]), locate=resolve)
    assert listing.manifest["key"].to_pylist() == ["images.zip", "torn.zip"]
    assert listing.skipped_by_kind["zip without images"] == 1
    listing = list_store(resolve(str(alone)), Selection(), locate=resolve)
    assert listing.manifest.select(["key", "format"]).to_pylist() == [{"key": "labels.csv.zip", "format": "zip"}]


def test_a_zip_is_known_by_its_first_bytes(tmp_path):
    (tmp_path / "0a1b").write_bytes(zip_of(IMAGES))
    listing = list_store(resolve(str(tmp_path)), Selection(include=["*"]), locate=resolve)
    assert listing.manifest["format"].to_pylist() == ["zip"]
