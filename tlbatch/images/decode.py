"""Stage 3: bytes -> RGB pixels of one fixed size; pure functions, without I/O and without TensorFlow.

Training and inference both call `decode`, with the rules of the bundle. Others resize otherwise, for example without
antialiasing (`keras.utils.image_dataset_from_directory`), and a model that was trained so needs such pixels.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images import colour, png, recognise
from tlbatch.images.pictures import SIDEWAYS, Limits, Picture, read_picture, stored_size
from tlbatch.images.recognise import TooLargeError, UnsupportedError
from tlbatch.images.resize import needs_all_pixels, resized, resized_as_tensorflow
from tlbatch.schema import PixelRules, Size

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


def prepare_process() -> None:
    """Prepare a process to decode untrusted images: `max_pixels` replaces Pillow's limit, and Pillow's warnings are ignored."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


class Pixels(NamedTuple):
    """A decoded image.

    Attributes:
        array: (height, width, 3) RGB from 0 to 255 in the requested size, of the rules' type.
        width: width of the original in pixels, after its EXIF orientation is applied.
        height: height of the original, likewise.
        white_level: the value that was taken as white, if the samples had more than 8 bits or were floats.
    """

    array: np.ndarray
    width: int
    height: int
    white_level: float | None = None


def decode(
    data: bytes,
    size: Size,
    *,
    max_pixels: int = 100_000_000,
    max_side: int = 65_535,
    rules: PixelRules = PixelRules(),  # noqa: B008  # immutable
) -> Pixels | Failure:
    """Decode one image and resize it to `size`.

    Gray, palette, alpha (over the background), CMYK, 16-bit and float images become RGB. An animation gives its first frame.
    The EXIF orientation is applied. A JPEG is decoded at the smallest DCT scale that is not below twice `size`, unless the
    rules ask for another interpolation than tlbatch's own.

    Args:
        data: the encoded image.
        size: (height, width) of the result.
        max_pixels: an image with more pixels is refused from its header, before it is decoded. A JPEG whose rows are decoded
            one after the other (not progressive) counts at the scale at which it is decoded.
        max_side: an image with a longer side is refused in the same way.
        rules: how its numbers become RGB, and how it is resized.

    Returns:
        Pixels, or a Failure with the reason; bad data never raises an exception.
    """
    if not data:
        return Failure("decode", ErrorKind.EMPTY, "the object has no bytes")
    try:
        least = None if needs_all_pixels(rules) else size
        return _upright(read_picture(data, least, Limits(max_pixels, max_side), rules), size, rules)
    except Exception as error:  # a decoder may raise anything on hostile data; only this row may fail
        return _failure(error, data)


def thumbnail(
    data: bytes,
    *,
    side: int = 224,
    max_pixels: int = 100_000_000,
    rules: PixelRules = PixelRules(),  # noqa: B008  # immutable
) -> bytes | Failure:
    """An upright JPEG of the whole image in its aspect ratio, its longer side `side` pixels; a Failure if `decode` fails."""
    whole = rules._replace(resize="stretch", interpolation="bilinear")
    square = decode(data, (side, side), max_pixels=max_pixels, rules=whole)
    if isinstance(square, Failure):
        return square
    scale = side / max(square.width, square.height)
    shape = (max(1, round(square.width * scale)), max(1, round(square.height * scale)))
    return _as_jpeg(Image.fromarray(square.array).resize(shape, Image.Resampling.BILINEAR), 80)


def upright_jpeg(data: bytes, size: Size, *, rules: PixelRules) -> bytes | Failure:
    """An upright JPEG of the whole image in a size (height, width), as a person sees it; a Failure if `decode` fails."""
    pixels = decode(data, size, rules=rules._replace(resize="stretch", interpolation="bilinear"))
    return pixels if isinstance(pixels, Failure) else _as_jpeg(Image.fromarray(pixels.array), 92)


def _as_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _upright(picture: Picture, size: Size, rules: PixelRules) -> Pixels:
    """Resize, convert to sRGB, and turn; what is not rounded after resizing is converted and turned before."""
    image = picture.image
    if rules.dtype == "uint8":
        image = resized(image, stored_size(size, picture.orientation), rules)
    image = colour.to_srgb(image, picture.profile)
    if picture.orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[picture.orientation])
    array = np.asarray(image) if rules.dtype == "uint8" else resized_as_tensorflow(image, size[::-1], rules)
    width, height = picture.size
    upright = (height, width) if picture.orientation in SIDEWAYS else (width, height)
    return Pixels(array, *upright, picture.white_level)


def _failure(error: Exception, data: bytes) -> Failure:
    """Why an image could not be decoded: the name of its format if that is not supported, else what its decoder says."""
    reason = recognise.unsupported(data)
    message = f"{error}" or type(error).__name__
    kind = ErrorKind.DECODE_FAILED
    if isinstance(error, TooLargeError):
        kind = ErrorKind.TOO_LARGE
    elif isinstance(error, MemoryError):
        kind, message = ErrorKind.TOO_LARGE, "decoding needs more memory than is available"
    elif isinstance(error, UnsupportedError):
        kind = ErrorKind.UNSUPPORTED
    elif reason is not None:
        kind, message = ErrorKind.UNSUPPORTED, reason
    elif isinstance(error, UnidentifiedImageError) or (data.startswith(b"BM") and not recognise.is_beginning(data)):
        kind, message = _unidentified(data)
    elif isinstance(error, EOFError) or any(word in message.lower() for word in _TRUNCATED_WORDS):
        kind = ErrorKind.TRUNCATED
    return Failure("decode", kind, message)


_TRUNCATED_WORDS = ("truncated", "unexpected end", "not enough", "need_more_input")


def _unidentified(data: bytes) -> tuple[ErrorKind, str]:
    if data.startswith(png.SIGNATURE) and b"IEND" in data[-64:]:
        return ErrorKind.DECODE_FAILED, "a PNG with a damaged or unknown header"
    if recognise.is_beginning(data):
        return ErrorKind.TRUNCATED, f"only the beginning of an image: {len(data)} bytes"
    if recognise.is_tga(data):
        return ErrorKind.UNSUPPORTED, "TGA is not supported"
    return ErrorKind.NOT_AN_IMAGE, f"begins with {data[:12]!r}, which is not the start of any image format"
