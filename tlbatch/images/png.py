"""The chunks of a PNG: the depth that its samples really have, and a copy without text that a decoder refuses."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
#: Bands of colour by the colour type in the header; gray, and gray with alpha, have one.
_COLOURS = {2: 3, 3: 3, 6: 3}


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a PNG, damaged or not: type, and where the chunk begins and ends in `data`."""
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = min(at + 12 + length, len(data))
        yield data[at + 4 : at + 8], at, end
        at = end


def bit_depth(data: bytes) -> int:
    """Bits of a sample as the file stores it; 0 if the data ends before that."""
    return data[24] if data[12:16] == b"IHDR" and len(data) > 24 else 0


def significant_bits(data: bytes) -> int | None:
    """Bits of a sample that the original had, by the chunk sBIT; None if there is none before the pixels."""
    for kind, start, end in chunks(data):
        if kind == b"sBIT" and end - start > 12:
            return max(data[start + 8 : end - 4][: _COLOURS.get(data[25], 1)])
        if kind == b"IDAT":
            break
    return None


def simpler(data: bytes) -> bytes | None:
    """The PNG without its text and what is damaged beside its pixels, or else without its profile; None if it has neither.

    A decoder refuses a picture for a long text, a wrong checksum in a chunk that it does not need, or a profile of more than a
    megabyte.
    """
    for is_needless in (_is_text_or_damaged, _is_profile):
        kept = [data[start:end] for kind, start, end in chunks(data) if not is_needless(kind, data[start:end])]
        plain = SIGNATURE + b"".join(kept)
        if len(plain) < len(data):
            return plain
    return None


def _is_text_or_damaged(kind: bytes, chunk: bytes) -> bool:
    if kind in _TEXT:
        return True
    ancillary = kind[:1].islower() and kind != b"tRNS"  # which changes the picture
    return ancillary and zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big")


def _is_profile(kind: bytes, _: bytes) -> bool:
    return kind == b"iCCP"


def declared_white(samples: np.ndarray, significant: int | None) -> float | None:
    """The value that is white in 16-bit samples of which the file says how many bits are significant; None if it does not.

    The PNG specification (section 11.3.2.3) wants samples scaled to 16 bits. Many cameras leave them as they were. Samples that
    exceed the significant bits are scaled, and so are samples whose low bits are zeros or a copy of the high bits.
    """
    if significant is None or not 8 <= significant <= 16:
        return None
    if significant == 16:
        return 65_535
    white = 2**significant - 1
    if int(samples.max(initial=0)) > white:
        return 65_535
    high = samples >> (16 - significant)
    shifted = high << (16 - significant)
    scaled = (shifted == samples).all() or (shifted | high >> (2 * significant - 16) == samples).all()
    return 65_535 if scaled and samples.any() else white
