"""Results -> what a person reads in a terminal. Only this, `progress.py`, `cli.py` and `demo.py` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tlbatch.stdio import results_stream


def _console() -> Console:
    return Console(file=results_stream(), highlight=False, markup=False)


def show_run(result: Mapping[str, Any]) -> None:
    """The books of a run, and where its table is."""
    console = _console()
    if result.get("counts"):
        console.print("The store: " + _counted(result["counts"]), soft_wrap=True)
    if result.get("already_done"):
        what = "the table has all that the store has" if result.get("counts") else "has classified exactly these images"
        console.print(f"Nothing to do: {'' if result.get('counts') else 'run ' + result['run_id'] + ' '}{what}.")
    books = f"{result['listed']:,} listed = {result['predicted']:,} predicted + {result['failed']:,} failed"
    console.print(f"{books} ({result['skipped']:,} other objects passed over)", soft_wrap=True)
    for kind, count in result["failed_by_kind"].items():
        console.print(f"  {count:>9,} {kind}")
    if result["labels"]:
        console.print(
            "Labels: " + ", ".join(f"{label} {count:,}" for label, count in result["labels"].items()),
            soft_wrap=True,
        )
    stages = ", ".join(f"{stage} {seconds:,.1f}" for stage, seconds in result["stage_seconds"].items())
    console.print(
        f"{result['seconds']:,.1f} s, {result['images_per_second']:,.0f} images/s; worker seconds: {stages}", soft_wrap=True
    )
    found = result.get("bottleneck")
    if found:
        console.print(f"Bottleneck: {found['stage']}, busy {found['busy']:.0%} of the time: {found['remedy']}", soft_wrap=True)
    console.print(result.get("report") or f"{result['output']}/runs/{result['run_id']}", soft_wrap=True)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def show_forecast(result: Mapping[str, Any]) -> None:
    """What is to be done, what it would take, and how one knows."""
    console = _console()
    console.print("The store: " + _counted(result["counts"]), soft_wrap=True)
    rescored = f", {result['rescored']:,} of them from stored features" if result["rescored"] else ""
    console.print(f"To do: {result['objects']:,} objects{rescored}; {result['bytes'] / 1e6:,.1f} MB to read", soft_wrap=True)
    hours = f"{result['cpu_hours']:,.2f} CPU hours" + (f", {result['gpu_hours']:,.2f} GPU hours" if result["gpu_hours"] else "")
    console.print(
        f"About {result['seconds']:,.0f} s and {hours}, at {result['images_per_second']:,.0f} images/s; "
        f"known from {result['known_from']}",
        soft_wrap=True,
    )


def show_rollback(result: Mapping[str, Any]) -> None:
    """Which runs make up the table now, and which did."""
    console = _console()
    console.print(
        f"The table is that of {', '.join(result['table'])}; it was that of {', '.join(result['before'])}", soft_wrap=True
    )


def show_job(result: Mapping[str, Any]) -> None:
    """The job's name, and how it ended if that is known."""
    console = _console()
    if "status" in result:
        console.print(f"Job {result['job']}: {result['status'].lower()}, exit code {result['exit_code']}", soft_wrap=True)
    else:
        console.print(f"Job {result['job']} runs at {result['address']}; it goes on without this terminal", soft_wrap=True)


def show_training(result: Mapping[str, Any]) -> None:
    """How well the trained head did, and where the bundle is."""
    console = _console()
    images = result["images"]
    console.print(
        f"Trained on {images['train']:,} images, {result['epochs']} epochs chosen on {images['validation']:,}, "
        f"measured on {images['test']:,}: accuracy {result['accuracy']:.1%}",
        soft_wrap=True,
    )
    if result["failed"]:
        console.print(f"{result['failed']:,} labelled images could not be read and were left out")
    error, abstaining = (result["calibration"].get(name) for name in ("calibration_error", "abstaining"))
    if error:
        console.print(f"Calibration error {error['before']:.3f}, after scaling {error['after']:.3f}")
    if abstaining:
        test = abstaining["test"]
        console.print(
            f"Abstains below {test['threshold']:.3f}: {test['precision']:.1%} of {test['answered']:,} answers right, "
            f"{test['images'] - test['answered']:,} abstentions",
            soft_wrap=True,
        )
    show_metrics(result["metrics"])
    console.print(result["bundle"], soft_wrap=True)


def show_comparison(result: Mapping[str, Any]) -> None:
    """Agreement, drift, what moved and the most changed images."""
    console = _console()
    console.print(
        f"{result['images']:,} images in both, {result['only_a']:,} only in the first, "
        f"{result['only_b']:,} only in the second; {result['agreement']:.2%} have the same label",
        soft_wrap=True,
    )
    indices = ", ".join(f"{name.removeprefix('psi_')} {value:.4f}" for name, value in result.items() if name.startswith("psi_"))
    console.print(f"Population stability index: {indices}", soft_wrap=True)
    for one in result["moved"]:
        console.print(f"  {one['images']:>9,} {one['from']} -> {one['to']}", soft_wrap=True)
    for one in result["most_changed"]:
        console.print(f"  {one['key']}: {one['from']} {one['score_a']:.3f} -> {one['to']} {one['score_b']:.3f}", soft_wrap=True)


def show_review(result: Mapping[str, Any]) -> None:
    """How many images were chosen for what, and where to look at them."""
    console = _console()
    console.print(f"{result['images']:,} images: " + ", ".join(f"{count:,} {why}" for why, count in result["why"].items()))
    if result["near_duplicates"] is None:
        console.print("Near-duplicates cannot be told: the output has no features (`classify --features` writes them)")
    else:
        console.print(f"{result['near_duplicates']:,} near-duplicates left out")
    console.print(f"Look at {result['sheet']} and save what you see, or fill in {result['labels']}", soft_wrap=True)


def show_import(result: Mapping[str, Any]) -> None:
    """What was made of a model."""
    console = _console()
    split = "base and head" if result["split"] else "one piece: its graph does not show where a head begins"
    console.print(
        f"{len(result['labels'])} classes at {result['size']} pixels, {split}; scores off by at most {result['off']:.1g}",
        soft_wrap=True,
    )
    console.print(result["bundle"], soft_wrap=True)


def show_export(result: Mapping[str, Any]) -> None:
    """Where the model is."""
    console = _console()
    console.print(f"{result['model']}: uint8 RGB pixels -> scores of {', '.join(result['labels'])}", soft_wrap=True)


def show_metrics(metrics: Mapping[str, Any]) -> None:
    """Accuracy, each class, and the confusion matrix."""
    console = _console()
    console.print(f"Accuracy {metrics['accuracy']:.2%} on {metrics['images']:,} images")
    for name in ("failed", "missing", "abstained"):
        if metrics.get(name):
            console.print(f"  {metrics[name]:,} {name}")
    title = "Rows are the truth, the last columns what the model said" if metrics["confusion"] else None
    table = Table("class", "precision", "recall", "F1", "images", title=title)
    for label in metrics["labels"] if metrics["confusion"] else ():
        table.add_column(label, justify="right")
    for number, label in enumerate(metrics["labels"]):
        facts = metrics["by_class"][label]
        numbers = [f"{facts[name]:.3f}" for name in ("precision", "recall", "f1")]
        counts = metrics["confusion"][number] if metrics["confusion"] else ()
        table.add_row(label, *numbers, f"{facts['images']:,}", *(f"{count:,}" for count in counts))
    console.print(table)


def show_status(result: Mapping[str, Any]) -> None:
    """One line a run, and who is at work."""
    console = _console()
    for line in status_lines(result):
        console.print(line, soft_wrap=True)


def status_lines(result: Mapping[str, Any]) -> list[str]:
    """What `show_status` says; who is at work stands last."""
    found = []
    for run in result["runs"]:
        counts = f"{run['listed']:,} listed, {run['predicted']:,} predicted, {run['failed']:,} failed, {run['left']:,} left"
        rate = (run.get("progress") or {}).get("images_per_second")
        found.append(f"{run['run_id']}  {run['state']}: {counts}" + (f", {rate:,.0f} images/s" if rate else ""))
    lease = result["lease"]
    if lease:
        found.append(f"At work: run {lease['run_id']} on {lease['host']}, process {lease['pid']}, since {lease['since']}")
    return found


def show_report(result: Mapping[str, Any]) -> None:
    """The verdict, and where the page is."""
    console = _console()
    console.print(result["sentence"], soft_wrap=True)
    console.print(result["report"], soft_wrap=True)


def show_leftovers(result: Mapping[str, Any]) -> None:
    """What nobody needs, the most first, and what to do about it."""
    console = _console()
    for one in sorted(result["leftovers"], key=lambda one: -one["bytes"]):
        size = f"{one['objects']:>7,} objects {one['bytes'] / 1e6:>10,.1f} MB {one['hours']:>8,.1f} h"
        console.print(f"{size}  {one['path']}: {one['why']}", soft_wrap=True)
    if not result["leftovers"]:
        console.print("Nothing to remove.")
    elif result["removed"]:
        console.print(f"Removed {result['bytes'] / 1e6:,.1f} MB.")
    else:
        console.print(f"{result['bytes'] / 1e6:,.1f} MB in all. Nothing was removed: say --remove for that.")


def show_verification(result: Mapping[str, Any]) -> None:
    """Whether the books balance, or the first differences."""
    console = _console()
    if result["ok"]:
        books = f"{result['listed']:,} listed = {result['predicted']:,} predicted + {result['failed']:,} failed"
        console.print(f"Verified: {books}; every digest is the recorded one ({result['runs']} runs)", soft_wrap=True)
        return
    console.print(f"{result['differences_in_all']} differences:")
    for difference in result["differences"]:
        console.print(f"  {difference}", soft_wrap=True)
