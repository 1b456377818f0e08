"""Measure a base in int8 beside float32: images for each CPU second of the model alone, and accuracy of heads on its features.

    .venv/bin/python benchmarks/quantized.py speed [ROUNDS]
    .venv/bin/python benchmarks/quantized.py accuracy [cells|faces|digits|emoji] [SPLITS]

ResNet50 and VGG16 have random weights, which compute as long as others. For the accuracy,
MobileNetV2 has its real weights; both heads of a split are trained and measured on the same images.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from head_training import SIZE
from heads import measure
from image_sets import image_set
from photographs import PHOTOGRAPHS, WEIGHTS

import tlbatch
from tlbatch.images.decode import Pixels, decode
from tlbatch.model.bases import BASES
from tlbatch.model.engines import Engine, load_engine
from tlbatch.model.frozen import Frozen, freeze, quantized_base, save_bundle
from tlbatch.schema import PixelRules
from tlbatch.storage.resolve import resolve

#: Base -> pixels of its input.
SIZES = {"MobileNetV2": 160, "ResNet50": 224, "VGG16": 160}
#: Images from which the ranges are taken, and that are predicted in a round.
CALIBRATION, IMAGES = 32, 64


def main() -> None:
    """Print one table."""
    what, *rest = sys.argv[1:] or ["speed"]
    if what == "speed":
        speed(int(rest[0]) if rest else 7)
    else:
        accuracy(rest[0] if rest else "cells", int(rest[1]) if len(rest) > 1 else 10)


def speed(rounds: int) -> None:
    """Images for each second of CPU time of both, in turn: the median, with its range."""
    print("| base | float32, images/CPU s | int8, images/CPU s | times |")
    print("| --- | ---: | ---: | ---: |")
    for name, size in SIZES.items():
        found = (decode(path.read_bytes(), (size, size)) for path in sorted(PHOTOGRAPHS.glob("*.JPEG"))[:CALIBRATION])
        pixels = np.stack([one.array for one in found if isinstance(one, Pixels)])
        data = WEIGHTS.read_bytes() if name == "MobileNetV2" else "random"
        frozen = freeze(BASES[name], size, PixelRules(), "random", data, "depths")
        with tempfile.TemporaryDirectory() as folder:
            engines = [
                engine(one, pixels, Path(folder, str(n))) for n, one in enumerate((frozen, quantized_base(frozen, pixels)))
            ]
            batch = np.resize(pixels, (IMAGES, size, size, 3))
            rates = [[rate(one, batch) for one in engines] for _ in range(rounds)]
        (before, after), times = zip(*rates, strict=True), [one[1] / one[0] for one in rates]
        print(f"| {name} at {size} | {told(before, '.3g')} | {told(after, '.3g')} | {told(times, '.2f')} |", flush=True)


def engine(frozen: Frozen, pixels: np.ndarray, folder: Path) -> Engine:
    """The CPU engine of a base, warm."""
    made = load_engine(save_bundle(resolve(str(folder)), frozen, None, pixels), threads=os.cpu_count() or 1)
    made.predict(pixels)
    return made


def rate(of: Engine, batch: np.ndarray) -> float:
    """Images for each second of CPU time, which other work on the machine disturbs less than the clock."""
    began = time.process_time()
    of.predict(batch)
    return len(batch) / (time.process_time() - began)


def told(numbers: list[float] | tuple[float, ...], form: str) -> str:
    """The median, with its range."""
    low, middle, high = (format(one, form) for one in (min(numbers), statistics.median(numbers), max(numbers)))
    return f"{middle} ({low} to {high})"


def accuracy(name: str, splits: int) -> None:
    """Accuracy and calibration error of heads on both kinds of features, and the difference, over the splits."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images, labels = image_set(name, root)
        for kind, numbers in (("float32", "none"), ("int8", "int8")):
            base = {"size": SIZE, "weights": str(WEIGHTS), "quantize": numbers}
            tlbatch.extract(images=str(images), output=str(root / kind), features_dtype="float32", report=False, **base)
        ways = {kind: (kind, "convex") for kind in ("float32", "int8")}
        found = [measure(root, labels, round(0.8 * len(labels)), 100 + number, ways) for number in range(splits)]
    print("| set | float32: accuracy | calibration error | int8: accuracy | calibration error | int8 - float32, points |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    cells = []
    for pairs in zip(*found, strict=True):
        accuracies, errors = zip(*pairs, strict=True)
        cells += [f"{statistics.mean(accuracies):.1%}", f"{statistics.mean(errors):.3f}"]
    apart = [100 * (int8[0] - float32[0]) for float32, int8 in found]
    print(f"| {name} | {' | '.join(cells)} | {statistics.mean(apart):+.1f} ({min(apart):+.1f} to {max(apart):+.1f}) |")


if __name__ == "__main__":
    main()
