"""A picture -> another size, by a convolution in whole numbers that gives the same bytes on every machine.

The filter is Pillow's antialiased bilinear, first across and then down. Each old pixel's share in a new one is rounded to 16
bits and each sum to 8 bits. Pillow's shares have 22 bits, so some of its pixels differ by 1 or 2.

`cykooz_resizer` (Rust) computes this with vector instructions, four times as fast as Pillow. There are no builds of it for some
machines, such as those with Linux on Arm. There NumPy and SciPy compute the same bytes, in two to three times Pillow's time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from scipy import sparse

#: The modes that are brought to another size here; all others are Pillow's.
_MODES = ("L", "RGB", "CMYK")
#: Shares have as many binary digits as fit into 16 bits with their sign, and in no case more than these.
_MOST_DIGITS, _TOO_LARGE = 21, 1 << 15
#: Values that NumPy multiplies at once; the memory for more would come from the kernel each time, which takes longer.
_AT_ONCE = 1 << 18
_STRIP, _TURNED = 128, Image.Transpose.TRANSPOSE
#: SHA-256 of the probe's pixels in its new sizes.
_RIGHT = "3a52b1b845cf8940bfb1810cfcaa9eb4b5c43791e8781e8de75f11cc9eb0b207"

#: A picture, and a new (width, height) of which one is the picture's own -> a picture.
Pass = Callable[[Image.Image, tuple[int, int]], Image.Image]


def resized_bilinear(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at another (width, height); a picture of another mode than L, RGB and CMYK as Pillow resizes it."""
    if image.mode not in _MODES:
        return image.resize(size, Image.Resampling.BILINEAR)
    one_pass = fastest()
    for step in ((size[0], image.height), size):
        if image.size != step:
            image = one_pass(image, step)
    return image


@cache
def fastest() -> Pass:
    """The package, if it is installed and gives the right bytes; otherwise NumPy."""
    try:
        found = _in_rust()
        right = _digest_of_probe(found) == _RIGHT
    except Exception:  # there is no build for this machine, or it does not work with this Pillow
        return in_numpy
    return found if right else in_numpy


def _digest_of_probe(one_pass: Pass) -> str:
    """SHA-256 of what becomes of a picture of noise in each mode: smaller and larger, across and down."""
    found = hashlib.sha256()
    for mode, bands in zip(_MODES, (1, 3, 4), strict=True):
        image = Image.frombytes(mode, (61, 67), hashlib.shake_256().digest(61 * 67 * bands))
        for size in ((19, 67), (61, 19), (97, 67), (61, 97)):
            found.update(one_pass(image, size).tobytes())
    return found.hexdigest()


def _in_rust() -> Pass:
    """Raises ImportError where the package is not installed."""
    from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

    options = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear))  # without a pool: in the calling thread

    def one_pass(image: Image.Image, size: tuple[int, int]) -> Image.Image:
        found = Image.new(image.mode, size, None)  # every pixel is written
        Resizer().resize_pil(image, found, options)  # one for each picture: threads must not share it, and it costs nothing
        return found

    return one_pass


def in_numpy(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture with another width or another height; its mode is L, RGB or CMYK."""
    if size[0] != image.width:
        whole = Image.new(image.mode, size, None)  # of strips: a large picture is not turned as a whole
        for top in range(0, image.height, _STRIP):
            strip = image.crop((0, top, image.width, min(top + _STRIP, image.height))).transpose(_TURNED)
            whole.paste(in_numpy(strip, (strip.width, size[0])).transpose(_TURNED), (0, top))
        return whole
    values = np.asarray(image)
    rows = values.reshape(len(values), -1)
    shares, digits = _shares(len(rows), size[1])
    found = np.empty((size[1], rows.shape[1]), np.uint8)
    at_once = max(1, _AT_ONCE // len(rows))
    for left in range(0, rows.shape[1], at_once):
        sums = shares @ rows[:, left : left + at_once].astype(np.int32)
        found[:, left : left + at_once] = np.clip((sums + (1 << (digits - 1))) >> digits, 0, 255)
    return Image.fromarray(found.reshape(size[1], *values.shape[1:]), image.mode)


@lru_cache(maxsize=64)
def _shares(length: int, side: int) -> tuple[sparse.csr_array, int]:
    """What each of `side` new pixels takes of `length` old ones.

    Returns:
        (side, length) int32, to be divided by two to the power of the number that comes last.
    """
    from scipy import sparse

    scale = length / side
    reach = max(scale, 1.0)
    middle = (np.arange(side)[:, None] + 0.5) * scale
    first, end = np.maximum(np.floor(middle - reach), 0), np.minimum(np.ceil(middle + reach), length)
    places = first + np.arange(int((end - first).max()))
    inside = places < end
    shares = np.maximum(1 - np.abs((places - (middle - 0.5)) * (1 / reach)), 0) * inside
    shares /= np.cumsum(shares, axis=1)[:, -1:]  # summed from left to right: another order has other last digits
    digits = 0
    while digits < _MOST_DIGITS and np.floor(shares.max() * 2.0 ** (digits + 1) + 0.5) < _TOO_LARGE:
        digits += 1
    whole = np.floor(shares[inside] * 2.0**digits + 0.5).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(inside.sum(axis=1))])
    rows = whole, places[inside].astype(np.int32), starts.astype(np.int32)
    return sparse.csr_array(rows, shape=(side, length)), digits
