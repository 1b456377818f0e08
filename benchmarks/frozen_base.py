"""Measure stored features, several heads in one pass, calibration and review on the demo's solar cells.

    .venv/bin/python benchmarks/frozen_base.py [heads] [together] [honest] [reviewed] [--rounds 3] [--seeds 10] [--times 4]

`heads`: features are extracted once and three heads are trained on them; the store is rescored and classified with each head.
`together`: three bundles in one pass, compared with one bundle. `honest`: calibration error, and precision at a threshold.
`reviewed`: a labelled set that grows by reviewed cells, compared with one that grows by random cells; draws docs/review.svg.
The first two use features of the last layer, and a larger store that contains the cells several times (`--times`); the others
those of several depths.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from generated import publish_generated
from head_training import CELLS, SIZE, write_labels
from photographs import WEIGHTS, run

from tlbatch.commands.classify import OutputTable
from tlbatch.output.run import Run

ROOT = Path(__file__).parent.parent
BASE = ["--base", "MobileNetV2", "--size", SIZE, "--weights", WEIGHTS]
FIRST, ROUND, ROUNDS = 200, 100, 3
#: Numbers of images whose features are rescored.
ROWS = (50_000, 350_000)


def main() -> None:
    """Run the requested sections; by default all of them."""
    sections = {section.__name__: section for section in (heads, together, honest, reviewed)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--times", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_labels(root / "labels.csv")
        for name in options.sections or sections:
            sections[name](root, options)
            print(flush=True)


def stored(root: Path, features_of: str) -> Path:
    """The cells' features: `last` or `depths`."""
    output = root / features_of
    if not output.exists():
        run("extract", "--images", CELLS, *BASE, "--features-of", features_of, "--output", output)
    return output


def head(root: Path, seed: int) -> Path:
    """A bundle trained on the stored features."""
    bundle = root / f"head-{seed}"
    if not bundle.exists():
        labels = ["--labels", root / "labels.csv"]
        run("train", "--features", stored(root, "last"), *labels, "--bundle", bundle, "--set", f"seed={seed}")
    return bundle


def many_cells(root: Path, times: int) -> Path:
    """A folder with the cells `times` times, as links."""
    store = root / f"cells-{times}"
    if not store.exists():
        store.mkdir()
        for number in range(times):
            for path in (CELLS / "images").iterdir():
                os.symlink(path, store / f"{number}-{path.name}")
    return store


def heads(root: Path, options: argparse.Namespace) -> None:
    """Compare `rescore` with `classify`: labels, scores, whole commands, and the steady rate."""
    from tlbatch import read_predictions

    print("| head | labels that differ | largest difference of a score | `classify`, s | `rescore`, s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for seed in range(3):
        bundle = head(root, seed)
        both = []
        for verb, source in (("classify", ["--images", CELLS]), ("rescore", ["--features", stored(root, "last")])):
            output = root / f"{verb}-{seed}"
            report = run(verb, *source, "--bundle", bundle, "--output", output)
            both.append((read_predictions(str(output)).set_index("key"), report["seconds"]))
        (first, slow), (second, fast) = both
        apart = np.abs(first["score"] - second["score"]).max()
        print(
            f"| {seed} | {(first['label'] != second['label']).sum()} of {len(first)} | {apart:.1e} | {slow:.1f} | {fast:.1f} |"
        )
    steady(root, options.times)


def steady(root: Path, times: int) -> None:
    """Print the images a second between a store and a larger one, so that start-up cancels out.

    `classify` reads real cells. `rescore` reads the features of the cells, repeated, from a run that is published like any
    other: extracting as many real features would take an hour.
    """
    seconds = [
        run(
            "classify", "--images", many_cells(root, count), "--bundle", head(root, 0), "--output", root / f"classified-{count}"
        )
        for count in (1, 1 + times)
    ]
    more = seconds[1]["listed"] - seconds[0]["listed"]
    slow = more / (seconds[1]["seconds"] - seconds[0]["seconds"])
    print(f"\n{more:,} more images: `classify` {slow:.0f} images/s", flush=True)
    took = []
    for rows in ROWS:
        features = root / f"stored-{rows}"
        store_features(root, features, rows)
        took.append(
            run("rescore", "--features", features, "--bundle", head(root, 1), "--output", root / f"again-{rows}")["seconds"]
        )
    fast = (ROWS[1] - ROWS[0]) / (took[1] - took[0])
    print(f"{ROWS[1] - ROWS[0]:,} more images: `rescore` {fast:,.0f} images/s ({took[0]:.1f} and {took[1]:.1f} s): ", end="")
    print(f"{fast / slow:.0f} times")


def store_features(root: Path, output: Path, rows: int) -> None:
    """Publish a run with `rows` images that do not exist and the features of the cells."""
    from tlbatch import schema
    from tlbatch.config import RunConfig
    from tlbatch.model.bundle import load_bundle
    from tlbatch.output.features import find_features, matrix
    from tlbatch.output.parts import stage_part

    values = matrix(next(find_features(str(stored(root, "last"))).runs[0].vectors())["features"])
    listed = root / f"list-{rows}.csv"
    listed.write_text("uri\n" + "".join(f"/nowhere/{row:09d}.png\n" for row in range(rows)))
    bundle = load_bundle(str(head(root, 0)))
    config = RunConfig(images=str(listed), bundle=bundle.location.url, output=str(output), features=True, predictions=False)
    wanted = schema.outcome_schema(classified=False, features_length=values.shape[1], features_dtype="float16")

    def stage(runs: Sequence[Run], left: pa.Table) -> None:
        for start in range(0, left.num_rows, len(values)):
            part = left.slice(start, len(values))
            count = part.num_rows
            vectors = pa.FixedSizeListArray.from_arrays(
                pa.array(values[:count].reshape(-1)), type=wanted.field("features").type
            )
            columns = {**{name: part[name] for name in ("row", "uri", "etag", "key")}, "features": vectors}
            columns |= {"index": [0] * count, schema.IMAGES: [1] * count}
            filled = {field.name: columns.get(field.name, pa.nulls(count, field.type)) for field in wanted}
            stage_part(runs[0].staged, pa.table(filled, schema=wanted))

    publish_generated(OutputTable.of(config, bundle), stage)


def together(root: Path, options: argparse.Namespace) -> None:
    """Measure the seconds of one bundle and of three in one pass, alternating."""
    store = many_cells(root, options.times)
    bundles = [word for seed in range(3) for word in ("--bundle", head(root, seed))]
    ratios = []
    for number in range(options.rounds):
        one = run("classify", "--images", store, *bundles[:2], "--output", root / f"one-{number}")["seconds"]
        began = time.monotonic()
        three = run("classify", "--images", store, *bundles, "--output", root / f"three-{number}")
        took = max(report["seconds"] for report in three["tables"].values())
        print(f"round {number + 1}: one {one:.1f} s, three {took:.1f} s ({time.monotonic() - began:.1f} s with start and end)")
        ratios.append(took / one)
    print(f"\n{three['listed']:,} images; three tables take {statistics.median(ratios):.2f} times as long as one (median)")


def honest(root: Path, options: argparse.Namespace) -> None:
    """Print the calibration error before and after, and the precision on the test part, to compare with the target.

    With few images even perfectly calibrated scores show an error. `honest scores` is this error, on labels drawn from the
    scores.
    """
    print("| seed | temperature | calibration error before | after | honest scores | precision at the threshold | answered |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    found = []
    for seed in range(options.seeds):
        bundle = root / f"honest-{seed}"
        words = ["--labels", root / "labels.csv", "--bundle", bundle, "--precision", 0.95, "--set", f"seed={seed}"]
        told = run("train", "--features", stored(root, "depths"), *words)["calibration"]
        error, test = told["calibration_error"], told["abstaining"]["test"]
        best = least_error(root, bundle)
        found.append((error["before"], error["after"], best, test["precision"], test["answered"] / test["images"]))
        numbers = (
            f"{told['temperature']:.3f} | {error['before']:.4f} | {error['after']:.4f} | {best:.4f} | {test['precision']:.1%}"
        )
        print(f"| {seed} | {numbers} | {test['answered']} of {test['images']} |")
    before, after, best, precision, answered = (statistics.mean(column) for column in zip(*found, strict=True))
    print(f"\nmeans: {before:.4f} before, {after:.4f} after, {best:.4f} of honest scores; ", end="")
    print(f"{precision:.1%} right of the {answered:.0%} that are answered")


def least_error(root: Path, bundle: Path) -> float:
    """The calibration error that a bundle's scores show on its test part if they are exact: the mean over drawn labels."""
    import pyarrow as pa

    from tlbatch.model.bundle import load_bundle
    from tlbatch.model.calibration import calibration_error
    from tlbatch.model.engines import load_head
    from tlbatch.output.features import find_features, look_up, matrix

    rows = csv.DictReader((bundle / "split.csv").read_text().splitlines())
    keys = pa.array([row["key"] for row in rows if row["split"] == "test"])
    features = look_up(find_features(str(stored(root, "depths"))), pa.array([], pa.string()), keys)["features"]
    values = matrix(features)
    scores = load_head(load_bundle(str(bundle))).predict(values)
    chance = np.random.default_rng(0)
    return statistics.mean(
        calibration_error(scores, (chance.random(len(scores)) < scores[:, 1]).astype(int)) for _ in range(200)
    )


def reviewed(root: Path, options: argparse.Namespace) -> None:
    """Print the accuracy on held-out cells after each round, reviewed and random, and draw both."""
    from tlbatch.execution.session import ray_session

    curves: dict[str, list[list[float]]] = {"reviewed": [], "random": []}
    stored(root, "depths")
    with ray_session() as start:
        start()
        for seed in range(options.seeds):
            for way, found in curves.items():
                found.append(curve(root, way, seed))
                print(f"{way}, seed {seed}: " + ", ".join(f"{value:.4f}" for value in found[-1]), file=sys.stderr, flush=True)
    print("| labelled cells | reviewed | random | mean difference, points (95 % interval) | reviewed is ahead |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for step in range(ROUNDS + 1):
        pairs = [(one[step], other[step]) for one, other in zip(curves["reviewed"], curves["random"], strict=True)]
        means = [statistics.mean(column) for column in zip(*pairs, strict=True)]
        apart = [100 * (one - other) for one, other in pairs]
        ahead = f"{sum(points > 0 for points in apart)} of {len(apart)}" if step else ""
        print(f"| {FIRST + step * ROUND} | {means[0]:.4f} | {means[1]:.4f} | {interval(apart) if step else '0'} | {ahead} |")
    draw(curves)


def interval(apart: Sequence[float]) -> str:
    """The mean of paired differences, and its 95 % interval by Student's t."""
    from scipy.stats import t

    mean, error = statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5
    low, high = t.interval(0.95, len(apart) - 1, mean, error)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def curve(root: Path, way: str, seed: int) -> list[float]:
    """The accuracy on the test part with the first labelled cells, and after each round."""
    import tlbatch

    truth = {row["key"]: row["label"] for row in csv.DictReader((root / "labels.csv").read_text().splitlines())}
    chance = random.Random(seed)
    keys = chance.sample(sorted(truth), len(truth))
    test, pool = keys[:525], keys[525:]
    labelled = pool[:FIRST]
    found = []
    for step in range(ROUNDS + 1):
        folder = root / f"{way}-{seed}-{step}"
        folder.mkdir()
        labels = folder / "labels.csv"
        with labels.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["key", "label", "split"])
            parts = ["validation" if number % 6 == 5 else "train" for number in range(len(labelled))]
            rows = [*zip(labelled, parts, strict=True), *((key, "test") for key in test)]
            writer.writerows((key, truth[key], part) for key, part in rows)
        features = str(stored(root, "depths"))
        settings = {"features": features, "labels": str(labels), "seed": seed}
        found.append(tlbatch.train(**settings, bundle=str(folder / "bundle"))["accuracy"])
        if step == ROUNDS:
            break
        if way == "random":
            labelled = pool[: len(labelled) + ROUND]
            continue
        tlbatch.rescore(features=features, bundle=str(folder / "bundle"), output=features)
        chosen = tlbatch.review(output=features, budget=ROUND, labels=str(labels), to=str(folder / "review"), seed=seed)
        labelled = labelled + [row["key"] for row in csv.DictReader(Path(chosen["labels"]).read_text().splitlines())]
    return found


def draw(curves: dict[str, list[list[float]]]) -> None:
    """Draw both curves into docs/review.svg: each seed thin, the mean thick."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tlbatch"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    counts = [FIRST + step * ROUND for step in range(ROUNDS + 1)]
    for (way, found), color in zip(curves.items(), ("#b8430f", "#3465a4"), strict=True):
        for one in found:
            axes.plot(counts, one, color=color, alpha=0.25, linewidth=1)
        axes.plot(counts, np.mean(found, axis=0), color=color, linewidth=2.5, marker="o", label=way)
    axes.set(xlabel="labelled cells", ylabel="accuracy on 525 held-out cells", xticks=counts)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "review.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
