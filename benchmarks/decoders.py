"""Measure three maintained decoders: photographs a second, decoded and resized to 160 pixels by one thread.

    .venv-peers/bin/python benchmarks/decoders.py PHOTOS [--rounds 5]

PHOTOS is a folder of JPEGs. All decoders use the smallest DCT scale that is at least twice the target size, as
`tlbatch/images/decode.py` does. simplejpeg leaves resizing to Pillow. OpenCV resizes by area, which is another filter, so its
pixels differ. The decoders are listed in `peers.txt`, from which `compare.py` makes `.venv-peers`.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

SIZE, MARGIN = 160, 2


def pillow(data: bytes) -> np.ndarray:
    """Decode and resize with Pillow, as tlbatch does."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (MARGIN * SIZE, MARGIN * SIZE))
        return resized(image.convert("RGB"))


def through_simplejpeg(data: bytes) -> np.ndarray:
    """Decode with simplejpeg, resize with Pillow."""
    least = MARGIN * SIZE
    return resized(Image.fromarray(simplejpeg.decode_jpeg(data, min_height=least, min_width=least, min_factor=1)))


def through_opencv(data: bytes) -> np.ndarray:
    """Decode and resize with OpenCV."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    scales = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
    how = next((flag for scale, flag in scales.items() if min(height, width) // scale >= MARGIN * SIZE), cv2.IMREAD_COLOR)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    return cv2.cvtColor(cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)


def resized(image: Image.Image) -> np.ndarray:
    """Resize with Pillow's antialiased bilinear filter."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def main() -> None:
    """Print a table of medians; the decoders alternate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    photos = [path.read_bytes() for path in sorted([*options.photos.glob("*.JPEG"), *options.photos.glob("*.jpg")])]
    ways = {"Pillow": pillow, "simplejpeg, resized by Pillow": through_simplejpeg, "OpenCV": through_opencv}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            rates[name].append(rate(way, photos))
    reference = [pillow(data).astype(int) for data in photos]
    print("| decoder | photographs/s | mean difference of a pixel from Pillow's |\n| --- | ---: | ---: |")
    for name, way in ways.items():
        apart = np.mean([np.abs(way(data) - other).mean() for data, other in zip(photos, reference, strict=True)])
        print(f"| {name} | {statistics.median(rates[name]):.0f} | {apart:.2f} |")


def rate(way: Callable[[bytes], np.ndarray], photos: list[bytes]) -> float:
    """Photographs a second."""
    began = time.perf_counter()
    for data in photos:
        way(data)
    return len(photos) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
