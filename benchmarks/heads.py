"""Compare heads on the demo's solar cells: today's default with Adam on the last layer, by the number of labels.

    .venv/bin/python benchmarks/heads.py [SPLITS]

The features are extracted once for each kind. In each split a fifth of the cells is for measuring; of the others, as many as
the row says are labelled. Both heads get the same labelled cells and are measured on the same ones.
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from head_training import CELLS, SIZE, write_labels
from photographs import WEIGHTS

import tlbatch
from tlbatch.commands.splits import split_classes

COUNTS = (50, 100, 200, 500, 1000, None)
#: Name -> which features, and which head.
WAYS = {"last layer, Adam": ("last", "sgd"), "five depths, convex": ("depths", "convex")}


def main() -> None:
    """Extract, train 2 x 6 x SPLITS heads, and print a table."""
    splits = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        labels = known_labels(root / "known.csv")
        for features_of, _ in WAYS.values():
            settings = {"base": "MobileNetV2", "size": SIZE, "weights": str(WEIGHTS), "features_of": features_of}
            tlbatch.extract(images=str(CELLS), output=str(root / features_of), report=False, **settings)
        print("| labelled cells | " + " | ".join(f"{way}: accuracy | calibration error" for way in WAYS) + " | better |")
        print("| ---: |" + " ---: |" * (2 * len(WAYS) + 1))
        for count in COUNTS:
            found = [measure(root, labels, count, 100 + number) for number in range(splits)]
            print(row(count, found), flush=True)


def known_labels(file: Path) -> dict[str, str]:
    """Key -> label of every cell, by way of a labels file."""
    write_labels(file)
    with file.open() as known:
        return {row["key"]: row["label"] for row in csv.DictReader(known)}


def measure(root: Path, labels: dict[str, str], count: int | None, seed: int) -> list[tuple[float, float]]:
    """Accuracy and calibration error of each way on one split."""
    keys = sorted(labels)
    classes = np.array([labels[key] == "functional" for key in keys], np.int64)
    parts = split_classes(classes, 0.15, 0.2, seed)
    labelled = np.random.default_rng(seed).permutation(np.flatnonzero(parts < 2))[:count]
    held_out = set(labelled[: round(0.15 / 0.8 * len(labelled))].tolist())
    file = root / "labels.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["key", "label", "split"])
        for number in [*labelled.tolist(), *np.flatnonzero(parts == 2).tolist()]:
            part = "test" if parts[number] == 2 else "validation" if number in held_out else "train"
            writer.writerow([keys[number], labels[keys[number]], part])
    found = []
    for features_of, head in WAYS.values():
        settings = {"labels": str(file), "head": head, "seed": seed, "bundle": str(root / "bundle")}
        trained = tlbatch.train(features=str(root / features_of), **settings)
        found.append((trained["accuracy"], trained["calibration"]["calibration_error"]["after"]))
    return found


def row(count: int | None, found: list[list[tuple[float, float]]]) -> str:
    """Means over the splits, with the range of the accuracies, and in how many of the splits the second way is better."""
    told = [f"{count:,}" if count else "all"]
    for ways in zip(*found, strict=True):
        accuracies, errors = zip(*ways, strict=True)
        low, high = min(accuracies), max(accuracies)
        told += [f"{statistics.mean(accuracies):.1%} ({low:.1%} to {high:.1%})", f"{statistics.mean(errors):.3f}"]
    better = sum(ways[-1][0] >= ways[0][0] for ways in found)
    return "| " + " | ".join([*told, f"{better} of {len(found)}"]) + " |"


if __name__ == "__main__":
    main()
