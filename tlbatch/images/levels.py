"""Samples of more than 8 bits -> 8 bits, by the value that is white in their file.

Cameras store 10, 12 or 14 bits in 16, and most such files do not say so. If their samples were divided by 257, the picture
would be nearly black, and a model would still give it a confident label.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from tlbatch.images.recognise import UnsupportedError

WhiteLevel = float | Literal["auto"]

#: Greatest values of the sample depths that are stored in more bits than they have.
_USUAL_WHITES = (255, 1023, 4095)
#: How far beyond white a lossy format may take a sample.
_OVERSHOOT = 1.15
#: Rows of float samples that are converted at once.
_ROWS_AT_ONCE = 256


def white_of(samples: np.ndarray, declared: float | None, setting: WhiteLevel, *, lossy: bool = False) -> float:
    """The value that is white.

    Args:
        samples: the colours of a picture, without its alpha channel; unsigned or signed integers, or floats.
        declared: what the file says; None if it says nothing.
        setting: what the user says, for files that say nothing. With `auto`, integers that use only the range of 8, 10 or 12
            bits (of 16 bits, if they are stored in 32) have the greatest value of that range as white, other integers the
            greatest value of their type; floats between 0 and 1 have 1.
        lossy: whether the format may have moved samples a little beyond their range.

    Raises:
        UnsupportedError: floats that are not finite; floats outside 0 to 1, or signed integers, if nothing says their range.
    """
    if samples.dtype.kind == "f" and not np.isfinite(samples).all():
        raise UnsupportedError("floating-point samples that are not finite are not supported")
    if declared is not None:
        return declared
    if setting != "auto":
        return setting
    if samples.dtype.kind == "u":
        full = int(np.iinfo(samples.dtype).max)
        usual = (*_USUAL_WHITES, 65_535) if full > 65_535 else _USUAL_WHITES
        highest = int(samples.max(initial=0)) / (_OVERSHOOT if lossy else 1)
        return next((white for white in usual if highest <= white), full)
    if samples.dtype.kind == "f":
        low, high = float(samples.min(initial=0)), float(samples.max(initial=0))
        if low >= 0 and high <= 1:
            return 1.0
        raise UnsupportedError(f"floating-point samples from {low:.4g} to {high:.4g}; train with white_level=WHITE")
    raise UnsupportedError("signed samples, for which no value is defined as white; train with white_level=WHITE")


def to_8_bits(samples: np.ndarray, white: float) -> np.ndarray:
    """Samples from 0 to `white` as uint8 from 0 to 255; other values are clipped.

    Samples that use all 16 bits give their high byte, as other decoders do.
    """
    if samples.dtype == np.uint8 and white == 255:  # a full range stays as it is
        return samples
    if samples.dtype == np.uint16:
        if white == 65_535:
            return (samples >> 8).astype(np.uint8)
        every = np.arange(65_536, dtype=np.float64)
        table: np.ndarray = np.clip(np.rint(every * (255 / white)), 0, 255).astype(np.uint8)
        found: np.ndarray = table[samples]
        return found
    found = np.empty(samples.shape, np.uint8)
    for row in range(0, len(samples), _ROWS_AT_ONCE):
        part = samples[row : row + _ROWS_AT_ONCE].astype(np.float64)
        found[row : row + _ROWS_AT_ONCE] = np.clip(np.rint(part * (255 / white)), 0, 255)
    return found
