"""A BMP with any colour masks, or with 2 bits a pixel -> its pixels; Pillow reads the other kinds."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

_HEADER = 40
_MASKED = (3, 6)  # BI_BITFIELDS, BI_ALPHABITFIELDS


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height); None if the header is incomplete or of the oldest kind, which Pillow reads."""
    if len(data) < 14 + _HEADER or struct.unpack_from("<I", data, 14)[0] < _HEADER:
        return None
    width, height = struct.unpack_from("<ii", data, 18)
    return max(0, width), abs(height)


def handles(data: bytes) -> bool:
    """Whether a BMP has colour masks, or 2 bits a pixel."""
    if size_of(data) is None:
        return False
    bits, compression = struct.unpack_from("<HI", data, 28)
    return (bits == 2 and compression == 0) or (bits in (16, 32) and compression in _MASKED)


def read(data: bytes) -> Image.Image:
    """The pixels of a BMP that `handles` accepts, as an RGB or RGBA image.

    Raises:
        EOFError: the data ends before the last row.
    """
    (offset,) = struct.unpack_from("<I", data, 10)
    header, width, height, _, bits, compression = struct.unpack_from("<IiiHHI", data, 14)
    stride = (bits * width + 31) // 32 * 4
    body = data[offset : offset + stride * abs(height)]
    if width <= 0 or not height or len(body) < stride * abs(height):
        raise EOFError("the BMP is truncated")
    rows = np.frombuffer(body, np.uint8).reshape(abs(height), stride)
    if height > 0:  # stored from the bottom upwards
        rows = rows[::-1]
    if bits == 2:
        return Image.fromarray(_with_palette(data, header, rows, width))
    values = np.ascontiguousarray(rows).view(f"<u{bits // 8}")[:, :width]
    masks = struct.unpack_from("<4I" if header >= 56 or compression == 6 else "<3I", data, 14 + _HEADER)
    bands = [_band(values, mask) for mask in masks[:3]]
    if len(masks) == 4 and masks[3] and (values & masks[3]).any():  # all zero means: not used
        bands.append(_band(values, masks[3]))
    return Image.fromarray(np.stack(bands, axis=2))


def _band(values: np.ndarray, mask: int) -> np.ndarray:
    """One colour, scaled from the bits of its mask to 8 bits."""
    if not mask:
        return np.zeros(values.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    greatest = mask >> shift
    part = (values.astype(np.uint32) & np.uint32(mask)) >> np.uint32(shift)
    if greatest > 65_535:
        high: np.ndarray = (part >> np.uint32(greatest.bit_length() - 8)).astype(np.uint8)
        return high
    table: np.ndarray = np.rint(np.arange(greatest + 1) * (255 / greatest)).astype(np.uint8)
    found: np.ndarray = table[part]
    return found


def _with_palette(data: bytes, header: int, rows: np.ndarray, width: int) -> np.ndarray:
    """(height, width, 3) colours of 2-bit indices."""
    colours = np.zeros((4, 4), np.uint8)
    stored = np.frombuffer(data[14 + header : 14 + header + 16], np.uint8)
    colours[: len(stored) // 4] = stored[: len(stored) // 4 * 4].reshape(-1, 4)
    indices = (rows[:, :, None] >> np.array([6, 4, 2, 0], np.uint8) & 3).reshape(len(rows), -1)[:, :width]
    return np.ascontiguousarray(colours[indices][..., 2::-1])  # stored as blue, green, red
