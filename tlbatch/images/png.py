"""The chunks of a PNG: the depth that its samples really have, and a copy without text that a decoder refuses."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")


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
            return max(data[start + 8 : end - 4][:3])
        if kind == b"IDAT":
            break
    return None


def without(data: bytes, *kinds: bytes) -> bytes:
    """The PNG without chunks of these types."""
    return SIGNATURE + b"".join(data[start:end] for kind, start, end in chunks(data) if kind not in kinds)


def simpler(data: bytes) -> bytes | None:
    """The PNG without its text, or, if it has none, without its colour profile; None if it has neither.

    A decoder refuses a picture for a long text, a wrong checksum in one, or a profile of more than a megabyte.
    """
    for kinds in (_TEXT, (b"iCCP",)):
        plain = without(data, *kinds)
        if len(plain) < len(data):
            return plain
    return None


def declared_white(samples: np.ndarray, significant: int | None) -> float | None:
    """The value that is white in 16-bit samples of which the file says how many bits are significant; None if it does not.

    The PNG specification (section 11.3.2.3) wants samples scaled to 16 bits. Many cameras leave them as they were. Samples that
    exceed the significant bits are scaled, and so are samples whose low bits are zeros or a copy of the high bits.
    """
    if significant is None or not 8 <= significant < 16:
        return None
    white = 2**significant - 1
    if int(samples.max(initial=0)) > white:
        return 65_535
    high = samples >> (16 - significant)
    shifted = high << (16 - significant)
    scaled = (shifted == samples).all() or (shifted | high >> (2 * significant - 16) == samples).all()
    return 65_535 if scaled and samples.any() else white
