"""Stage 3: bytes -> uint8 RGB pixels of one fixed size; pure, without I/O and without TensorFlow.

Training and inference call this one function: `keras.utils.image_dataset_from_directory` resizes without antialiasing and
Pillow with it, so a model trained through one and used through the other sees different images.
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

#: The formats that are decoded, by Pillow's names; their plugins are imported here because Pillow, asked for certain
#: formats, loads none by itself.
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

# Openings of formats that are pictures to a person and not to this job: they fetch, run code or need a decoder that is
# not installed. A sentence that names the format is worth more than "not an image".
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

#: A JPEG is decoded at no less than this many times the target. Against full-size decoding, MobileNetV2 at 160 over
#: 992 photographs and crops of photographs: 95.2 % same top-1 at 1, 99.8 % at 1.5, 99.9 % at 2 (benchmarks/choices.py).
_DRAFT_MARGIN = 2

_EXIF_ORIENTATION = 0x0112
# EXIF orientation -> what turns the stored picture upright (TIFF 6.0, tag 274).
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
    """For a process that decodes strangers' images: `max_pixels` is the one limit, and no decoder's warning is printed."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


class Pixels(NamedTuple):
    """A decoded image: `array` (height, width, 3) uint8 RGB of the asked size; the original's size as a person sees it."""

    array: np.ndarray
    width: int
    height: int


def decode(data: bytes, size: Size, *, max_pixels: int = 100_000_000, max_side: int = 65_535) -> Pixels | Failure:
    """Decode one image and bring it to `size`.

    Grey, palette, alpha (over white), CMYK and 16-bit images become RGB; of an animation the first frame is taken; EXIF
    orientation is honoured. A JPEG is decoded at the smallest DCT scale that is not below twice `size`.

    Args:
        data: the encoded image.
        size: (height, width) of the result.
        max_pixels: larger images are refused from their header, before they are decoded.
        max_side: so are those of which one side is longer.

    Returns:
        Pixels, or the Failure that says why there are none; it raises nothing for bad data.
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
        return Failure("decode", ErrorKind.TOO_LARGE, "decoding needs more memory than there is")
    except Exception as error:  # a decoder may raise anything on hostile data; it must cost this row only
        return _broken(error)


def thumbnail(data: bytes, *, side: int = 224, max_pixels: int = 100_000_000) -> bytes | Failure:
    """A small JPEG of an image, as a person sees it, its longer side at most `side` pixels; a Failure as `decode` gives it."""
    whole = decode(data, (side, side), max_pixels=max_pixels)
    if isinstance(whole, Failure):
        return whole
    scale = side / max(whole.width, whole.height)
    shape = (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
    buffer = io.BytesIO()
    Image.fromarray(whole.array).resize(shape, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _decode(data: bytes, size: Size, max_pixels: int, max_side: int) -> Pixels | Failure:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            message = f"{width}x{height} are more than max_pixels={max_pixels}"
            return Failure("decode", ErrorKind.TOO_LARGE, message)
        if max(width, height) > max_side:
            return Failure("decode", ErrorKind.TOO_LARGE, f"{width}x{height} is longer than max_side={max_side}")
        if _tile_pixels(image) > max_pixels:
            return Failure("decode", ErrorKind.TOO_LARGE, f"its tiles have more pixels than max_pixels={max_pixels}")
        if image.format not in ("JPEG", "MPO"):  # MPO is several JPEGs, as telephones write them
            image.load()  # reading a PNG's EXIF would do it, and what that raises is not to be passed over
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
        seen = (height, width) if sideways else (width, height)
        return Pixels(np.asarray(small), *seen)


def _tile_pixels(image: Image.Image) -> int:
    """Pixels of one tile of a TIFF, which libtiff makes room for however small the image is; 0 where there are none."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    width, height = (tags.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    return int(np.max(width)) * int(np.max(height))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none; a torn EXIF block does not spoil its picture."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the parser of EXIF raises whatever the bytes lead it to
        return 1


def _to_rgb(image: Image.Image) -> Image.Image | None:
    """Any of Pillow's modes as RGB; None for numbers without a range (32-bit integers and floats)."""
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255; the high byte is the picture.
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
            return Failure("decode", ErrorKind.UNSUPPORTED, f"{name} is not decoded")
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return Failure("decode", ErrorKind.UNSUPPORTED, "HEIF and AVIF are not decoded")
    if b"<svg" in head.lower():
        return Failure("decode", ErrorKind.UNSUPPORTED, "SVG is not decoded")
    if any(head.startswith(magic) for magic in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")):
        return Failure("decode", ErrorKind.TRUNCATED, f"only the beginning of an image: {len(data)} bytes")
    return Failure("decode", ErrorKind.NOT_AN_IMAGE, f"begins with {head[:12]!r}, which no image does")


def _broken(error: Exception) -> Failure:
    message = f"{error}" or type(error).__name__
    cut_short = isinstance(error, EOFError) or any(
        word in message.lower() for word in ("truncated", "unexpected end", "not enough")
    )
    return Failure("decode", ErrorKind.TRUNCATED if cut_short else ErrorKind.DECODE_FAILED, message)
