"""Measure the cost of odd images: photographs alone, and with five copies of the odd ones, alternating.

    .venv/bin/python benchmarks/odd.py [IMAGES] [ROUNDS]

The odd images come from `hostile.py` of the tests. A rate counts all listed images over the whole command. A ratio above 1
means that odd images cost less than photographs.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

from photographs import repeated, run, train

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from support.hostile import MAX_PIXELS, corpus

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
        odd = corpus()
        for number, one in enumerate(odd * TIMES):
            (mixed / f"{number * images // (len(odd) * TIMES):06d}-{number}-odd").write_bytes(one.data)
        print(f"{images:,} photographs, {len(odd) * TIMES} odd images\n\n| photographs, images/s | with the odd ones | ratio |")
        print("| ---: | ---: | ---: |")
        ratios = []
        for number in range(rounds):
            rates = [rate(store, bundle, root / f"out-{number}-{store.name}") for store in (good, mixed)]
            ratios.append(rates[1] / rates[0])
            print(f"| {rates[0]:.0f} | {rates[1]:.0f} | {ratios[-1]:.3f} |", flush=True)
        print(f"\nmedian ratio {statistics.median(ratios):.3f}")


def rate(store: Path, bundle: str, output: Path) -> float:
    """Listed images per second of one command."""
    asked = ["--images", store, "--bundle", bundle, "--output", output, "--set", "include=*", "--set", "max_failed_ratio=1"]
    asked += ["--set", f"max_pixels={MAX_PIXELS}"]
    done = run("classify", *asked, "--set", "report=false")
    return float(done["listed"] / done["seconds"])


if __name__ == "__main__":
    main()
