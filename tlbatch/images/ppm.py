"""A PGM or PPM whose greatest value is 65,535 -> its samples; Pillow reads the other kinds, and scales them itself.

Most programs, OpenCV among them, write 65,535 for whatever is stored in 16 bits, so it does not say what is white.
"""

from __future__ import annotations

import re

import numpy as np

#: Magic number, width, height and greatest value, with white space and comments between them, and one white space behind.
_HEADER = re.compile(rb"P([2356])" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,10})" * 3 + rb"\s")


def samples_of_16_bits(data: bytes) -> np.ndarray | None:
    """(height, width, 1 or 3) uint16 samples of a file that Pillow could load; None if its greatest value is another."""
    header = _HEADER.match(data)
    if header is None or int(header[4]) != 65_535:
        return None
    width, height, bands = int(header[2]), int(header[3]), 3 if header[1] in b"36" else 1
    count = width * height * bands
    body = data[header.end() :]
    if header[1] in b"23":
        samples = np.fromstring(re.sub(rb"#[^\r\n]*", b"", body), np.uint16, count, sep=" ")
    else:
        samples = np.frombuffer(body[: 2 * count], ">u2").astype(np.uint16)
    return samples.reshape(height, width, bands) if len(samples) == count else None
