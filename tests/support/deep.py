"""Files of more, or fewer, than 8 bits a sample, and colour profiles, made as their specifications say."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _OFFSETS, _BANDS, _ROWS, _COUNTS, _PLANES = (
    *(256, 257, 258, 259, 262, 273, 277, 278, 279, 284),
)
_SAMPLE_FORMAT = 339


def png(samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16-bit samples (height, width, 1 to 4), with these chunks before its pixels."""
    height, width, bands = samples.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def png_chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    """One chunk of a PNG, with the right checksum unless another is given."""
    found = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", found)


def tiff(samples: np.ndarray, bits: int, photometric: int, *, planes: bool = False, **tags: int) -> bytes:
    """A little-endian TIFF of one strip (of one a band, in planes) of samples (height, width, bands).

    Args:
        samples: whole numbers, which are stored in `bits` bits each, or floats, which are stored as they are.
        bits: of one sample.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK.
        planes: whether the bands lie one behind the other.
        tags: further tags of one short, by number: `t338=2`; and `compression`, a number that the pixels do not follow.
    """
    height, width, bands = samples.shape
    compression = tags.pop("compression", 1)
    parts = [samples[..., band : band + 1] for band in range(bands)] if planes else [samples]
    strips = [_packed(part, bits) for part in parts]
    fields: dict[int, tuple[str, list[int]]] = {
        _WIDTH: ("H", [width]),
        _HEIGHT: ("H", [height]),
        _BITS: ("H", [bits] * bands),
        _COMPRESSION: ("H", [compression]),
        _PHOTOMETRIC: ("H", [photometric]),
        _OFFSETS: ("I", [0] * len(strips)),
        _BANDS: ("H", [bands]),
        _ROWS: ("H", [height]),
        _COUNTS: ("I", [len(strip) for strip in strips]),
        _PLANES: ("H", [2 if planes else 1]),
        **{int(name[1:]): ("H", [value] * (bands if int(name[1:]) == _SAMPLE_FORMAT else 1)) for name, value in tags.items()},
    }
    start = 8 + 2 + 12 * len(fields) + 4
    beyond = sum(len(values) * struct.calcsize(code) for code, values in fields.values() if _is_long(code, values))
    at = start + beyond
    for number, strip in enumerate(strips):
        fields[_OFFSETS][1][number] = at
        at += len(strip)
    entries, more = b"", b""
    for tag, (code, values) in sorted(fields.items()):
        body = struct.pack(f"<{len(values)}{code}", *values)
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4}[code], len(values))
        if _is_long(code, values):
            entries += struct.pack("<I", start + len(more))
            more += body
        else:
            entries += body.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + more + b"".join(strips)


def _is_long(code: str, values: list[int]) -> bool:
    return len(values) * struct.calcsize(code) > 4


def _packed(samples: np.ndarray, bits: int) -> bytes:
    """Rows of samples, the most significant bit first, each row padded to a byte."""
    if samples.dtype.kind == "f":
        return samples.tobytes()
    if bits in (8, 16, 32):
        return samples.astype(f"<u{bits // 8}").tobytes()
    rows = samples.reshape(len(samples), -1, 1).astype(np.uint64)
    places = np.arange(bits - 1, -1, -1, dtype=np.uint64)
    return np.packbits((rows >> places & np.uint64(1)).astype(np.uint8).reshape(len(samples), -1), axis=1).tobytes()


def bmp(values: np.ndarray, bits: int, masks: tuple[int, int, int, int]) -> bytes:
    """A BMP, stored from the bottom upwards, of whole pixel values (height, width) and the masks of red, green, blue, alpha."""
    height, width = values.shape
    rows = [row.astype(f"<u{bits // 8}").tobytes() for row in values[::-1]]
    body = b"".join(row + b"\0" * (-len(row) % 4) for row in rows)
    head = struct.pack("<IiiHHIIiiII", 108, width, height, 1, bits, 3, len(body), 0, 0, 0, 0) + struct.pack("<4I", *masks)
    head = head.ljust(108, b"\0")
    return struct.pack("<2sIHHI", b"BM", 14 + 108 + len(body), 0, 0, 14 + 108) + head + body


def gif_pixels(indices: bytes) -> bytes:
    """GIF's own LZW, without any compression: a clear code before each pair of indices of one bit."""
    codes = [code for at in range(0, len(indices), 2) for code in (4, *indices[at : at + 2])]
    bits, out, held = 0, bytearray(), 0
    for code in [*codes, 5]:
        held |= code << bits
        bits += 3
        while bits >= 8:
            out.append(held & 255)
            held, bits = held >> 8, bits - 8
    out.append(held & 255)
    blocks = b"".join(bytes([len(out[at : at + 255])]) + out[at : at + 255] for at in range(0, len(out), 255))
    return b"\x02" + blocks + b"\0"


def profile(primaries: tuple[tuple[float, float], ...], gamma: float, space: bytes = b"RGB ") -> bytes:
    """A version 2 ICC profile: the xy of red, green and blue under D50, and the exponent of the curve; grey has only that."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65_536) for value in values))

    white = np.array([0.9642, 1.0, 0.8249])
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags = {b"desc": name, b"cprt": b"text" + bytes(4) + b"none\0\0\0\0", b"wtpt": b"XYZ " + bytes(4) + fixed(*white)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
        matrix = columns * np.linalg.solve(columns, white)
        for place, letter in enumerate((b"r", b"g", b"b")):
            tags |= {letter + b"XYZ": b"XYZ " + bytes(4) + fixed(*matrix[:, place]), letter + b"TRC": curve}
    table, body, at = b"", b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += padded
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s12s4s", size, bytes(4), 0x02100000, b"mntr", space, b"XYZ ", bytes(12), b"acsp")
    return head.ljust(68, b"\0") + fixed(*white) + bytes(48) + struct.pack(">I", len(tags)) + table + body


#: The primaries of ProPhoto, which are stated under D50, and a curve that is not sRGB's.
WIDE = profile(((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)), 1.8)
