"""The header of a JPEG XL -> its width and height, so that its size is known before it is decoded."""

from __future__ import annotations

import struct

CODESTREAM, CONTAINER = b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"
#: Bits of the four forms of a large dimension, and width : height of the seven fixed ratios (ISO/IEC 18181-1, annex D.2).
_LARGE = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height) as stored, before its orientation is applied; None if the header is incomplete."""
    start = _codestream(data)
    header = start[2:18]
    if len(header) < 10:
        return None
    bits = _Bits(int.from_bytes(header, "little"))
    small = bits.take(1)
    height = 8 * (bits.take(5) + 1) if small else bits.large()
    ratio = bits.take(3)
    if ratio:
        wide, high = _RATIOS[ratio - 1]
        return height * wide // high, height
    return (8 * (bits.take(5) + 1) if small else bits.large()), height


def _codestream(data: bytes) -> bytes:
    """The first bytes of the codestream; empty if there is none."""
    if data.startswith(CODESTREAM):
        return data[:18]
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1 and at + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        if kind in (b"jxlc", b"jxlp"):
            body = at + head + 4 * (kind == b"jxlp")  # a part begins with its number
            return data[body : body + 18]
        if length < head:
            return b""
        at += length
    return b""


class _Bits:
    """Bits of a codestream, the lowest first."""

    def __init__(self, value: int) -> None:
        self._value = value

    def take(self, count: int) -> int:
        found = self._value & ((1 << count) - 1)
        self._value >>= count
        return found

    def large(self) -> int:
        return self.take(_LARGE[self.take(2)]) + 1
