"""Compare heads on a small labelled set: today's default with Adam on the last layer, by the number of labels.

    .venv/bin/python benchmarks/heads.py [cells|faces|digits|emoji] [SPLITS] [MobileNetV2|InceptionV3] [LABELS,...]

The features are extracted once for each kind. In each split a fifth of the images is for measuring; of the others, as many as
the row says are labelled (`all`: as many as there are), each class with its share. Both heads get the same labels and are
measured on the same images.
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from head_training import SIZE
from image_sets import image_set, inception_weights
from photographs import WEIGHTS

import tlbatch
from tlbatch.commands.splits import split_classes

COUNTS = (50, 100, 200, 500, 1000)
#: Name -> which features, and which head.
WAYS = {"last layer, Adam": ("last", "sgd"), "five depths, convex": ("depths", "convex")}


def main() -> None:
    """Extract, train two heads for each number of labels and split, and print a table."""
    name, splits, base, wanted = (*sys.argv[1:], *("cells", "10", "MobileNetV2", "")[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images, labels = image_set(name, root)
        weights = str(WEIGHTS if base == "MobileNetV2" else inception_weights(root))
        for features_of, _ in WAYS.values():
            network = {"base": base, "size": SIZE, "weights": weights, "features_of": features_of}
            tlbatch.extract(images=str(images), output=str(root / features_of), report=False, **network)
        print("| labels | " + " | ".join(f"{way}: accuracy | calibration error" for way in WAYS) + " | better |")
        print("| ---: |" + " ---: |" * (2 * len(WAYS) + 1))
        classes, most = len(set(labels.values())), round(0.8 * len(labels))
        counts = [*(one for one in COUNTS if 2 * classes <= one < most), most]
        for count in [most if one == "all" else int(one) for one in wanted.split(",")] if wanted else counts:
            found = [measure(root, labels, count, 100 + number) for number in range(int(splits))]
            print(row(count, found), flush=True)


def measure(
    root: Path, labels: dict[str, str], count: int, seed: int, ways: dict[str, tuple[str, str]] = WAYS
) -> list[tuple[float, float]]:
    """Accuracy and calibration error of each way on one split; a way is a folder of features in `root`, and a head."""
    keys = sorted(labels)
    classes = np.unique([labels[key] for key in keys], return_inverse=True)[1]
    parts = split_classes(classes, 0.15, 0.2, seed)
    random = np.random.default_rng(seed)
    places = np.ones(len(keys))
    for label in np.unique(classes):
        members = random.permutation(np.flatnonzero((classes == label) & (parts < 2)))
        places[members] = (np.arange(len(members)) + random.random()) / len(members)
    labelled = np.argsort(places, kind="stable")[:count]
    held_out = set(random.permutation(labelled)[: round(0.15 / 0.8 * len(labelled))].tolist())
    file = root / "labels.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["key", "label", "split"])
        for number in [*labelled.tolist(), *np.flatnonzero(parts == 2).tolist()]:
            part = "test" if parts[number] == 2 else "validation" if number in held_out else "train"
            writer.writerow([keys[number], labels[keys[number]], part])
    found = []
    for features_of, head in ways.values():
        settings = {"labels": str(file), "head": head, "seed": seed, "bundle": str(root / "bundle")}
        trained = tlbatch.train(features=str(root / features_of), **settings)
        found.append((trained["accuracy"], trained["calibration"]["calibration_error"]["after"]))
    return found


def row(count: int, found: list[list[tuple[float, float]]]) -> str:
    """Means over the splits, with the range of the accuracies, and in how many of the splits the second way is better."""
    told = [f"{count:,}"]
    for ways in zip(*found, strict=True):
        accuracies, errors = zip(*ways, strict=True)
        low, high = min(accuracies), max(accuracies)
        told += [f"{statistics.mean(accuracies):.1%} ({low:.1%} to {high:.1%})", f"{statistics.mean(errors):.3f}"]
    better = sum(ways[-1][0] >= ways[0][0] for ways in found)
    return "| " + " | ".join([*told, f"{better} of {len(found)}"]) + " |"


if __name__ == "__main__":
    main()
