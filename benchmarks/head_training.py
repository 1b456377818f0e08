"""Compare training a head on features with `model.fit` of the stacked model: accuracy and seconds.

    .venv/bin/python benchmarks/head_training.py [--seeds 3]

Both sides train ten epochs on the same split of the demo's solar cells. Each runs in a process of its own, alternating;
start-up and saving are included. The stacked side decodes its images once and keeps them in memory: it runs the base in every
epoch and reads each file once.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from photographs import WEIGHTS

EPOCHS, SIZE, BATCH = 10, 160, 32
#: What makes a head the one that `model.fit` of the stacked model trains.
ADAM = {"head": "sgd", "features_of": "last", "epochs": EPOCHS, "patience": EPOCHS}
CELLS = Path(find_spec("elpv_dataset").origin).parent / "data"


def main() -> None:
    """Run both sides for every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stacked", metavar="SPLIT.csv", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stacked:
        print(json.dumps({"accuracy": fit_stacked(Path(options.stacked), options.seed)}))
        return
    rows = [measure(seed) for seed in range(options.seeds)]
    print("| seed | features: accuracy | stacked: accuracy | features: s | stacked: s | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for seed, (features, stacked) in enumerate(rows):
        print(
            f"| {seed} | {features[0]:.4f} | {stacked[0]:.4f} | {features[1]:.1f} | {stacked[1]:.1f} "
            f"| {stacked[1] / features[1]:.2f} |"
        )
    ratio = statistics.median(stacked[1] / features[1] for features, stacked in rows)
    apart = statistics.mean(features[0] for features, _ in rows) - statistics.mean(stacked[0] for _, stacked in rows)
    print(f"\nmedian ratio {ratio:.2f}; mean accuracy of features minus stacked {100 * apart:+.2f} points")


def measure(seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Accuracy and seconds of both sides for one seed."""
    with tempfile.TemporaryDirectory() as folder:
        labels, bundle = Path(folder, "labels.csv"), Path(folder, "bundle")
        write_labels(labels)
        settings = [f"--set={name}={value}" for name, value in {**ADAM, "seed": seed}.items()]
        command = [sys.executable, "-m", "tlbatch", "train", "--images", CELLS, "--labels", labels, "--size", SIZE]
        features = timed([*command, "--weights", WEIGHTS, "--bundle", bundle, "--json", *settings])
        stacked = timed([sys.executable, __file__, "--stacked", bundle / "split.csv", "--seed", seed])
    return features, stacked


def timed(command: list[object]) -> tuple[float, float]:
    """Accuracy and seconds of a command that prints JSON."""
    began = time.perf_counter()
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    seconds = time.perf_counter() - began
    return json.loads(done.stdout.splitlines()[-1])["accuracy"], seconds


def write_labels(target: Path) -> None:
    """Write the data set's table as a labels file."""
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "label"])
        for line in (CELLS / "labels.csv").read_text().splitlines():
            key, probability, _ = line.split()
            writer.writerow([key, "defective" if float(probability) >= 0.5 else "functional"])


def fit_stacked(split: Path, seed: int) -> float:
    """Test accuracy of the frozen base and a new head, trained together by `model.fit`."""
    import keras
    import numpy as np

    from tlbatch.images.decode import Pixels, decode
    from tlbatch.model.bases import BASES, build_network, with_preprocessing
    from tlbatch.model.head import build_head
    from tlbatch.schema import NEW_RULES

    with split.open() as file:
        rows = list(csv.DictReader(file))
    decoded = [decode((CELLS / row["key"]).read_bytes(), (SIZE, SIZE), rules=NEW_RULES) for row in rows]
    pixels = np.stack([one.array for one in decoded if isinstance(one, Pixels)])
    classes = np.array([row["label"] == "functional" for row in rows], np.int64)
    part = np.array([row["split"] for row in rows])
    network = build_network(BASES["MobileNetV2"], SIZE, WEIGHTS.read_bytes())
    keras.utils.set_random_seed(seed)
    inputs, features = with_preprocessing(BASES["MobileNetV2"], network, SIZE)
    head = build_head(features.shape[-1], 2)
    model = keras.Model(inputs, head(features))
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    held = (pixels[part == "validation"], classes[part == "validation"])
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=EPOCHS, restore_best_weights=True)
    train = part == "train"
    model.fit(pixels[train], classes[train], BATCH, EPOCHS, verbose=0, validation_data=held, callbacks=[stop])
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "stacked.keras"))
    return float(model.evaluate(pixels[part == "test"], classes[part == "test"], verbose=0)[1])


if __name__ == "__main__":
    main()
