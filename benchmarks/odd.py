"""Measure the cost of what people leave in stores: photographs alone, and among everything else, alternating.

    .venv/bin/python benchmarks/odd.py [IMAGES] [ROUNDS]

Everything else comes from the tests: five copies of the odd images of `hostile.py`, and of `test_mixed_store.py` the shards,
the litter and the files that are no pictures. A rate counts all rows over the whole command. A ratio above 1 means that the
rest costs less a row than photographs do.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

from photographs import repeated, run, train

sys.path.append(str(Path(__file__).parent.parent / "tests"))
sys.path.append(str(Path(__file__).parent.parent / "tests" / "integration"))
from support.hostile import MAX_PIXELS, corpus
from test_mixed_store import LITTER, OTHERS, shards

from tlbatch.images.names import IMAGE_SUFFIXES

TIMES = 5


def main() -> None:
    """Print both rates and their ratio for each round."""
    images, rounds = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((1, 5_000), (2, 3)))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        good, bundle = repeated(root, images), train(root)
        mixed = root / "mixed"
        mixed.mkdir()
        for photo in good.iterdir():
            os.link(photo, mixed / photo.name)
        odd, rest = corpus() * TIMES, {**shards(), **dict.fromkeys(LITTER, corpus()[0].data), **dict.fromkeys(OTHERS, b"text")}
        for number, one in enumerate(odd):
            suffix = Path(one.name).suffix.lower()
            name = f"{number * images // len(odd):06d}-{number}{suffix if suffix in IMAGE_SUFFIXES else '.jpg'}"
            (mixed / name).write_bytes(one.data)
        for name, data in rest.items():
            (mixed / name).parent.mkdir(parents=True, exist_ok=True)
            (mixed / name).write_bytes(data)
        print(f"{images:,} photographs; {len(odd):,} odd images, {len(rest)} shards and other files\n")
        print("| photographs, images/s | among everything else | ratio |")
        print("| ---: | ---: | ---: |")
        ratios = []
        for number in range(rounds):
            rates = [rate(store, bundle, root / f"out-{number}-{store.name}") for store in (good, mixed)]
            ratios.append(rates[1] / rates[0])
            print(f"| {rates[0]:.0f} | {rates[1]:.0f} | {ratios[-1]:.3f} |", flush=True)
        print(f"\nmedian ratio {statistics.median(ratios):.3f}")


def rate(store: Path, bundle: str, output: Path) -> float:
    """Listed images per second of one command."""
    asked = ["--images", store, "--bundle", bundle, "--output", output, "--set", "max_failed_ratio=1"]
    asked += ["--set", f"max_pixels={MAX_PIXELS}"]
    done = run("classify", *asked, "--set", "report=false")
    return float(done["listed"] / done["seconds"])


if __name__ == "__main__":
    main()
