"""Images that strangers upload, made here: formats by defects, each with what must become of it.

None of them harms a program that opens it. What tlbatch refuses for its size is an ordinary picture here, and the tests set
the limit (`MAX_PIXELS`) below it.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import imagecodecs
import numpy as np
from PIL import Image, PngImagePlugin

from support import deep
from tlbatch.errors import ErrorKind

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
#: What half an image may be told to be: its decoder says whether it missed bytes or met wrong ones.
TORN = {ErrorKind.TRUNCATED, ErrorKind.DECODE_FAILED}
FINE: set[ErrorKind] = set()
#: The limit with which the tests decode these images: more than the largest good one has, less than `_over_the_limit` has.
MAX_PIXELS = 600_000


class Odd(NamedTuple):
    """An image: `expected` is empty where it must be predicted, else the kinds of error it may be."""

    name: str
    data: bytes
    expected: set[ErrorKind]


def corpus() -> list[Odd]:
    """All of them, the same at every call."""
    found = [
        *_torn(),
        *_bent(),
        *_modes(),
        *_deep(),
        *_shapes(),
        *_over_the_limit(),
        *_with_much_beside(),
        *_others(),
        *_decorated(),
    ]
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
    for kind in (*FORMATS, "AVIF", "JPEG2000", "PPM", "JXL"):
        image = picture(1, (200, 150))
        whole = imagecodecs.jpegxl_encode(np.asarray(image)) if kind == "JXL" else saved(image, kind)
        yield Odd(f"whole.{kind}", whole, FINE)
        yield Odd(f"with-a-tail.{kind}", whole + b"and then some text" * 50, FINE)
        yield Odd(f"twice.{kind}", whole + whole, TORN if kind == "JPEG2000" else FINE)
        for share in (0.1, 0.3, 0.6, 0.9):
            yield Odd(f"cut-{share:.0%}.{kind}", whole[: int(len(whole) * share)], TORN)
        yield Odd(f"first-bytes.{kind}", whole[:6], {*TORN, ErrorKind.NOT_AN_IMAGE})
        yield Odd(f"without-its-head.{kind}", whole[16:], {*TORN, ErrorKind.NOT_AN_IMAGE})
        # Where pixels are stored as they are, or drawn from a stream of bits without a checksum, zeroes are a dark picture.
        expected = FINE if kind in ("BMP", "WEBP", "PPM") else {*TORN, ErrorKind.NOT_AN_IMAGE}
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
        "elsewhere": b"Exif\0\0II*\0\x08\0\0\0\0\0\xff\xff\0\0",
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


def _deep() -> Iterator[Odd]:
    """More than 8 bits a sample, whole and cut."""
    samples = np.asarray(picture(14)).astype(np.uint64)
    for bits in (12, 16, 32):
        whole = deep.tiff(samples * (2**bits - 1) // 255, bits, 2, planes=bits == 16)
        yield Odd(f"deep-{bits}.tif", whole, FINE)
        yield Odd(f"deep-{bits}-cut.tif", whole[: len(whole) // 2], TORN)
    yield Odd("deep-float.tif", deep.tiff((samples / 255).astype("<f4"), 32, 2, t339=3), FINE)
    yield Odd("deep.png", deep.png((samples * 16).astype(np.uint16), (b"sBIT", b"\x0c\x0c\x0c")), FINE)
    value = (samples[..., 0] >> 4 << 8 | samples[..., 1] >> 4 << 4 | samples[..., 2] >> 4).astype(np.uint32)
    whole = deep.bmp(value, 16, (0xF00, 0xF0, 0xF, 0))
    yield Odd("masks.bmp", whole, FINE)
    yield Odd("masks-cut.bmp", whole[: len(whole) // 2], TORN)
    yield Odd("wide.jpg", saved(picture(14), "JPEG", icc_profile=deep.WIDE), FINE)


def _shapes() -> Iterator[Odd]:
    """As thin, as small and as large as they come."""
    for size in ((1, 1), (1, 2000), (2000, 1), (3, 5000), (2, 2)):
        for kind in ("JPEG", "PNG", "WEBP", "GIF"):
            yield Odd(f"{size[0]}x{size[1]}.{kind}", saved(picture(10, size), kind), FINE)
    yield Odd("65500-wide.jpg", saved(Image.new("RGB", (65_500, 8)), "JPEG"), FINE)
    for width, height in ((0, 72), (96, 0), (0, 0)):
        yield Odd(f"{width}x{height}-by-its-head.png", _png(width, height, zlib.compress(b"")), {*TORN, ErrorKind.NOT_AN_IMAGE})
    yield Odd("0x0-by-its-head.gif", b"GIF89a" + bytes(7) + b";", {*TORN, ErrorKind.NOT_AN_IMAGE})


def _over_the_limit() -> Iterator[Odd]:
    """Whole pictures of a million pixels, and a small one in a tile of as many."""
    for kind in FORMATS:
        whole = saved(Image.new("RGB", (1000, 1000), (9, 90, 200)), kind, progressive=True)  # of which JPEG alone takes note
        yield Odd(f"over-the-limit.{kind}", whole, {ErrorKind.TOO_LARGE})
    yield Odd("decoded-at-an-eighth.jpg", saved(Image.new("RGB", (1000, 1000), (9, 90, 200)), "JPEG"), FINE)
    beyond = saved(Image.new("RGB", (2300, 2300), (9, 90, 200)), "JPEG")
    yield Odd("more-than-eight-times-the-limit.jpg", beyond, {ErrorKind.TOO_LARGE})
    yield Odd("tile-over-the-limit.tif", tiled_tiff(1024), {ErrorKind.TOO_LARGE})
    yield Odd("frame-over-the-limit.gif", _gif(8, 1000), {ErrorKind.TOO_LARGE, *TORN})
    upside_down = bytearray(saved(Image.new("RGB", (1000, 1000)), "BMP"))
    upside_down[22:26] = struct.pack("<i", -1000)  # stored from the top, as its negative height says
    yield Odd("from-the-top-over-the-limit.bmp", bytes(upside_down), {ErrorKind.TOO_LARGE})


def _with_much_beside() -> Iterator[Odd]:
    """Good pictures with more chunks, comments and rows than they need."""
    yield Odd("more-rows-than-its-head-says.png", _png(96, 72, zlib.compress((b"\0" + bytes(96)) * 200)), FINE)
    yield Odd("many-chunks.png", _png(96, 72, _rows(96, 72), *((b"tEXt", b"k\0v") for _ in range(200))), FINE)
    yield Odd("packed-text.png", png_with_text(5_000), FINE)
    comment = b"\xff\xfe\x03\xe8" + bytes(998)
    jpeg = saved(picture(11), "JPEG")
    yield Odd("many-comments.jpg", jpeg[:2] + comment * 60 + jpeg[2:], FINE)


def png_with_text(length: int, chunk: bytes = b"zTXt") -> bytes:
    """A good picture with a compressed text of this length beside it, or with a colour profile (iCCP)."""
    return _png(96, 72, _rows(96, 72), (chunk, b"k\0\0" + zlib.compress(b"a" * length)))


def _gif(screen: int, frame: int) -> bytes:
    """A GIF of a square screen and a larger square frame, with next to no pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0xF7, 0, 0) + bytes(768)
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x4c\x01\0;"


def tiled_tiff(side: int) -> bytes:
    """64 x 64 grey pixels in one tile of `side` x `side`, all of which is there, for which libtiff makes room.

    `make fuzz` found that a tile may be far larger than its picture; its finding was a tile of gigabytes.
    """
    tile = zlib.compress(bytes(side * side))
    shape = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in shape.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(shape)) + entries + bytes(4)
    return head.ljust(200, b"\0") + tile


def _others() -> Iterator[Odd]:
    """What is no picture that is decoded: formats that run or fetch, archives, text, noise."""
    unsupported = {
        "drawing.svg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
        "drawing-without-a-head.svg": b"<svg><rect width='9' height='9'/></svg>",
        "page.pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage",
        "dos.eps": b"\xc5\xd0\xd3\xc6" + bytes(30),
        "layers.psd": b"8BPS\0\x01" + bytes(40),
        "quite.qoi": b"qoif" + bytes(12),
        "texture.dds": b"DDS " + bytes(124),
        "ico.ico": b"\0\0\x01\0\x01\0" + bytes(40),
        "tga.tga": bytes(2) + b"\x02" + bytes(9) + struct.pack("<HH", 4, 4) + b"\x18\0" + bytes(48),
    }
    for name, data in unsupported.items():
        yield Odd(name, data, {ErrorKind.UNSUPPORTED})
    beginnings = {
        "photo.heic": b"\0\0\0\x1cftypheic\0\0\0\0mif1heic",
        "photo.avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1",
        "new.jxl": b"\xff\x0a" + bytes(20),
        "boxed.jxl": b"\0\0\0\x0cJXL \r\n\x87\n",
        "wavelet.jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
    }
    for name, data in beginnings.items():
        yield Odd(name, data, TORN)
    yield Odd(
        "0x0.bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 0, 0, 1, 24, *[0] * 6), TORN
    )
    yield Odd("0x0.ppm", b"P6 0 0 255\n", {*TORN, ErrorKind.NOT_AN_IMAGE})
    yield Odd("ppm.ppm", b"P6 4 4 255\n" + bytes(48), FINE)
    random = bytes(np.random.default_rng(1).integers(0, 256, 4000, np.uint8))
    for name, data in {
        "page.html": b"<!doctype html><html><body>403 Forbidden</body></html>",
        "error.xml": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
        "text.jpg": b"hello",
        "zeroes.jpg": bytes(5000),
        "noise.jpg": b"\x01" + random,
        "packed.jpg.gz": gzip.compress(saved(picture(12), "JPEG"), mtime=0),
        "zip.jpg": b"PK\x03\x04" + random,
        "program.elf": b"\x7fELF" + random,
        "pickle.jpg": pickle.dumps({"a": [1, 2, 3]}),
        "fli.flc": struct.pack("<IHHHHH", 200, 0xAF12, 1, 320, 200, 8) + bytes(180),
        "pcx.pcx": b"\x0a\x05\x01\x08" + bytes(124),
        "xbm.xbm": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0};",
    }.items():
        yield Odd(name, data, {ErrorKind.NOT_AN_IMAGE})
    yield Odd("nothing.jpg", b"", {ErrorKind.EMPTY})


def _decorated() -> Iterator[Odd]:
    """Good pictures with text that is markup."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "<b>bold</b> & 'quoted'")
    info.add_itxt("Software", "one; -- two", "en", "x")
    yield Odd("markup-in-its-text.png", saved(picture(13), "PNG", pnginfo=info), FINE)
    for kind in ("GIF", "JPEG"):
        yield Odd(f"markup-in-its-comment.{kind}", saved(picture(13), kind, comment=b"<b>bold</b>"), FINE)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, pixels: bytes | None, *more: tuple[bytes, bytes]) -> bytes:
    """A grey PNG of these dimensions by its head, whatever its pixels are."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    extra = b"".join(_chunk(*one) for one in more)
    return b"\x89PNG\r\n\x1a\n" + head + extra + (_chunk(b"IDAT", pixels) if pixels is not None else b"") + _chunk(b"IEND", b"")


def _rows(width: int, height: int) -> bytes:
    return zlib.compress((b"\0" + bytes(range(width))) * height)
