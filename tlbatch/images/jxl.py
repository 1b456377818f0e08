"""The header of a JPEG XL -> its size, so that it is known before it is decoded, and the depth of its samples.

Sources: ISO/IEC 18181-1, annex D (the bundles SizeHeader and ImageMetadata); 18181-2 for the container.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

CODESTREAM, CONTAINER = b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"
#: Bits of the four forms of a large dimension, and width : height of the seven fixed ratios.
_LARGE = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_DEPTHS, _FLOAT_DEPTHS = (8, 10, 12), (32, 16, 24)
_MOST_HEADER = 64


class Header(NamedTuple):
    """What the first bytes say: width and height as stored, and the bits of a sample, None where that is not looked for."""

    width: int
    height: int
    bits: int | None
    is_float: bool = False


def read_header(data: bytes) -> Header:
    """Read the header of a file, with or without its container.

    Raises:
        EOFError: the header is incomplete.
    """
    start = _codestream(data)
    if not start.startswith(CODESTREAM) or len(start) < 10:
        raise EOFError("the header of the JPEG XL is incomplete")
    bits = _Bits(start[2:])
    width, height = _size(bits)
    if bits.take(1):  # all metadata has its default
        return Header(width, height, 8)
    if bits.take(1):
        bits.take(3)  # orientation
        if bits.take(1):
            _size(bits)  # how large it is meant to be shown
        if bits.take(2):  # a preview or an animation, whose headers follow
            return Header(width, height, None)
    is_float = bool(bits.take(1))
    form = bits.take(2)
    depth = bits.take(6) + 1 if form == 3 else (_FLOAT_DEPTHS if is_float else _DEPTHS)[form]
    return Header(width, height, depth, is_float)


def _size(bits: _Bits) -> tuple[int, int]:
    """(width, height) of a SizeHeader."""
    small = bits.take(1)
    height = 8 * (bits.take(5) + 1) if small else bits.large()
    ratio = bits.take(3)
    if ratio:
        wide, high = _RATIOS[ratio - 1]
        return height * wide // high, height
    return (8 * (bits.take(5) + 1) if small else bits.large()), height


def _codestream(data: bytes) -> bytes:
    """The first bytes of the codestream, which a container may hold in several parts."""
    if data.startswith(CODESTREAM):
        return data[:_MOST_HEADER]
    at, found = 0, b""
    while at + 8 <= len(data) and len(found) < _MOST_HEADER:
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1 and at + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        end = at + length if length else len(data)  # 0: to the end of the file
        if end < at + head:
            break
        body = at + head + 4 * (kind == b"jxlp")  # a part begins with its number
        if kind in (b"jxlc", b"jxlp"):
            found += data[body : min(end, body + _MOST_HEADER)]
        at = end
    return found[:_MOST_HEADER]


class _Bits:
    """Bits of a codestream, the lowest first."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        found = self._value & ((1 << count) - 1)
        self._value >>= count
        return found

    def large(self) -> int:
        return self.take(_LARGE[self.take(2)]) + 1
