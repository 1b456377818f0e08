"""Images that strangers upload, made here: formats by defects, each with what must become of it."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from tlbatch.errors import ErrorKind

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
#: What half an image may be told to be: its decoder says whether it missed bytes or met wrong ones.
TORN = {ErrorKind.TRUNCATED, ErrorKind.DECODE_FAILED}
FINE: set[ErrorKind] = set()


class Odd(NamedTuple):
    """An image: `expected` is empty where it must be predicted, else the kinds of error it may be."""

    name: str
    data: bytes
    expected: set[ErrorKind]


def corpus() -> list[Odd]:
    """All of them, the same at every call."""
    found = [*_torn(), *_bent(), *_modes(), *_shapes(), *_bombs(), *_others(), *_decorated()]
    assert len({one.name for one in found}) == len(found)
    return found


def picture(seed: int = 0, size: tuple[int, int] = (96, 72), mode: str = "RGB") -> Image.Image:
    """A picture with something to see and some noise."""
    random = np.random.default_rng(seed)
    height, width = size[1], size[0]
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 55, height)[:, None, None]
    values = np.clip(ramp + random.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _torn() -> Iterator[Odd]:
    """Cut at some places; with bytes behind the end, which do no harm; with the end alone."""
    for kind in FORMATS:
        whole = saved(picture(1, (200, 150)), kind)
        yield Odd(f"whole.{kind}", whole, FINE)
        yield Odd(f"with-a-tail.{kind}", whole + b"and then some text" * 50, FINE)
        yield Odd(f"twice.{kind}", whole + whole, FINE)
        for share in (0.1, 0.3, 0.6, 0.9):
            yield Odd(f"cut-{share:.0%}.{kind}", whole[: int(len(whole) * share)], TORN)
        yield Odd(f"first-bytes.{kind}", whole[:6], {*TORN, ErrorKind.NOT_AN_IMAGE})
        yield Odd(f"without-its-head.{kind}", whole[16:], {*TORN, ErrorKind.NOT_AN_IMAGE})
        # Where pixels are stored as they are, or drawn from a stream of bits without a checksum, zeroes are a dark picture.
        expected = FINE if kind in ("BMP", "WEBP") else {*TORN, ErrorKind.NOT_AN_IMAGE}
        yield Odd(f"all-zero-behind-its-head.{kind}", whole[:64] + bytes(len(whole) - 64), expected)


def _bent() -> Iterator[Odd]:
    """Named, or begun, as something else; EXIF, colour profiles and text that are not what they say."""
    jpeg, png = saved(picture(2), "JPEG"), saved(picture(2), "PNG")
    yield Odd("a-png.jpg", png, FINE)
    yield Odd("a-jpeg.png", jpeg, FINE)
    yield Odd("text-before.jpg", b"\n\n" + jpeg, {ErrorKind.NOT_AN_IMAGE})
    yield Odd("head-of-a-gif-then-jpeg.gif", b"GIF89a" + jpeg, {*TORN, ErrorKind.TOO_LARGE})
    yield Odd("crc-wrong.png", png[:-30] + bytes([png[-30] ^ 255]) + png[-29:], TORN)
    yield Odd("zlib-wrong.png", _png(96, 72, b"this is no zlib stream"), TORN)
    # Its stream ends well, and early: Pillow takes the rows that are missing for black ones.
    yield Odd("too-few-rows.png", _png(96, 72, zlib.compress(bytes(97 * 30))), FINE)
    yield Odd("without-pixels.png", _png(96, 72, None), TORN)
    yield Odd("profile-of-noise.jpg", saved(picture(3), "JPEG", icc_profile=bytes(range(256)) * 9), FINE)
    yield Odd("profile-of-noise.png", saved(picture(3), "PNG", icc_profile=bytes(range(256)) * 9), FINE)
    for name, exif in {
        "torn": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
        "loop": b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "empty": b"Exif\0\0",
        "noise": b"Exif\0\0" + bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)),
    }.items():
        yield Odd(f"exif-{name}.jpg", saved(picture(4), "JPEG", exif=exif), FINE)
    for orientation in (0, 2, 3, 4, 5, 6, 7, 8, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield Odd(f"turned-{orientation}.jpg", saved(picture(5), "JPEG", exif=exif), FINE)


def _modes() -> Iterator[Odd]:
    """Every kind of pixel that a format can hold."""
    for mode, kind, expected in (
        *((mode, "JPEG", FINE) for mode in ("L", "CMYK")),
        *((mode, "PNG", FINE) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
        *((mode, "TIFF", FINE) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "LAB", "YCbCr", "I;16")),
        *((mode, "TIFF", {ErrorKind.UNSUPPORTED}) for mode in ("I", "F")),
        *((mode, "GIF", FINE) for mode in ("1", "L", "P")),
        *((mode, "BMP", FINE) for mode in ("1", "L", "P", "RGBA")),
        *((mode, "WEBP", FINE) for mode in ("RGBA", "L")),
    ):
        source = "L" if mode in ("I;16", "I", "F") else "RGB"
        if mode == "I;16":
            image = Image.fromarray(np.asarray(picture(6, mode="L")).astype(np.uint16) * 257)
        elif mode == "LAB":
            image = Image.new("LAB", (96, 72), (120, 130, 140))
        else:
            image = picture(6, mode=source).convert(mode)
        yield Odd(f"mode-{mode.replace(';', '')}.{kind}", saved(image, kind), expected)
    yield Odd("progressive.jpg", saved(picture(7), "JPEG", progressive=True), FINE)
    yield Odd("worst-quality.jpg", saved(picture(7), "JPEG", quality=1), FINE)
    yield Odd("lossless.webp", saved(picture(7), "WEBP", lossless=True), FINE)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        yield Odd(f"{compression}.tif", saved(picture(8), "TIFF", compression=compression), FINE)
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        frames = [picture(9, size) for size in ((96, 72),) * 5]
        yield Odd(f"animated.{kind}", saved(frames[0], kind, save_all=True, append_images=frames[1:]), FINE)


def _shapes() -> Iterator[Odd]:
    """As thin, as small and as large as they come."""
    for size in ((1, 1), (1, 2000), (2000, 1), (3, 5000), (2, 2)):
        for kind in ("JPEG", "PNG", "WEBP", "GIF"):
            yield Odd(f"{size[0]}x{size[1]}.{kind}", saved(picture(10, size), kind), FINE)
    yield Odd("65500-wide.jpg", saved(Image.new("RGB", (65_500, 8)), "JPEG"), FINE)
    for width, height in ((0, 72), (96, 0), (0, 0)):
        yield Odd(f"{width}x{height}-by-its-head.png", _png(width, height, zlib.compress(b"")), {*TORN, ErrorKind.NOT_AN_IMAGE})
    yield Odd("0x0-by-its-head.gif", b"GIF89a" + bytes(7) + b";", {*TORN, ErrorKind.NOT_AN_IMAGE})


def _bombs() -> Iterator[Odd]:
    """Small files that say they are very large, or become so."""
    yield Odd("bomb.png", _png(50_000, 50_000, zlib.compress(bytes(1_000_000), 9)), {ErrorKind.TOO_LARGE})
    yield Odd("bomb-thin.png", _png(2_000_000_000, 1, None), {ErrorKind.TOO_LARGE, *TORN})
    yield Odd("bomb.gif", _gif(65_535, 65_535), _LARGE)
    yield Odd("bomb-frame.gif", _gif(8, 65_535), {*_LARGE, *TORN})
    yield Odd("bomb.bmp", _bmp(60_000, 60_000), _LARGE)
    yield Odd("bomb-negative.bmp", _bmp(60_000, -60_000), _LARGE)
    yield Odd("bomb.jpg", _resized_jpeg(65_500, 65_500), _LARGE)
    extended = b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xfe\xff\xfe" * 2
    yield Odd("bomb.webp", b"RIFF" + struct.pack("<I", 26) + extended, _WEBP)
    yield Odd("bomb.tif", _tiff(100_000, 100_000), _LARGE)
    yield Odd("bomb-strips.tif", _tiff(4_000_000_000, 2), {*_LARGE, *TORN})
    yield Odd("bomb-tiles.tif", _tiled_tiff(24_576), _LARGE)
    packed = zlib.compress(bytes(200_000_000), 9)
    yield Odd("text-bomb.png", _png(96, 72, _rows(96, 72), (b"zTXt", b"k\0\0" + packed)), _TEXT)
    yield Odd("profile-bomb.png", _png(96, 72, _rows(96, 72), (b"iCCP", b"p\0\0" + packed)), _TEXT)
    yield Odd("pixels-bomb.png", _png(96, 72, packed), FINE)
    yield Odd("many-chunks.png", _png(96, 72, _rows(96, 72), *((b"tEXt", b"k\0v") for _ in range(20_000))), FINE)
    comment = b"\xff\xfe\xff\xff" + bytes(65_533)
    jpeg = saved(picture(11), "JPEG")
    yield Odd("many-comments.jpg", jpeg[:2] + comment * 60 + jpeg[2:], FINE)


_LARGE = {ErrorKind.TOO_LARGE}
_WEBP = {ErrorKind.TOO_LARGE, *TORN, ErrorKind.NOT_AN_IMAGE}
#: A picture behind a text that unpacks to 200 MB is either shown without the text or refused.
_TEXT = {ErrorKind.TOO_LARGE, *TORN, ErrorKind.NOT_AN_IMAGE}


def _tiled_tiff(side: int) -> bytes:
    """64 x 64 pixels in one tile of `side` x `side`, for which libtiff makes room. Found by `make fuzz`."""
    shape = {256: 64, 257: 64, 258: 8, 259: 5, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in shape.items())
    return b"II*\0" + struct.pack("<IH", 8, len(shape)) + entries + bytes(400)


def _others() -> Iterator[Odd]:
    """What is no picture that is decoded: formats that run or fetch, archives, text, noise."""
    unsupported = {
        "drawing.svg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "drawing-fetches.svg": b"<svg><image href='http://127.0.0.1:1/x'/></svg>",
        "page.pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file",
        "dos.eps": b"\xc5\xd0\xd3\xc6" + bytes(30),
        "photo.heic": b"\0\0\0\x1cftypheic\0\0\0\0mif1heic",
        "photo.avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1",
        "layers.psd": b"8BPS\0\x01" + bytes(40),
        "new.jxl": b"\xff\x0a" + bytes(20),
        "boxed.jxl": b"\0\0\0\x0cJXL \r\n\x87\n",
        "wavelet.jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
        "quite.qoi": b"qoif" + bytes(12),
        "texture.dds": b"DDS " + bytes(124),
    }
    for name, data in unsupported.items():
        yield Odd(name, data, {ErrorKind.UNSUPPORTED})
    random = bytes(np.random.default_rng(1).integers(0, 256, 4000, np.uint8))
    for name, data in {
        "page.html": b"<!doctype html><html><body>403 Forbidden</body></html>",
        "error.xml": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
        "text.jpg": b"hello",
        "zeroes.jpg": bytes(5000),
        "noise.jpg": b"\x01" + random,
        "packed.jpg.gz": gzip.compress(saved(picture(12), "JPEG"), mtime=0),
        "archive.zip": b"PK\x03\x04" + random,
        "program.elf": b"\x7fELF" + random,
        "pickle.jpg": b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "fli.flc": struct.pack("<IHHHHH", 200, 0xAF12, 1, 320, 200, 8) + bytes(180),
        "pcx.pcx": b"\x0a\x05\x01\x08" + bytes(124),
        "ppm.ppm": b"P6 4 4 255\n" + bytes(48),
        "xbm.xbm": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0};",
        "ico.ico": b"\0\0\x01\0\x01\0" + bytes(40),
        "tga.tga": bytes(2) + b"\x02" + bytes(9) + struct.pack("<HH", 4, 4) + b"\x18\0" + bytes(48),
    }.items():
        yield Odd(name, data, {ErrorKind.NOT_AN_IMAGE})
    yield Odd("nothing.jpg", b"", {ErrorKind.EMPTY})


def _decorated() -> Iterator[Odd]:
    """Good pictures whose text would be something else to a careless reader."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "<script>alert(1)</script>")
    info.add_itxt("Software", "'; drop table images; --", "en", "x")
    yield Odd("script-in-its-text.png", saved(picture(13), "PNG", pnginfo=info), FINE)
    yield Odd("php-in-its-comment.gif", saved(picture(13), "GIF", comment=b"<?php system('id'); ?>"), FINE)
    yield Odd("script-in-its-comment.jpg", saved(picture(13), "JPEG", comment=b"<script>alert(1)</script>"), FINE)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, pixels: bytes | None, *more: tuple[bytes, bytes]) -> bytes:
    """A grey PNG of these dimensions by its head, whatever its pixels are."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    extra = b"".join(_chunk(*one) for one in more)
    return b"\x89PNG\r\n\x1a\n" + head + extra + (_chunk(b"IDAT", pixels) if pixels is not None else b"") + _chunk(b"IEND", b"")


def _rows(width: int, height: int) -> bytes:
    return zlib.compress((b"\0" + bytes(range(width))) * height)


def _gif(screen: int, frame: int) -> bytes:
    """A GIF of a square screen and a square frame, with next to no pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0xF7, 0, 0) + bytes(768)
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x4c\x01\0;"


def _bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 300, 0, 0, 54) + head + bytes(300)


def _resized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose head says another size."""
    data = bytearray(saved(picture(14), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _tiff(width: int, height: int) -> bytes:
    """A TIFF with one small strip."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, 100)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 108) + bytes(100) + struct.pack("<H", len(tags)) + entries + bytes(4)
