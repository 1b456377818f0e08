"""Stage 3: bytes -> uint8 RGB pixels of one fixed size; pure functions, without I/O and without TensorFlow.

Training and inference both call `decode`. `keras.utils.image_dataset_from_directory` resizes without antialiasing and Pillow
resizes with it, so a model trained with one and used with the other would see different images.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from tlbatch.errors import ErrorKind, Failure
from tlbatch.schema import Size

#: The supported formats, by Pillow's names. Their plugins are imported here because Pillow does not load plugins by itself
#: when it is called with a list of formats.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)

# First bytes of unsupported image formats, which load other resources, run code, or need a decoder that is not installed. A
# message that names the format is more useful than "not an image".
_UNSUPPORTED = (
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"8BPS", "Photoshop"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")

#: A JPEG is decoded at this many times the target size or more. Same top-1 as with full-size decoding, for MobileNetV2 at
#: 160 and 992 photographs and crops of photographs: 95.2 % at 1, 99.8 % at 1.5, 99.9 % at 2 (benchmarks/choices.py).
_DRAFT_MARGIN = 2

_EXIF_ORIENTATION = 0x0112
# EXIF orientation -> the transposition that turns the stored image upright (TIFF 6.0, tag 274).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def prepare_process() -> None:
    """Prepare a process to decode untrusted images: `max_pixels` replaces Pillow's limit, and Pillow's warnings are ignored."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


class Pixels(NamedTuple):
    """A decoded image.

    Attributes:
        array: (height, width, 3) uint8 RGB in the requested size.
        width: width of the original in pixels, after its EXIF orientation is applied.
        height: height of the original, likewise.
    """

    array: np.ndarray
    width: int
    height: int


def decode(data: bytes, size: Size, *, max_pixels: int = 100_000_000, max_side: int = 65_535) -> Pixels | Failure:
    """Decode one image and resize it to `size`.

    Gray, palette, alpha (over white), CMYK and 16-bit images become RGB. An animation gives its first frame. The EXIF
    orientation is applied. A JPEG is decoded at the smallest DCT scale that is not below twice `size`.

    Args:
        data: the encoded image.
        size: (height, width) of the result.
        max_pixels: an image with more pixels is refused from its header, before it is decoded.
        max_side: an image with a longer side is refused in the same way.

    Returns:
        Pixels, or a Failure with the reason; bad data never raises an exception.
    """
    if not data:
        return Failure("decode", ErrorKind.EMPTY, "the object has no bytes")
    try:
        return _decode(data, size, max_pixels, max_side)
    except UnidentifiedImageError:
        return _unidentified(data)
    except Image.DecompressionBombError as error:
        return Failure("decode", ErrorKind.TOO_LARGE, str(error))
    except MemoryError:
        return Failure("decode", ErrorKind.TOO_LARGE, "decoding needs more memory than is available")
    except Exception as error:  # a decoder may raise anything on hostile data; only this row may fail
        return _broken(error)


def thumbnail(data: bytes, *, side: int = 224, max_pixels: int = 100_000_000) -> bytes | Failure:
    """An upright JPEG of an image in its aspect ratio, with a longer side of `side` pixels; a Failure if `decode` fails."""
    square = decode(data, (side, side), max_pixels=max_pixels)
    if isinstance(square, Failure):
        return square
    scale = side / max(square.width, square.height)
    shape = (max(1, round(square.width * scale)), max(1, round(square.height * scale)))
    buffer = io.BytesIO()
    Image.fromarray(square.array).resize(shape, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _decode(data: bytes, size: Size, max_pixels: int, max_side: int) -> Pixels | Failure:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            message = f"{width}x{height} pixels exceed max_pixels={max_pixels}"
            return Failure("decode", ErrorKind.TOO_LARGE, message)
        if max(width, height) > max_side:
            return Failure("decode", ErrorKind.TOO_LARGE, f"{width}x{height} pixels exceed max_side={max_side}")
        if _tile_pixels(image) > max_pixels:
            return Failure("decode", ErrorKind.TOO_LARGE, f"a TIFF tile exceeds max_pixels={max_pixels}")
        if image.format not in ("JPEG", "MPO"):  # MPO: several JPEGs in one file, written by phones
            image.load()  # reading a PNG's EXIF would load it too, and `_orientation` would ignore the error
        orientation = _orientation(image)
        sideways = orientation in _SIDEWAYS
        target = size if sideways else (size[1], size[0])  # Pillow's order: width, height
        image.draft("RGB", (_DRAFT_MARGIN * target[0], _DRAFT_MARGIN * target[1]))
        rgb = _to_rgb(image)
        if rgb is None:
            return Failure("decode", ErrorKind.UNSUPPORTED, f"pixels of mode {image.mode} have no defined range")
        small = rgb.resize(target, Image.Resampling.BILINEAR)
        if orientation in _UPRIGHT:
            small = small.transpose(_UPRIGHT[orientation])
        upright_size = (height, width) if sideways else (width, height)
        return Pixels(np.asarray(small), *upright_size)


def _tile_pixels(image: Image.Image) -> int:
    """Pixels of one tile of a TIFF, for which libtiff allocates memory even if the image is smaller; 0 without tiles."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    width, height = (tags.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    return int(np.max(width)) * int(np.max(height))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) if there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the EXIF parser may raise anything on damaged bytes
        return 1


def _to_rgb(image: Image.Image) -> Image.Image | None:
    """An image of any Pillow mode as RGB; None for modes without a defined range (32-bit integers and floats)."""
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, so the high byte is taken instead.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _unidentified(data: bytes) -> Failure:
    head = data[:512]
    for magic, name in _UNSUPPORTED:
        if head.startswith(magic):
            return Failure("decode", ErrorKind.UNSUPPORTED, f"{name} is not supported")
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return Failure("decode", ErrorKind.UNSUPPORTED, "HEIF and AVIF are not supported")
    if b"<svg" in head.lower():
        return Failure("decode", ErrorKind.UNSUPPORTED, "SVG is not supported")
    if any(head.startswith(magic) for magic in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")):
        return Failure("decode", ErrorKind.TRUNCATED, f"only the beginning of an image: {len(data)} bytes")
    return Failure("decode", ErrorKind.NOT_AN_IMAGE, f"begins with {head[:12]!r}, which is not the start of any image format")


def _broken(error: Exception) -> Failure:
    message = f"{error}" or type(error).__name__
    truncated = isinstance(error, EOFError) or any(
        word in message.lower() for word in ("truncated", "unexpected end", "not enough")
    )
    return Failure("decode", ErrorKind.TRUNCATED if truncated else ErrorKind.DECODE_FAILED, message)
