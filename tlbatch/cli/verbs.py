"""The table of verbs: for each its configuration, the call that does the work, and what prints the result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from tlbatch import config as configs
from tlbatch import signals
from tlbatch.errors import InterruptedRunError, UnfinishedError
from tlbatch.stdio import results_stream

EXIT_DIFFERENT, EXIT_TOO_MANY_FAILED = 1, 3
INTERRUPTED = "interrupted; run the same command again."


class Call(NamedTuple):
    """How a command was called: with --json, with which words behind its own flags, and what reads these as a command."""

    as_json: bool
    words: Sequence[str]
    read: Callable[[Sequence[str]], tuple[str, BaseModel]]


Run = Callable[[Any, Call], Mapping[str, Any]]


class Verb(NamedTuple):
    """One row of the table of verbs.

    Attributes:
        group: its panel in `tlbatch --help`.
        config: its configuration; every field is a flag.
        summary: its help.
        run: the call that does the work; imports what it needs.
        show: the function of `report.console` that prints the result; None if the call prints it.
        positional: fields given without a flag.
        repeatable: fields of one value that may be given several times.
        verbose: whether it takes --verbose.
        takes: what follows its own flags: another command, or one that can be a job.
    """

    group: str
    config: type[BaseModel]
    summary: str
    run: Run
    show: str | None
    positional: Sequence[str] = ()
    repeatable: Sequence[str] = ()
    verbose: bool = False
    takes: Literal["nothing", "command", "job"] = "nothing"


def call_of(target: str) -> Callable[..., Any]:
    """A function by its full name, imported when it is called."""
    module, _, name = target.rpartition(".")

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(import_module(module), name)(*arguments, **options)

    return call


def _plainly(target: str) -> Run:
    """A verb whose function takes the configuration."""
    return lambda settings, _: call_of(target)(settings)


def _by_fields(target: str, *names: str) -> Run:
    """A verb whose function takes some fields by position, the others by name."""

    def run(settings: BaseModel, _: Call) -> Mapping[str, Any]:
        options = {name: getattr(settings, name) for name in type(settings).model_fields if name not in names}
        result: Mapping[str, Any] = call_of(target)(*(getattr(settings, name) for name in names), **options)
        return result

    return run


def _watched(target: str, stage: str) -> Run:
    """A verb whose function also takes a watcher; `stage` names its longest stage."""

    def run(settings: Any, call: Call) -> Mapping[str, Any]:
        from tlbatch.report.progress import watching

        with watching(stage, call.as_json) as watch:
            result: Mapping[str, Any] = call_of(target)(settings, watch)
        return result

    return run


@dataclass(frozen=True)
class Published:
    """A verb that publishes a run or a bundle: a run's page is written, MLflow is told, and `notify` gets the command's end."""

    target: str
    stage: str
    work: str
    place: str = "output"

    def __call__(self, settings: Any, call: Call) -> Mapping[str, Any]:
        """Carry the verb out."""
        from tlbatch.cli.notify import notifying
        from tlbatch.cli.tracking import tracking

        where = getattr(settings, self.place)
        track = tracking(settings, self.target.rpartition(".")[2])
        with notifying(settings.notify, self.work, where) as tell, interrupts_as_sentences():
            result = _watched(self.target, self.stage)(settings, call)
            if getattr(settings, "report", False):
                from tlbatch.report.run_report import write_report_after  # charts take half a second to import

                result = write_report_after(result, settings.storage_options)
            track(result)
            if getattr(settings, "sync", None):
                result = call_of("tlbatch.commands.sync.sync_after")(result, settings)
            tell(result, exit_code(settings, result))
        return result


def exit_code(settings: Any, result: Mapping[str, Any]) -> int:
    """3 if more images failed than the configuration allows, and 1 if `verify` found differences."""
    if too_many_failed(settings, result):
        return EXIT_TOO_MANY_FAILED
    if result.get("ok") is False:
        return EXIT_DIFFERENT
    return int(result.get("exit_code") or 0)


def too_many_failed(settings: Any, result: Mapping[str, Any]) -> str | None:
    """The sentence about too many failed images, if the configuration limits them and there are too many."""
    most = getattr(settings, "max_failed_ratio", None)
    if most is None or "failed" not in result:
        return None
    sentence: str | None = call_of("tlbatch.output.standing.too_many_failed")(result, most)
    return sentence


def _status(settings: configs.StatusConfig, _: Call) -> Mapping[str, Any]:
    from tlbatch.output.status import status
    from tlbatch.report.progress import follow

    read = partial(status, settings.output, settings.storage_options)
    return follow(read) if settings.watch else read()


def _rollback(settings: configs.RollbackConfig, _: Call) -> Mapping[str, Any]:
    from tlbatch.output.rollback import roll_back
    from tlbatch.storage.resolve import resolve

    return roll_back(resolve(settings.output, settings.storage_options), settings.to)


def _submit(settings: configs.SubmitConfig, call: Call) -> Mapping[str, Any]:
    from tlbatch.commands.submit import submit

    verb, inner = call.read(call.words)
    passed = [word for word in call.words if word in ("--json", "--verbose")]
    stream = sys.stderr if call.as_json else results_stream()

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # the job goes on where nobody reads its log
            print(text, end="", flush=True, file=stream)

    return submit(settings, verb, inner, passed, say)


def _schedule(settings: configs.ScheduleConfig, call: Call) -> Mapping[str, Any]:
    from tlbatch.commands.schedule import schedule

    verb, inner = call.read(call.words)
    return {"target": settings.target, "install": schedule(settings, call.words, verb, inner)}


def _demo(settings: configs.DemoConfig, call: Call) -> Mapping[str, Any]:
    return dict(call_of("tlbatch.commands.demo.demo")(settings, quiet=call.as_json))


@contextlib.contextmanager
def interrupts_as_sentences() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C, and what a library makes of them, into the error that says how to continue."""
    try:
        signals.ready()
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(INTERRUPTED) from None
    except UnfinishedError:
        raise
    except Exception:
        if signals.came():
            raise InterruptedRunError(INTERRUPTED) from None
        raise


TRAIN, RUN, LOOK, KEEP = "Train", "Run", "Look", "Keep house"

VERBS: Mapping[str, Verb] = {
    "train": Verb(
        TRAIN,
        configs.TrainConfig,
        "Train a head on a frozen, pretrained base, and save both as a bundle.",
        Published("tlbatch.commands.train.train", "extracting", "training", "bundle"),
        "show_training",
        verbose=True,
    ),
    "import": Verb(
        TRAIN,
        configs.ImportConfig,
        "Make a bundle from a Keras classifier that was trained elsewhere.",
        _plainly("tlbatch.commands.import_export.import_model"),
        "show_import",
        ("model",),
    ),
    "export": Verb(
        TRAIN,
        configs.ExportConfig,
        "Write a bundle's model as a plain Keras model, from pixels to scores.",
        _plainly("tlbatch.commands.import_export.export_model"),
        "show_export",
    ),
    "review": Verb(
        TRAIN,
        configs.ReviewConfig,
        "Choose the images that a person should label; write a labelling page and a labels file.",
        _plainly("tlbatch.commands.review.review"),
        "show_review",
        ("output",),
    ),
    "classify": Verb(
        RUN,
        configs.RunConfig,
        "Classify every image of a store and publish the table.",
        Published("tlbatch.commands.classify.classify", "classifying", "classifying"),
        "show_run",
        repeatable=("bundle",),
        verbose=True,
    ),
    "extract": Verb(
        RUN,
        configs.ExtractConfig,
        "Write the features of every image of a store, of a bundle's base or of a named base.",
        Published("tlbatch.commands.extract.extract", "extracting", "extracting"),
        "show_run",
        verbose=True,
    ),
    "rescore": Verb(
        RUN,
        configs.RescoreConfig,
        "Give stored features the predictions of another head; no image is read.",
        Published("tlbatch.commands.rescore.rescore", "rescoring", "rescoring"),
        "show_run",
        verbose=True,
    ),
    "plan": Verb(
        RUN,
        configs.RunConfig,
        "Estimate what classify with these flags would do, and what it would cost; takes all of classify's flags.",
        _watched("tlbatch.commands.plan.plan", "listing"),
        "show_forecast",
        repeatable=("bundle",),
        verbose=True,
    ),
    "submit": Verb(
        RUN,
        configs.SubmitConfig,
        "Run a command as a job on a Ray cluster: tlbatch submit --address http://HEAD:8265 classify ...",
        _submit,
        "show_job",
        takes="job",
    ),
    "schedule": Verb(
        RUN,
        configs.ScheduleConfig,
        'Print what runs a command every night: tlbatch schedule --target cron --at "0 2 * * *" classify ...',
        _schedule,
        "show_schedule",
        takes="command",
    ),
    "demo": Verb(RUN, configs.DemoConfig, "Train, classify and verify on photographs of solar cells, here.", _demo, None),
    "status": Verb(
        LOOK,
        configs.StatusConfig,
        "Show the runs of an output and their progress, from the folder alone.",
        _status,
        "show_status",
        ("output",),
    ),
    "report": Verb(
        LOOK,
        configs.ReportConfig,
        "Write report.html: whether to trust a run, and the pictures that matter.",
        _plainly("tlbatch.report.run_report.write_report"),
        "show_report",
        ("output",),
    ),
    "browse": Verb(
        LOOK,
        configs.BrowseConfig,
        "Show the images of a table in a browser on this machine, and take corrections of their labels.",
        _plainly("tlbatch.web.serve.browse"),
        None,
        ("output",),
    ),
    "evaluate": Verb(
        LOOK,
        configs.EvaluateConfig,
        "Measure the accuracy of a published table on labelled images.",
        _by_fields("tlbatch.report.evaluate.evaluate", "output", "labels"),
        "show_metrics",
        verbose=True,
    ),
    "compare": Verb(
        LOOK,
        configs.CompareConfig,
        "Compare two runs: agreement, changed labels, and drift.",
        _by_fields("tlbatch.report.compare.compare", "run_a", "run_b"),
        "show_comparison",
        ("run_a", "run_b"),
    ),
    "sql": Verb(
        LOOK,
        configs.SqlConfig,
        "Print the views of a table for DuckDB, or the answer to a query of them as CSV.",
        _plainly("tlbatch.commands.sql.sql"),
        "show_sql",
        ("output",),
    ),
    "sync": Verb(
        KEEP,
        configs.SyncConfig,
        "Bring a Delta or Iceberg table to the published predictions; only what has changed is written.",
        _plainly("tlbatch.commands.sync.sync"),
        "show_sync",
        ("output",),
    ),
    "verify": Verb(
        KEEP,
        configs.FolderConfig,
        "Recompute the counts and digests of an output; exit 1 with the first differences.",
        _by_fields("tlbatch.output.verify.verify", "output"),
        "show_verification",
        ("output",),
    ),
    "gc": Verb(
        KEEP,
        configs.CleanupConfig,
        "Show, or remove, files of an output that no run and no reader needs.",
        _by_fields("tlbatch.output.gc.gc", "output"),
        "show_leftovers",
        ("output",),
    ),
    "compact": Verb(
        KEEP,
        configs.CompactConfig,
        "Fold the runs of a table into one run; the table stays the same.",
        _plainly("tlbatch.commands.compact.compact"),
        "show_run",
        ("output",),
    ),
    "rollback": Verb(
        KEEP,
        configs.RollbackConfig,
        "Make the table what it was after an earlier run; nothing is processed again.",
        _rollback,
        "show_rollback",
        ("output",),
    ),
}
