"""Results of commands -> text on the terminal. Only this module, `progress.py` and the packages `cli` and `jobs` print."""

from __future__ import annotations

import csv
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tlbatch.report.held_out import check_in_words, held_out_in_words, learning_in_words, quantized_in_words
from tlbatch.schema import RUNS
from tlbatch.stdio import results_stream
from tlbatch.storage.local import LocalLocation

#: Kinds of skipped objects, and closed folders, that are printed.
_MOST_KINDS, _MOST_FOLDERS = 6, 10
#: Doubted labels that are printed.
_DOUBTED = 3
#: Classes whose recall is printed beside the balanced accuracy.
_RAREST_FOUND = 5
#: Up to this age an inventory's age is given in hours.
_HOURS_SHOWN = 72


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the caller decide; rich would end the process with 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _console(*, quiet: bool = False) -> Console:
    return _Console(file=results_stream(), highlight=False, markup=False, quiet=quiet)


def show_run(result: Mapping[str, Any]) -> None:
    """Print the counts of a run, its speed, and where its report is."""
    console = _console()
    if result.get("counts"):
        console.print(_states(result["counts"]), soft_wrap=True)
    if result.get("already_done"):
        why = (
            "the table is up to date" if result.get("counts") else f"run {result['run_id']} has processed exactly these images"
        )
        console.print(f"Nothing to do: {why}.", soft_wrap=True)
    console.print(f"{_counts(result)} ({result['skipped']:,} other objects skipped{_kinds(result)})", soft_wrap=True)
    for sentence in _sources(result):
        console.print(sentence, soft_wrap=True)
    for kind, count in result["failed_by_kind"].items():
        console.print(f"  {count:>9,} {kind}")
    for sentence in _findings(result):
        console.print(sentence, soft_wrap=True)
    stages = ", ".join(f"{stage} {seconds:,.1f}" for stage, seconds in result["stage_seconds"].items())
    console.print(
        f"{result['seconds']:,.1f} s, {result['images_per_second']:,.0f} images/s; worker seconds: {stages}", soft_wrap=True
    )
    if result.get("bottleneck"):
        console.print(_bottleneck_sentence(result["bottleneck"]), soft_wrap=True)
    if result.get("synced"):
        show_sync(result["synced"])
    console.print(result.get("report") or f"{result['output']}/runs/{result['run_id']}", soft_wrap=True)


def _findings(result: Mapping[str, Any]) -> Iterator[str]:
    """What was found in the images."""
    if result.get("table"):
        yield _table_failures(result)
    if result.get("unreadable"):
        yield f"Folders that cannot be opened: {', '.join(result['unreadable'][:_MOST_FOLDERS])}"
    if labels := ", ".join(f"{label} {count:,}" for label, count in result["labels"].items()):
        yield f"Labels: {labels}"
    if result.get("white_levels"):
        from tlbatch.report.verdict import white_levels_sentence

        yield f"{white_levels_sentence(result['white_levels'])}."


def _counts(result: Mapping[str, Any]) -> str:
    return f"{result['listed']:,} listed = {result['predicted']:,} predicted + {result['failed']:,} failed"


def _kinds(result: Mapping[str, Any], name: str = "skipped_by_kind") -> str:
    """The kinds of skipped objects, the most common first, behind a colon."""
    kinds = list(result.get(name, {}).items())
    shown = [f"{count:,} {kind}" for kind, count in kinds[:_MOST_KINDS]] + ["…"] * (len(kinds) > _MOST_KINDS)
    return f": {', '.join(shown)}" if shown else ""


def _sources(result: Mapping[str, Any]) -> Iterator[str]:
    """What was read in place of a listing, and what was skipped in shards."""
    if result.get("inventory"):
        yield f"{inventory_sentence(result['inventory'])}."
    if result.get("skipped_in_shards"):
        yield f"Skipped in shards{_kinds(result, 'skipped_in_shards')}"


def inventory_sentence(found: Mapping[str, Any], clock: Callable[[], float] = time.time) -> str:
    """What was read in place of a listing, and how old it is."""
    created = datetime.fromisoformat(found["created"])
    hours = (clock() - created.timestamp()) / 3600
    age = f"{hours:.0f} hours" if hours < _HOURS_SHOWN else f"{hours / 24:.0f} days"
    when = f"{created:%Y-%m-%d %H:%M} UTC ({age} old)"
    return f"The inventory of {found['of']} is of {when}, {found['objects']:,} objects"


def _table_failures(result: Mapping[str, Any]) -> str:
    table = result["table"]
    return (
        f"Of the failures, {result['failed_new']:,} are new; the whole table has {table['failed']:,} failed of "
        f"{table['listed']:,} images."
    )


def _states(counts: Mapping[str, int]) -> str:
    """The objects of a store by state, such as new, changed and deleted."""
    return "Store compared with the table: " + ", ".join(f"{count:,} {state}" for state, count in counts.items())


def _bottleneck_sentence(found: Mapping[str, Any]) -> str:
    stage, remedy = found["stage"], found["remedy"]
    if stage == "start":
        return f"Bottleneck: {remedy}."
    return f"Bottleneck: {stage}, busy {found['busy']:.0%} of the time. {remedy[:1].upper()}{remedy[1:]} would help."


def show_forecast(result: Mapping[str, Any]) -> None:
    """Print what a run would do, its estimated time and machine hours, and what the estimate is based on."""
    console = _console()
    console.print(_states(result["counts"]), soft_wrap=True)
    if result.get("inventory"):
        console.print(f"{inventory_sentence(result['inventory'])}.", soft_wrap=True)
    rescored = f", {result['rescored']:,} of them from stored features" if result["rescored"] else ""
    console.print(f"To do: {result['objects']:,} objects{rescored}; {result['bytes'] / 1e6:,.1f} MB to read", soft_wrap=True)
    hours = f"{result['cpu_hours']:,.2f} CPU hours" + (f", {result['gpu_hours']:,.2f} GPU hours" if result["gpu_hours"] else "")
    console.print(
        f"About {result['seconds']:,.0f} s and {hours}, at {result['images_per_second']:,.0f} images/s; "
        f"based on: {result['known_from']}",
        soft_wrap=True,
    )
    if result.get("advice"):
        console.print(result["advice"], soft_wrap=True)
    if result.get("refused"):
        console.print(f"The run would stop: {result['refused']}", soft_wrap=True)


def show_schedule(result: Mapping[str, Any]) -> None:
    """Print what to install."""
    print(result["install"], end="", file=results_stream())


def show_sql(result: Mapping[str, Any]) -> None:
    """Print the views of an output, or the answer to a query as CSV."""
    if "views" in result:
        print(result["views"], end="", file=results_stream())
        return
    names = [result["columns"]] if result["columns"] else []
    csv.writer(results_stream(), lineterminator="\n").writerows([*names, *result["rows"]])


def show_sync(result: Mapping[str, Any]) -> None:
    """Print what was written to the copy of a table."""
    what = {"all": "the whole table", "changes": "what has changed", "nothing": "nothing, it is up to date"}
    added = f", {result['added']:,} rows added" * (result["written"] != "nothing")
    _console().print(f"Written to {result['to']}: {what[result['written']]}{added}", soft_wrap=True)


def show_rollback(result: Mapping[str, Any]) -> None:
    """Print which runs form the table now, and which formed it before."""
    now, before = (", ".join(result[name]) for name in ("table", "before"))
    _console().print(f"Runs of the table: {now}; before: {before}", soft_wrap=True)


def show_job(result: Mapping[str, Any]) -> None:
    """Print the name of the job and, if it was followed, how it ended."""
    console = _console()
    if "status" in result:
        console.print(f"Job {result['job']}: {result['status'].lower()}, exit code {result['exit_code']}", soft_wrap=True)
    else:
        console.print(f"Job {result['job']} runs at {result['address']} and continues without this terminal", soft_wrap=True)


def _training_images(result: Mapping[str, Any]) -> str:
    images = result["images"]
    if result["head"] == "convex":
        return f"{images['train'] + images['validation']:,} images"
    return f"{images['train']:,} images for {result['epochs']} epochs, with early stopping on {images['validation']:,}"


def show_training(result: Mapping[str, Any]) -> None:
    """Print the accuracy of the trained head, and where the bundle is."""
    console = _console()
    images = result["images"]
    console.print(
        f"Trained on {_training_images(result)}; accuracy {result['accuracy']:.1%} on {images['test']:,} test images",
        soft_wrap=True,
    )
    console.print(held_out_in_words(result["held_out"], result["head"]), soft_wrap=True)
    _show_advice(console, result)
    _show_tried(console, result)
    if result["failed"]:
        console.print(f"{result['failed']:,} labelled images could not be read and were left out")
    if result["unlabelled"]:
        console.print(f"{result['unlabelled']:,} images have no label and were not used")
    if result["skipped_by_kind"]:
        console.print(f"Other objects skipped{_kinds(result)}", soft_wrap=True)
    error, abstaining = (result["calibration"].get(name) for name in ("calibration_error", "abstaining"))
    if error:
        console.print(f"Calibration error {error['before']:.3f}; after temperature scaling {error['after']:.3f}")
    if abstaining:
        test = abstaining["test"]
        console.print(
            f"Abstains below {test['threshold']:.3f}: {test['precision']:.1%} of {test['answered']:,} answers are correct, "
            f"{test['images'] - test['answered']:,} abstentions",
            soft_wrap=True,
        )
    show_metrics(result["metrics"])
    console.print(result["bundle"], soft_wrap=True)


def _show_tried(console: Console, result: Mapping[str, Any]) -> None:
    """Print what was measured of each base."""
    if not result["tried"]:
        return
    table = Table(title="Bases, * the chosen one; images/s without decoding", title_justify="left")
    for name in ("base", "pixels", "held-out accuracy", "calibration error", "images/s", "MB"):
        table.add_column(name, justify="left" if name == "base" else "right")
    for one in result["tried"]:
        error = one["calibration_error"]
        measured = [f"{one['accuracy']:.1%}", "" if error is None else f"{error:.3f}", f"{one['images_per_second']:,.0f}"]
        name = f"{one['base']} *" if one["chosen"] else one["base"]
        table.add_row(name, str(one["size"]), *measured, f"{one['megabytes']:,.0f}")
    console.print(table)
    if result["left_out"]:
        console.print(f"No time was left for {', '.join(result['left_out'])}", soft_wrap=True)


def _show_advice(console: Console, result: Mapping[str, Any]) -> None:
    """Print what int8 gives, what more labels would give, and which labels to look at."""
    if result["quantized"]:
        console.print(quantized_in_words(result["quantized"]), soft_wrap=True)
    if result["class_weight"] == "balanced":
        recall = sorted(result["held_out"]["recall"].items(), key=lambda item: item[1])[:_RAREST_FOUND]
        console.print(
            "Each class weighs the same in training (class_weight=balanced); in cross-validation the balanced accuracy is "
            f"{result['held_out']['balanced_accuracy']:.1%}, the lowest recalls: "
            + ", ".join(f"{label} {share:.1%}" for label, share in recall),
            soft_wrap=True,
        )
    if result["learning"]:
        console.print(learning_in_words(result["learning"]), soft_wrap=True)
    if result["doubted"]:
        named = [f"{one['key']} ({one['label']}, or {one['suggested']}?)" for one in result["doubted"]]
        console.print(f"Labels to look at first: {', '.join(named[:_DOUBTED])}; all are in the card", soft_wrap=True)


def show_comparison(result: Mapping[str, Any]) -> None:
    """Print agreement, drift, changed labels and the most changed images."""
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
    """Print how many images were chosen for which reason, and where to label them."""
    console = _console()
    console.print(f"{result['images']:,} images: " + ", ".join(f"{count:,} {why}" for why, count in result["why"].items()))
    if result["near_duplicates"] is None:
        console.print("Near-duplicates are not left out: the output has no features (`classify --features` writes them)")
    else:
        console.print(f"{result['near_duplicates']:,} near-duplicates left out")
    console.print(f"Label the images on {result['sheet']}, or fill in {result['labels']}", soft_wrap=True)


def show_import(result: Mapping[str, Any]) -> None:
    """Print the facts of an imported model, and where its bundle is."""
    console = _console()
    split = "base and head" if result["split"] else "not split, because the graph does not show where the head begins"
    size = result["size"] if isinstance(result["size"], int) else "x".join(map(str, result["size"]))
    console.print(
        f"{len(result['labels'])} classes at {size} pixels, {split}; scores off by at most {result['off']:.1g}",
        soft_wrap=True,
    )
    if result["precision"] != "float32":
        console.print(
            f"The model computes in {result['precision']}, tlbatch in float32; outputs differ by {result['off_float32']:.1g}",
            soft_wrap=True,
        )
    ways = ", ".join(f"{name}={result[name]}" for name in ("scale", "resize", "fit", "jpeg"))
    how = f"{ways} and background={result['background']}"
    console.print(f"Images are read with {how}. {check_in_words(result['check'], result['quantized'])}", soft_wrap=True)
    for one in result["check"]["different"] if result["check"] else ():
        console.print(f"  {one['key']}: {one['expected']} -> {one['found']}", soft_wrap=True)
    console.print(result["bundle"], soft_wrap=True)


def show_export(result: Mapping[str, Any]) -> None:
    """Print where the model is, its input and its output."""
    console = _console()
    console.print(f"{result['model']}: RGB pixels from 0 to 255 -> scores of {', '.join(result['labels'])}", soft_wrap=True)


def show_metrics(metrics: Mapping[str, Any]) -> None:
    """Print the accuracy, a row per class, and the confusion matrix."""
    _print_metrics(_console(), metrics)


def _print_metrics(console: Console, metrics: Mapping[str, Any]) -> None:
    from tlbatch.model.head import is_unbalanced

    told = [f"accuracy {metrics['accuracy']:.2%}"]
    if "balanced_accuracy" in metrics:
        told.append(f"balanced accuracy {metrics['balanced_accuracy']:.2%}")
    if is_unbalanced(one["images"] for one in metrics["by_class"].values()):
        told.reverse()
    console.print(f"{', '.join(told).capitalize()}, on {metrics['images']:,} images")
    for name in ("failed", "missing", "abstained"):
        if metrics.get(name):
            console.print(f"  {metrics[name]:,} {name}")
    table = _metrics_table(metrics, matrix=bool(metrics["confusion"]))
    if metrics["confusion"] and console.measure(table, options=console.options.update(width=10_000)).maximum > console.width:
        table = _metrics_table(metrics, matrix=False)
    console.print(table)


def _metrics_table(metrics: Mapping[str, Any], *, matrix: bool) -> Table:
    """A row per class. Numbers are never cut, and a long name goes on in the next line."""
    table = Table(title="Rows: true labels. Last columns: predicted labels." if matrix else None)
    table.add_column("class", overflow="fold")
    for name in ("precision", "recall", "F1", "images"):
        table.add_column(name, no_wrap=True, min_width=len(name))
    for label in metrics["labels"] if matrix else ():
        table.add_column(label, justify="right", no_wrap=True)
    for number, label in enumerate(metrics["labels"]):
        facts = metrics["by_class"][label]
        numbers = [f"{facts[name]:.3f}" for name in ("precision", "recall", "f1")]
        counts = metrics["confusion"][number] if matrix else ()
        table.add_row(label, *numbers, f"{facts['images']:,}", *(f"{count:,}" for count in counts))
    return table


def show_status(result: Mapping[str, Any]) -> None:
    """Print one line per run, and the active run."""
    console = _console()
    for line in status_lines(result):
        console.print(line, soft_wrap=True)


def status_lines(result: Mapping[str, Any]) -> list[str]:
    """The lines of `show_status`. The active run, if there is one, is the last line."""
    found = []
    for run in result["runs"]:
        counts = f"{run['listed']:,} listed, {run['predicted']:,} predicted, {run['failed']:,} failed, {run['left']:,} left"
        rate = (run.get("progress") or {}).get("images_per_second")
        found.append(f"{run['run_id']}  {run['state']}: {counts}" + (f", {rate:,.0f} images/s" if rate else ""))
    lease = result["lease"]
    if lease:
        found.append(f"Active: run {lease['run_id']} on {lease['host']}, process {lease['pid']}, since {lease['since']}")
    return found


def show_report(result: Mapping[str, Any]) -> None:
    """Print the verdict, and where the page is."""
    console = _console()
    console.print(result["sentence"], soft_wrap=True)
    console.print(result["report"], soft_wrap=True)


def show_leftovers(result: Mapping[str, Any]) -> None:
    """Print what can be removed, the largest first, and whether it was removed."""
    console = _console()
    for one in sorted(result["leftovers"], key=lambda one: -one["bytes"]):
        size = f"{one['objects']:>7,} objects {one['bytes'] / 1e6:>10,.1f} MB {one['hours']:>8,.1f} h"
        console.print(f"{size}  {one['path']}: {one['why']}", soft_wrap=True)
    if not result["leftovers"]:
        console.print("Nothing to remove.")
    elif result["removed"]:
        console.print(f"Removed {result['bytes'] / 1e6:,.1f} MB.")
    else:
        console.print(f"{result['bytes'] / 1e6:,.1f} MB in total. Nothing was removed; add --remove to delete them.")


def show_verification(result: Mapping[str, Any]) -> None:
    """Print that the counts and digests match, or the first differences."""
    console = _console()
    if result["ok"]:
        console.print(f"Verified: {_counts(result)}; all digests match ({result['runs']} runs)", soft_wrap=True)
        return
    console.print(f"{result['differences_in_all']} differences:")
    for difference in result["differences"]:
        console.print(f"  {difference}", soft_wrap=True)


class DemoStory:
    """The text that `tlbatch demo` prints, one method per step.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._console = _console(quiet=quiet)

    def _step(self, title: str, rest: str) -> None:
        self._console.print(Text.assemble((title, "bold"), rest), soft_wrap=True)

    def images(self, counts: Mapping[str, int]) -> None:
        """Step 1: the number of images per label."""
        labels = ", ".join(f"{count:,} {label}" for label, count in counts.items())
        self._step("1. Images", f": {sum(counts.values()):,} photographs of solar cells under electroluminescence")
        self._console.print(f"   {labels}")

    def training(self, base: str, size: int) -> None:
        """Step 2: what is trained."""
        self._step("2. Training", f" a head on {base} at {size} pixels; the base is frozen")

    def trained(self, result: Mapping[str, Any]) -> None:
        """The sizes of the parts, the time of training, and the accuracy in cross-validation."""
        images = result["images"]
        self._console.print(
            f"   {images['train'] + images['validation']:,} cells for training, {images['test']:,} for testing; "
            f"{result['seconds']:.0f} s",
            soft_wrap=True,
        )
        self._console.print(f"   {held_out_in_words(result['held_out'], result['head'])}", soft_wrap=True)

    def classifying(self) -> None:
        """Step 3: what is classified."""
        self._step("3. Classifying", " every cell through Ray Data")

    def classified(self, run: Mapping[str, Any]) -> None:
        """The counts and the speed of the run, whose output was verified."""
        self._console.print(f"   {_counts(run)}; all digests match", soft_wrap=True)
        self._console.print(f"   {run['images_per_second']:,.0f} images/s from start to finish")

    def accuracy(self, metrics: Mapping[str, Any], held_out: Mapping[str, Any], published: Mapping[str, float]) -> None:
        """Step 4: the accuracy on the test part, and published accuracies by method, which are of other splits."""
        self._step("4. Accuracy", f" on the {metrics['images']:,} test cells, which were not used in training")
        _print_metrics(self._console, metrics)
        table = Table("accuracy (published figures are of other cells)", "")
        low, high = held_out["interval"]
        table.add_row("this demo, a head on frozen features, this CPU", f"{metrics['accuracy']:.2%}", style="bold")
        table.add_row("the same in cross-validation", f"{held_out['accuracy']:.2%} ({low:.1%} to {high:.1%})")
        for name, accuracy in published.items():
            table.add_row(f"{name} (Deitsch et al. 2019)", f"{accuracy:.2%}")
        self._console.print(table)

    def files(self, output: LocalLocation, run_id: str) -> None:
        """The files of the output, as a tree."""
        tree = Tree(output.url)
        for name in output.names():
            branch = tree.add(name)
            if name == RUNS:
                _add_files(branch.add(run_id), output.join(RUNS, run_id))
        self._console.print(tree)

    def least_certain(self, rows: Sequence[tuple[str, str, float]]) -> None:
        """The images with the lowest scores, as key, label and score."""
        self._console.print(f"The {len(rows)} cells with the lowest scores:")
        for key, label, score in rows:
            self._console.print(f"  {key}  {label} {score:.3f}", soft_wrap=True)

    def end(self, report: str, bundle: str, seconds: float) -> None:
        """Step 5: where the report is, and the command for the user's own images."""
        self._step("5. Report", f": {report}")
        self._console.print(f"Done in {seconds:.0f} s. To classify your own images, run:")
        self._console.print(f"  {sys.argv[0]} classify --images YOUR_FOLDER \\", soft_wrap=True, style="bold")
        self._console.print(f"      --bundle {bundle} \\", soft_wrap=True, style="bold")
        self._console.print("      --output predictions", soft_wrap=True, style="bold")


def _add_files(branch: Tree, location: LocalLocation) -> None:
    for name in location.names():
        child = location.join(name)
        leaf = branch.add(f"{name}  {child.path.stat().st_size:,} bytes" if child.path.is_file() else name)
        if child.path.is_dir():
            _add_files(leaf, child)
