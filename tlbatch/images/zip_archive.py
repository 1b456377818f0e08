"""A zip of images -> its images, read through its central directory; nothing is written to a disk.

Members are read in the order in which they lie in the archive, so that ranges of a remote object are read forwards. Only
stored and deflated members are decompressed: `zipfile` bounds the output of no other method.
"""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator
from typing import IO

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.shards import (
    LINKS,
    MAX_DEFLATE_RATIO,
    ShardImages,
    ShardOptions,
    TornShardError,
    damage_as_torn_shard,
    too_large,
)

#: Maximum size of a central directory, which zipfile reads in one piece: about three million members.
_MAX_DIRECTORY_BYTES = 256 << 20
#: Bytes of a member's own header, without its name and its extra fields.
_HEADER_BYTES = 30
#: General purpose bits (APPNOTE.TXT 4.4.4): the member is encrypted; its name is UTF-8.
_ENCRYPTED, _UTF8 = 0x1, 0x800
#: Names of the methods of compression (APPNOTE.TXT 4.4.5) that programs write today.
_METHODS = {6: "implode", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 96: "jpeg", 98: "ppmd", 99: "AES"}


def read_zip(file: IO[bytes], wanted: ShardOptions) -> ShardImages:
    """Read the members of a zip that have an image suffix; the name is the key, and other members are counted."""
    with damage_as_torn_shard():
        archive = _opened(file)
        for info, room in _with_room(archive):
            name = _name(info).removeprefix("./")
            if info.is_dir() or name.endswith("/"):
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                wanted.skip(LINKS)
            elif wanted.takes(name):
                yield name, _read_member(archive, info, room, wanted)


def has_image_names(file: IO[bytes], field: str | None) -> bool:
    """Whether a zip has a member that is named like an image; only its central directory is read."""
    with damage_as_torn_shard():
        wanted = ShardOptions("", field, 0)
        return any(wanted.takes(_name(info)) for info in _opened(file).infolist())


class _BoundedFile:
    """The file for zipfile, without reads in one piece that are larger than any central directory or image."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        if size > _MAX_DIRECTORY_BYTES:
            raise TornShardError(f"its central directory says that it has {size:,} bytes", ErrorKind.TOO_LARGE)
        return self._file.read(size)


def _opened(file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(_BoundedFile(file))
    except NotImplementedError as error:
        raise TornShardError(f"the kind of zip is not supported: {error}", ErrorKind.UNSUPPORTED) from error
    except zipfile.BadZipFile as error:
        raise TornShardError(f"its central directory, which is at the end, is missing or damaged: {error}") from error


def _with_room(archive: zipfile.ZipFile) -> Iterator[tuple[zipfile.ZipInfo, int]]:
    """The members by their position, each with the bytes from its header to the next one or to the central directory."""
    members = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [info.header_offset for info in members[1:]] + [archive.start_dir]
    for info, end in zip(members, ends, strict=False):  # an empty archive has no members and an end
        yield info, end - info.header_offset


def _name(info: zipfile.ZipInfo) -> str:
    """A member's name. Some programs on Windows separate folders by backslashes, and macOS writes UTF-8 without saying so."""
    name = info.filename
    if not info.flag_bits & _UTF8:
        try:
            name = name.encode("cp437").decode()
        except UnicodeError:
            name = info.filename
    return name.replace("\\", "/")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, room: int, wanted: ShardOptions) -> bytes | Failure:
    refused = _refused(info, room) or too_large(info.file_size, wanted.max_bytes)
    if refused is not None:
        return refused
    try:
        with damage_as_torn_shard(), archive.open(info) as member:
            data = member.read(info.file_size)  # without a size, zipfile would inflate up to 2 GB whatever the member claims
    except TornShardError as error:
        return Failure("read", ErrorKind.DECODE_FAILED, f"the member is damaged: {error}"[:500])
    if len(data) < info.file_size:
        return _claims_too_much(info)
    return wanted.limited(data)


def _refused(info: zipfile.ZipInfo, room: int) -> Failure | None:
    """The failure of a member that is not read, because of what the central directory says about it."""
    if info.flag_bits & _ENCRYPTED:
        return Failure("read", ErrorKind.UNSUPPORTED, "the member is encrypted; store it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        name = _METHODS.get(info.compress_type, f"method {info.compress_type}")
        return Failure("read", ErrorKind.UNSUPPORTED, f"the member is compressed with {name}; store or deflate it")
    if info.compress_size + _HEADER_BYTES > room:
        return Failure("read", ErrorKind.DECODE_FAILED, "the member overlaps the next one, or the central directory")
    most = info.compress_size * (MAX_DEFLATE_RATIO if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    return _claims_too_much(info) if info.file_size > most else None


def _claims_too_much(info: zipfile.ZipInfo) -> Failure:
    message = f"the member claims {info.file_size:,} bytes, more than its {info.compress_size:,} stored bytes hold"
    return Failure("read", ErrorKind.TRUNCATED, message)
