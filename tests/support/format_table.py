"""One small picture in every format, depth and layout of the table in docs/formats.md, and what a decoder makes of it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from support import deep

#: Height and width; a multiple of what any of the formats wants.
SHAPE = (48, 64)
RIGHT, WRONG, REFUSED = "right", "wrong", "refused"


def scene() -> np.ndarray:
    """(48, 64, 3) uint8: smooth, colourful, with black and white in it."""
    rows, columns = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    red, green, blue = 4 * columns, 5 * rows, 255 - 2 * rows - 2 * columns
    picture = np.clip(np.stack([red, green, blue], axis=2), 0, 255).astype(np.uint8)
    picture[:6, :6], picture[:6, 6:12] = 0, 255
    return picture


def gray() -> np.ndarray:
    """(48, 64, 1) uint8: the same without colours."""
    return np.asarray(Image.fromarray(scene()).convert("L"))[..., None].copy()


def files() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Name of a row, the file, and the (48, 64, 3) picture that it shows."""
    rgb, one = scene(), gray()
    shades = np.repeat(one, 3, axis=2)
    image = Image.fromarray(rgb)
    for name, kind, options in (
        ("JPEG, 8 bits", "JPEG", {"quality": 95}),
        ("JPEG, progressive", "JPEG", {"quality": 95, "progressive": True}),
        ("PNG, 8 bits", "PNG", {}),
        ("WebP", "WEBP", {"quality": 95}),
        ("BMP, 24 bits", "BMP", {}),
        ("AVIF", "AVIF", {"quality": 95}),
        ("JPEG 2000", "JPEG2000", {}),
        ("PPM, 8 bits", "PPM", {}),
        ("TIFF, 8 bits", "TIFF", {}),
        ("TIFF, JPEG inside", "TIFF", {"compression": "jpeg", "quality": 95}),
    ):
        yield name, _saved(image, kind, **options), rgb
    yield "JPEG, CMYK", _saved(image.convert("CMYK"), "JPEG", quality=95), rgb
    yield "JPEG, wide colour profile", *_wide(image)
    yield "JPEG, lossless, 8 bits", imagecodecs.jpeg8_encode(rgb, lossless=True), rgb
    yield "JPEG, 12 bits", imagecodecs.jpeg8_encode(_scaled(rgb, 12).astype(np.uint16), bitspersample=12), rgb
    yield "JPEG-LS", imagecodecs.jpegls_encode(rgb), rgb
    yield "JPEG XL", imagecodecs.jpegxl_encode(rgb, lossless=True), rgb
    yield "HEIC (with `tlbatch[formats]`)", _heic(image), rgb
    yield "PNG, 16 bits", deep.png(_scaled(rgb, 16)), rgb
    yield "PNG, 12 bits in 16", deep.png(_scaled(one, 12)), shades
    yield "PNG, 12 bits in 16, with sBIT", deep.png(_scaled(one, 12), (b"sBIT", b"\x0c")), shades
    yield "PNG, 16 bits, one colour transparent", *_hidden(one)
    yield "PNG, wrong checksum in a text", _with_text(_saved(image, "PNG"), b"k\0v", 7), rgb
    yield "GIF, first frame smaller than the picture", *_small_frame()
    yield "PNG, 8 bits, alpha", *_see_through(lambda rgba: _saved(Image.fromarray(rgba), "PNG"))
    yield "PNG, 16 bits, alpha", *_see_through(lambda rgba: deep.png(_scaled(rgba, 16)))
    yield "PGM, 12 bits", _pgm(one, 4095), shades
    yield "PGM, 12 bits in 16", _pgm(one, 65_535), shades
    for bits in (10, 12, 14):
        yield f"TIFF, {bits} bits, packed", deep.tiff(_scaled(rgb, bits), bits, 2), rgb
    yield "TIFF, 12 bits in 16", deep.tiff(_scaled(one, 12), 16, 1), shades
    yield "TIFF, 16 bits", deep.tiff(_scaled(rgb, 16), 16, 2), rgb
    yield "TIFF, 8 bits, white is zero", deep.tiff(255 - one, 8, 0), shades
    yield "TIFF, 8 bits, planes", deep.tiff(rgb, 8, 2, planes=True), rgb
    yield "TIFF, 8 bits, tiles", _tiff(rgb, "rgb", tile=(16, 16)), rgb
    yield "TIFF, 8 bits, alpha", *_see_through(lambda rgba: _saved(Image.fromarray(rgba), "TIFF"))
    yield "TIFF, 16 bits, alpha", *_see_through(lambda rgba: deep.tiff(_scaled(rgba, 16), 16, 2, t338=2))
    yield "TIFF, 8 bits, CMYK", _saved(image.convert("CMYK"), "TIFF"), rgb
    yield "TIFF, palette of 8 bits", _palette(one, 8), shades
    yield "TIFF, palette of 16 bits", _palette(one, 16), shades
    yield "TIFF, 16 bits, white is zero", deep.tiff(65_535 - _scaled(one, 16), 16, 0), shades
    yield "TIFF, 16 bits, planes", deep.tiff(_scaled(rgb, 16), 16, 2, planes=True), rgb
    yield "TIFF, 32 bits", deep.tiff(_scaled(rgb, 32), 32, 2), rgb
    yield "TIFF, float32 from 0 to 1", deep.tiff((rgb / 255).astype("<f4"), 32, 2, t339=3), rgb
    yield "TIFF, float16 from 0 to 1", deep.tiff((rgb / 255).astype("<f2"), 16, 2, t339=3), rgb
    yield "TIFF, 5 bands, the first three RGB", deep.tiff(np.dstack([rgb, one, one]), 8, 2), rgb
    yield "TIFF, JPEG 2000 inside", deep.tiff(rgb, 8, 2, compression=34712), rgb
    yield "TIFF, JPEG XL inside", _tiff(rgb, "rgb", compression="jpegxl"), rgb
    yield "TIFF, LERC inside", _tiff(rgb, "rgb", compression="lerc"), rgb
    yield "BMP, 4 bits a colour", _masked(rgb), rgb


def readings(read: Callable[[bytes], np.ndarray]) -> Mapping[str, str]:
    """What a decoder, which returns (48, 64, 3) uint8 RGB or raises, makes of each file."""
    found = {}
    for name, data, expected in files():
        try:
            seen = read(data)
        except Exception:  # whatever a decoder raises, it refuses the file
            found[name] = REFUSED
            continue
        lost = 8 if "4 bits" in name else 4
        same = seen.shape == expected.shape and np.abs(seen.astype(int) - expected).mean() <= lost
        found[name] = RIGHT if same else WRONG
    return found


def _scaled(samples: np.ndarray, bits: int) -> np.ndarray:
    return samples.astype(np.uint64) * (2**bits - 1) // 255


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _wide(image: Image.Image) -> tuple[bytes, np.ndarray]:
    from PIL import ImageCms

    muted = Image.fromarray((64 + np.asarray(image) // 2).astype(np.uint8))  # colours that both spaces have
    wide = ImageCms.ImageCmsProfile(io.BytesIO(deep.WIDE))
    stored = ImageCms.profileToProfile(muted, ImageCms.createProfile("sRGB"), wide)
    return _saved(stored, "JPEG", quality=95, icc_profile=deep.WIDE), np.asarray(muted)


def _heic(image: Image.Image) -> bytes:
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95)
    return buffer.getvalue()


def _hidden(one: np.ndarray) -> tuple[bytes, np.ndarray]:
    samples = _scaled(one, 16)
    samples[12:36, 16:48] = 9_000
    seen = np.repeat(one, 3, axis=2)
    seen[12:36, 16:48] = 255
    return deep.png(samples, (b"tRNS", struct.pack(">H", 9_000))), seen


def _with_text(png: bytes, text: bytes, checksum: int) -> bytes:
    return png[:33] + deep.png_chunk(b"tEXt", text, checksum=checksum) + png[33:]


def _small_frame() -> tuple[bytes, np.ndarray]:
    height, width = SHAPE
    body = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([255, 0, 0, 0, 0, 255])
    frame = struct.pack("<HHHHB", width // 2, 0, width // 2, height, 0) + deep.gif_pixels(bytes([1] * (width // 2 * height)))
    seen = np.full((*SHAPE, 3), 255, np.uint8)
    seen[:, width // 2 :] = (0, 0, 255)
    return body + b"," + frame + b";", seen


def _pgm(one: np.ndarray, greatest: int) -> bytes:
    return f"P5 {SHAPE[1]} {SHAPE[0]} {greatest}\n".encode() + _scaled(one, 12).astype(">u2").tobytes()


def _tiff(samples: np.ndarray, photometric: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, photometric=photometric, **options)
    return buffer.getvalue()


def _palette(one: np.ndarray, bits: int) -> bytes:
    kind = np.uint8 if bits == 8 else np.uint16
    colours = (np.arange(2**bits) * (65_535 // (2**bits - 1))).astype(np.uint16)
    return _tiff(_scaled(one[..., 0], bits).astype(kind), "palette", colormap=np.stack([colours] * 3))


def _see_through(save: Callable[[np.ndarray], bytes]) -> tuple[bytes, np.ndarray]:
    """The scene with a hole, whose hidden colour is another than white."""
    seen, alpha = scene().copy(), np.full((*SHAPE, 1), 255, np.uint8)
    stored = np.dstack([seen, alpha])
    stored[12:36, 16:48] = (90, 20, 160, 0)
    seen[12:36, 16:48] = 255
    return save(stored), seen


def _masked(rgb: np.ndarray) -> bytes:
    value = sum((rgb[..., band].astype(np.uint32) >> 4) << shift for band, shift in ((0, 8), (1, 4), (2, 0)))
    return deep.bmp(value, 16, (0xF00, 0xF0, 0xF, 0))
