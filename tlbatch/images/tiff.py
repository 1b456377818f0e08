"""A TIFF that Pillow does not read, or not rightly -> samples: any depth, floats, planes, white is zero, extra bands.

tifffile gives the samples as they are stored, so what the tags say of them is applied here.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import numpy as np
import tifffile

from tlbatch.images.recognise import TooLargeError, UnsupportedError

#: Compressions that are undone here: none, LZW, deflate (two numbers), PackBits, LZMA, Zstandard. The image codecs that a
#: TIFF may contain are not, and are named.
_COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 50000)
_CODECS = {
    2: "CCITT RLE",
    3: "CCITT Group 3",
    4: "CCITT Group 4",
    6: "old-style JPEG",
    7: "JPEG",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG",
    34927: "WebP",
    34933: "PNG",
    34934: "JPEG XR",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK = 0, 1, 2, 3, 5
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4}
_RAW_PHOTOMETRICS = (32803, 34892)  # colour filter array, linear raw
_RAW = "a camera's raw file (DNG, NEF, ARW) is not supported"
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_ASSOCIATED, _UNASSOCIATED = 1, 2
_MAX_BYTES_PER_PIXEL = 8

# Tags that the pages of tifffile have no attribute for.
_ORIENTATION, _MAX_SAMPLE_VALUE, _ICC_PROFILE, _DNG_VERSION, _SUB_IFDS = 274, 281, 34675, 50706, 330
_NEW_SUBFILE_TYPE, _COMPRESSION, _PHOTOMETRIC, _SUBSAMPLING = 254, 259, 262, 530
_REDUCED_OR_MASK, _YCBCR = 1 | 4, 6
#: Image codecs inside a TIFF that Pillow decodes: CCITT and JPEG.
_CODECS_OF_PILLOW = (2, 3, 4, 6, 7)
#: Pages among which the main one is looked for.
MOST_PAGES = 16

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a damaged file is a row, not a log line


class Samples(NamedTuple):
    """The first page of a TIFF.

    Attributes:
        colours: (height, width, 1, 3 or 4) grey, RGB or CMYK, as stored.
        inverted: whether zero is white, in grey.
        alpha: (height, width), or None.
        premultiplied: whether the colours are multiplied by alpha.
        white: the greatest value by the file's own words; None if it says nothing.
        full: the greatest value that can be stored.
        orientation: as in EXIF.
        profile: its ICC profile.
    """

    colours: np.ndarray
    inverted: bool
    alpha: np.ndarray | None
    premultiplied: bool
    white: float | None
    full: float
    orientation: int
    profile: bytes | None


def read(data: bytes, max_pixels: int, require_size: Callable[[tuple[int, int]], None]) -> Samples:
    """Read the first page that is neither a smaller copy of another page nor a mask.

    Args:
        data: the file.
        max_pixels: the most pixels of a tile; eight times as many bytes are the most that are decoded.
        require_size: raises an exception for a (width, height) that is too large.

    Raises:
        UnsupportedError: a kind that is not decoded.
        TooLargeError: more pixels, or a larger tile, than `max_pixels`.
        Exception: tifffile raises many kinds for damaged files.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = _main_page(file)
        _require_supported(page)
        require_size((int(page.imagewidth), int(page.imagelength)))
        _require_memory(page, max_pixels)
        _require_whole(page, len(data))
        samples = _segments(page)
        bits = _bits(page)
        orientation = page.tags.valueof(_ORIENTATION, 1)
        profile = page.tags.valueof(_ICC_PROFILE)
        white, full = _range(page, bits, samples)
        if page.photometric == _PALETTE:
            samples, white, full = _palette(page, samples), 255.0, 255.0
        return _split(page, samples, white, full, orientation if isinstance(orientation, int) else 1, profile)


def _bits(page: Any) -> int:
    if isinstance(page.bitspersample, tuple):
        raise UnsupportedError(f"a TIFF whose bands have different depths {page.bitspersample} is not supported")
    return int(page.bitspersample)


def _require_supported(page: Any) -> None:
    """Raises UnsupportedError with the name of what is not decoded."""
    if _is_raw(page):
        raise UnsupportedError(_RAW)
    compression, photometric, bands = int(page.compression), int(page.photometric), int(page.samplesperpixel)
    if compression not in _COMPRESSIONS:
        name = _CODECS.get(compression, f"compression {compression}")
        raise UnsupportedError(f"{name} inside a TIFF of {page.bitspersample} bits a sample is not supported")
    if photometric not in _COLOURS:
        name = getattr(page.photometric, "name", str(photometric))
        raise UnsupportedError(f"a TIFF of colour space {name} and {page.bitspersample} bits a sample is not supported")
    if int(page.sampleformat) not in (_UNSIGNED, _SIGNED, _FLOAT):
        raise UnsupportedError(f"a TIFF of sample format {int(page.sampleformat)} (complex or undefined) is not supported")
    extra = bands - _COLOURS[photometric]
    if extra < 0:
        raise UnsupportedError(f"a TIFF of {bands} bands in a colour space of {_COLOURS[photometric]} is not supported")
    if _COLOURS[photometric] == 1 and extra > 1:
        raise UnsupportedError(f"a TIFF of {bands} bands, of which only one has a stated meaning, is not supported")
    if page.imagedepth > 1:
        raise UnsupportedError("a TIFF of a volume is not supported")


def require_no_raw(data: bytes) -> None:
    """Raises UnsupportedError if a TIFF is a camera's raw file, of which other decoders read the thumbnail."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if _is_raw(file.pages[0]):
            raise UnsupportedError(_RAW)


def is_secondary(tags: Mapping[int, Any]) -> bool:
    """Whether a page says that it is a smaller copy of another page, or a mask."""
    return bool(int(tags.get(_NEW_SUBFILE_TYPE, 0)) & _REDUCED_OR_MASK)


def require_known(tags: Mapping[int, Any]) -> None:
    """Raises UnsupportedError for what neither Pillow nor tifffile reads rightly, whatever its depth."""
    compression = int(tags.get(_COMPRESSION, 1))
    if compression in _CODECS and compression not in _CODECS_OF_PILLOW:
        raise UnsupportedError(f"{_CODECS[compression]} inside a TIFF is not supported")
    sampling = tags.get(_SUBSAMPLING, (2, 2))
    if tags.get(_PHOTOMETRIC) == _YCBCR and compression == 1 and tuple(sampling) != (1, 1):
        raise UnsupportedError("an uncompressed TIFF in YCbCr with fewer samples of colour is not supported")


def _main_page(file: tifffile.TiffFile) -> Any:
    first: Any = file.pages[0]
    if int(first.tags.valueof(_NEW_SUBFILE_TYPE, 0)) & _REDUCED_OR_MASK:
        for number in range(1, min(len(file.pages), MOST_PAGES)):
            page: Any = file.pages[number]
            if not int(page.tags.valueof(_NEW_SUBFILE_TYPE, 0)) & _REDUCED_OR_MASK:
                return page
    return first


def may_be_raw(tags: Container[int]) -> bool:
    """Whether the tags of a TIFF leave open that it is a camera's raw file."""
    return _DNG_VERSION in tags or _SUB_IFDS in tags


def _is_raw(page: Any) -> bool:
    """Whether this is a camera's raw file, whose first page is only its thumbnail."""
    if _DNG_VERSION in page.tags or int(page.photometric) in _RAW_PHOTOMETRICS:
        return True
    if _SUB_IFDS not in page.tags:
        return False
    return any(int(sub.photometric) in _RAW_PHOTOMETRICS for sub in page.pages or () if sub is not None)


def _require_memory(page: Any, max_pixels: int) -> None:
    width, height = int(page.imagewidth), int(page.imagelength)
    if int(page.tilewidth or 0) * int(page.tilelength or 0) > max_pixels:
        raise TooLargeError(f"a TIFF tile exceeds max_pixels={max_pixels}")
    sample = 1 if page.dtype is None else page.dtype.itemsize
    size = width * height * int(page.samplesperpixel) * sample
    if size > _MAX_BYTES_PER_PIXEL * max_pixels:
        raise TooLargeError(f"{size:,} bytes of samples exceed {_MAX_BYTES_PER_PIXEL} times max_pixels={max_pixels}")


def _require_whole(page: Any, length: int) -> None:
    """Raises EOFError if a strip or tile is missing, or lies behind the end of the file."""
    needed = math.prod(page.chunked)
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(segments) < needed or any(offset + count > length or not count for offset, count in segments[:needed]):
        raise EOFError("the TIFF is truncated")


def _segments(page: Any) -> np.ndarray:
    """(height, width, bands) samples as stored, in one type."""
    planes = int(page.planarconfig) == 2 and page.samplesperpixel > 1
    height, width, bands = int(page.imagelength), int(page.imagewidth), int(page.samplesperpixel)
    found = np.empty((height, width, bands), page.dtype)
    for segment, (plane, _, row, column, _), _ in page.segments(maxworkers=1):
        part = segment[0]
        high, wide = min(part.shape[0], height - row), min(part.shape[1], width - column)
        chosen = slice(plane, plane + 1) if planes else slice(None)
        found[row : row + high, column : column + wide, chosen] = part[:high, :wide]
    return found


def _range(page: Any, bits: int, samples: np.ndarray) -> tuple[float | None, float]:
    """The greatest value by the file's own words, and the greatest value that can be stored."""
    if int(page.sampleformat) != _UNSIGNED:
        return None, 1.0
    full = float(2**bits - 1)
    if bits <= 8 or bits not in (16, 32, 64):
        return full, full
    said = page.tags.valueof(_MAX_SAMPLE_VALUE)
    said = max(said) if isinstance(said, tuple) and said else said
    # Some writers put the greatest value that occurs there, which says nothing of white.
    if isinstance(said, int) and 255 <= said <= full and not said & (said + 1) and int(samples.max(initial=0)) <= said:
        return float(said), full
    return None, full


def _palette(page: Any, samples: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 colours of the indices in the first band, followed by the other bands."""
    if page.colormap is None or samples.dtype.kind != "u":
        raise UnsupportedError("a TIFF with a palette but without its colours is not supported")
    colours = (np.asarray(page.colormap) >> 8).astype(np.uint8).T
    indices = np.minimum(samples[..., 0], len(colours) - 1)
    found: np.ndarray = colours[indices]
    return found


def _split(
    page: Any, samples: np.ndarray, white: float | None, full: float, orientation: int, profile: bytes | None
) -> Samples:
    bands = 3 if page.photometric == _PALETTE else _COLOURS[int(page.photometric)]
    colours, alpha, premultiplied = samples[..., :bands], None, False
    kinds = [int(kind) for kind in page.extrasamples]
    if page.photometric != _PALETTE and samples.shape[2] > bands and kinds and kinds[0] in (_ASSOCIATED, _UNASSOCIATED):
        alpha, premultiplied = samples[..., bands], kinds[0] == _ASSOCIATED
    return Samples(colours, page.photometric == _WHITE_IS_ZERO, alpha, premultiplied, white, full, orientation, profile)
