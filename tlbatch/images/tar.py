"""A WebDataset tar -> its images."""

from __future__ import annotations

import io
import tarfile
from typing import IO

from tlbatch.errors import Failure
from tlbatch.images.shards import (
    BUFFER_BYTES,
    LINKS,
    MAX_DEFLATE_RATIO,
    ShardImages,
    ShardOptions,
    TornShardError,
    damage_as_torn_shard,
    decompressed,
    too_large,
)

#: Maximum size of a tar header with a name or other text; a longer header is damage.
_MAX_HEADER_BYTES = 1 << 20
#: Bytes of an archive, once it is decompressed, in which a member that is named like an image is looked for; and at a time.
_MOST_LOOKED_INTO = 64 << 20
_LOOKED_INTO_AT_ONCE = 1 << 16
#: Most blocks of zeros behind which another archive is looked for; programs fill up to records of 10 KiB, or 1 MiB for tapes.
_MOST_ZEROS = (8 << 20) // tarfile.BLOCKSIZE


class _Header(tarfile.TarInfo):
    """A tar header that records on its archive how the headers ended; tarfile mistakes damage between members for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _TEXT_HEADERS and header.size > _MAX_HEADER_BYTES:
            raise _InvalidError(f"a header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        zeros = 0
        while True:
            try:
                return super().fromtarfile(archive)
            except tarfile.HeaderError as error:
                if isinstance(error, _ZerosError) and zeros < _MOST_ZEROS:  # another archive may follow: `cat a.tar b.tar`
                    zeros, end = zeros + 1, error
                    continue
                # All programs ignore what is no header behind two blocks of zeros; behind a single one it is damage.
                ignored = (*_NOTHING, _InvalidError) if zeros > 1 else _NOTHING if zeros else ()
                archive.ended_by = end if isinstance(error, ignored) else error  # type: ignore[attr-defined]
                raise archive.ended_by from None  # type: ignore[attr-defined]


_ZerosError = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_InvalidError = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
_NOTHING = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]


_TEXT_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def read_tar(file: IO[bytes], wanted: ShardOptions) -> ShardImages:
    """Read the members of a WebDataset tar that have an image suffix; the name is the key, and other members are counted."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    with decompressed(file) as plain, damage_as_torn_shard():
        most = tarfile.BLOCKSIZE + (end if plain is file else end * MAX_DEFLATE_RATIO)
        with tarfile.open(fileobj=plain, mode="r|", bufsize=BUFFER_BYTES, tarinfo=_Header) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
                if archive.offset > most:  # tarfile would read past the end, practically forever
                    raise TornShardError(f"a member of {member.size:,} bytes extends past the end of the archive")
                name = _text(member.name).removeprefix("./")  # which `tar cf x.tar .` writes before every name
                if member.isreg():
                    if wanted.takes(name):
                        yield name, _read_member(archive, member, wanted)
                elif not member.isdir():
                    wanted.skip(LINKS if member.issym() or member.islnk() else "special files")
            ended_by = getattr(archive, "ended_by", None)
        if not isinstance(ended_by, _ZerosError):
            raise TornShardError(f"the archive has no end-of-archive marker: {ended_by}")


def has_image_names(file: IO[bytes], field: str | None) -> bool:
    """Whether a tar has a member that is named like an image, or is empty, or too long or too damaged to tell."""
    wanted, empty = ShardOptions("", field, 0), True
    with (
        decompressed(file) as plain,
        damage_as_torn_shard(),
        tarfile.open(fileobj=plain, mode="r|", bufsize=_LOOKED_INTO_AT_ONCE, tarinfo=_Header) as archive,
    ):
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]
            empty = False
            if archive.offset > _MOST_LOOKED_INTO or (member.isreg() and wanted.takes(_text(member.name))):
                return True
        return empty or not isinstance(getattr(archive, "ended_by", None), _ZerosError)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, wanted: ShardOptions) -> bytes | Failure:
    refused = too_large(member.size, wanted.max_bytes)
    if refused is not None:
        return refused
    content = archive.extractfile(member)
    return wanted.limited(content.read() if content is not None else None)


def _text(name: str) -> str:
    """A name as valid UTF-8 text: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
