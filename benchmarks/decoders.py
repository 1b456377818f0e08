"""Measure decoding and resizing by one thread: what tlbatch did, what it does, and what others do.

    .venv/bin/python benchmarks/decoders.py PHOTOS [--rounds 5]

PHOTOS is a folder of JPEG photographs of about 500x375 pixels. The solar cells are those of the demo, grey PNGs of 300x300. How
far values are from Pillow's, and how many images get the same label, is measured on the photographs and on random crops of them
at 160 pixels; the model is that of `choices.py`. simplejpeg and OpenCV use the smallest DCT scale that is at least twice the
target size, as Pillow does for tlbatch. OpenCV resizes by area.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest import mock

import cv2
import numpy as np
import simplejpeg
from head_training import CELLS
from PIL import Image

from tlbatch.images import convolution, resize
from tlbatch.images import decode as stage
from tlbatch.images.decode import Pixels, decode
from tlbatch.schema import NEW_RULES, PixelRules

MARGIN, ODD_CELLS = 2, 10
LARGE = (4000, 3000)
#: JPEG bytes and a side -> RGB pixels (side, side, 3).
Way = Callable[[bytes, int], np.ndarray]


def by_pillow(data: bytes, side: int) -> np.ndarray:
    """As bundles have it that were made before there was `bilinear_cykooz`."""
    return pixels_of(data, side, PixelRules())


def by_pillow_as_rgb(data: bytes, side: int) -> np.ndarray:
    """The same, but grey becomes RGB before it is resized, as tlbatch did then."""
    with mock.patch.object(stage, "resized", resized_as_rgb):
        return by_pillow(data, side)


def resized_as_rgb(image: Image.Image, size: tuple[int, int], rules: PixelRules) -> Image.Image:
    """As `resized`, of an image that is not grey."""
    return resize.resized(image.convert("RGB") if image.mode == "L" else image, size, rules)


def by_cykooz(data: bytes, side: int) -> np.ndarray:
    """As bundles have it that are made today."""
    return pixels_of(data, side, NEW_RULES)


def by_numpy(data: bytes, side: int) -> np.ndarray:
    """The same where there is no build of `cykooz_resizer`."""
    with mock.patch.object(convolution, "fastest", no_package):
        return by_cykooz(data, side)


def no_package() -> convolution.Pass:
    """What is chosen then."""
    return convolution.in_numpy


def by_simplejpeg(data: bytes, side: int) -> np.ndarray:
    """Decoded by simplejpeg, resized as today."""
    least = MARGIN * side
    image = Image.fromarray(simplejpeg.decode_jpeg(data, min_height=least, min_width=least, min_factor=1))
    return np.asarray(convolution.resized_bilinear(image, (side, side)))


def by_opencv(data: bytes, side: int) -> np.ndarray:
    """Decoded and resized by OpenCV."""
    flag = cv2.IMREAD_COLOR
    if data.startswith(b"\xff\xd8"):
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        scales = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
        flag = next((flag for scale, flag in scales.items() if min(height, width) // scale >= MARGIN * side), flag)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    return cv2.cvtColor(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)


def pixels_of(data: bytes, side: int, rules: PixelRules) -> np.ndarray:
    """What tlbatch makes of an image by these rules."""
    found = decode(data, (side, side), rules=rules)
    assert isinstance(found, Pixels), found
    return found.array


WAYS: Mapping[str, Way] = {
    "Pillow, grey as RGB (before)": by_pillow_as_rgb,
    "Pillow (older bundles)": by_pillow,
    "`cykooz_resizer` (new bundles)": by_cykooz,
    "the same in NumPy": by_numpy,
    "simplejpeg, `cykooz_resizer`": by_simplejpeg,
    "OpenCV": by_opencv,
}
TLBATCHS = list(WAYS)[:4]


def main() -> None:
    """Print two tables of medians; the ways alternate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", nargs=2, metavar=("WAY", "FILE"), help="decode one file and print what that took")
    options = parser.parse_args()
    if options.large:
        return tell_large(WAYS[options.large[0]], Path(options.large[1]).read_bytes())
    cv2.setNumThreads(1)
    photos = [path.read_bytes() for path in sorted([*options.photos.glob("*.JPEG"), *options.photos.glob("*.jpg")])]
    cells = [path.read_bytes() for path in sorted(CELLS.rglob("*.png"))[::ODD_CELLS]]
    columns = {"photographs to 160": (photos, 160), "to 224": (photos, 224), "solar cells to 160": (cells, 160)}
    took: dict[tuple[str, str], list[float]] = {(name, column): [] for name in WAYS for column in columns}
    for _ in range(options.rounds):
        for column, (files, side) in columns.items():
            for name, way in WAYS.items():
                if way is not by_simplejpeg or files is not cells:
                    took[name, column].append(milliseconds(way, files, side))
    differences = compared(options.photos)
    print(f"| CPU ms an image | {' | '.join(columns)} | values off, at most | mean | same label |\n| --- |{' ---: |' * 6}")
    for name in WAYS:
        each = [f"{median(took[name, column]):.2f}" if took[name, column] else "" for column in columns]
        print(f"| {name} | {' | '.join(each)} | {differences[name]} |")
    print("\n| 12 megapixels to 160 | JPEG, CPU ms | peak memory, MiB | PNG, CPU ms | peak memory, MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with large_files(photos[0]) as large:
        for name in TLBATCHS:
            print(f"| {name} | {' | '.join(alone(options.photos, name, file, options.rounds) for file in large)} |")
    return None


def milliseconds(way: Way, files: list[bytes], side: int) -> float:
    """CPU time of one file."""
    began = time.process_time()
    for data in files:
        way(data, side)
    return (time.process_time() - began) / len(files) * 1000


def compared(folder: Path) -> dict[str, str]:
    """For each way three cells of the table: how far it is from Pillow's pixels, and from the labels of these."""
    import choices  # and Keras, which takes memory

    files = list(choices.photographs(folder))
    files = files[: len(files) // choices.BATCH * choices.BATCH]
    with tempfile.TemporaryDirectory() as temporary:
        xml = Path(temporary, "model.xml")
        choices.dog_classifier().export(str(xml), format="openvino", verbose=False)
        model = choices.compiled(xml, "f32")
        wanted = np.stack([by_pillow(data, choices.SIZE) for data in files])
        labels = choices.scores(model, wanted).argmax(1)
        found = {}
        for name, way in WAYS.items():
            given = np.stack([way(data, choices.SIZE) for data in files])
            apart = np.abs(given.astype(np.int16) - wanted)
            same = (choices.scores(model, given).argmax(1) == labels).mean()
            found[name] = f"{apart.max()} | {apart.mean():.3f} | {same:.2%}"
    return found


@contextmanager
def large_files(photo: bytes) -> Iterator[list[Path]]:
    """A photograph of 12 megapixels as JPEG and as PNG."""
    with tempfile.TemporaryDirectory() as folder, Image.open(io.BytesIO(photo)) as small:
        whole = small.convert("RGB").resize(LARGE, Image.Resampling.BICUBIC)
        files = [Path(folder, "large.jpg"), Path(folder, "large.png")]
        for file in files:
            whole.save(file)
        yield files


def alone(photos: Path, name: str, file: Path, rounds: int) -> str:
    """Two cells: the median CPU time, and the peak memory of the process."""
    command = [sys.executable, __file__, str(photos), "--large", name, str(file)]
    told = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(rounds)]
    return " | ".join(f"{median(float(one[n]) for one in told):.1f}" if n == 0 else f"{told[0][1]}" for n in (0, 1))


def tell_large(way: Way, data: bytes) -> None:
    """Print the CPU time, without that of the first time, which imports, and the peak memory of this process."""
    took = median([milliseconds(way, [data], 160) for _ in range(4)][1:])
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(f"{took:.1f} {int(peak) / 1024:.0f}")


if __name__ == "__main__":
    main()
