"""The command line: a table of verbs, each flags -> a configuration -> one call -> an exit code. No work is done here.

Results go to stdout, the rest to stderr. Exit codes: 0 done; 1 error, nothing published; 2 usage; 3 published with too many
failed images; 4 stopped early, run the same command again.
"""

from __future__ import annotations

import atexit
import contextlib
import gc as collector
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import typer
from pydantic import BaseModel

from tlbatch import config as configs
from tlbatch import signals
from tlbatch.cli.options import parameters_of
from tlbatch.errors import ConfigError, InterruptedRunError, TlbatchError, UnfinishedError
from tlbatch.stdio import open_closed_streams, reserve_stdout, results_stream, separate_python_stderr

EXIT_DIFFERENT, EXIT_TOO_MANY_FAILED = 1, 3
_INTERRUPTED = "interrupted; run the same command again."
#: A result with one of these keys says what was written or started elsewhere.
_WRITTEN = frozenset({"run_id", "bundle", "model", "job", "sheet", "report"})

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Classify millions of stored images with a transfer-learned Keras model on Ray, and account for every image.",
)


class Call(NamedTuple):
    """How a command was called: with --json, and with which words behind its own flags."""

    as_json: bool
    words: Sequence[str] = ()


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
        takes_command: whether another command follows its own flags.
    """

    group: str
    config: type[BaseModel]
    summary: str
    run: Run
    show: str | None
    positional: Sequence[str] = ()
    repeatable: Sequence[str] = ()
    verbose: bool = False
    takes_command: bool = False


def _call(target: str) -> Callable[..., Any]:
    """A function by its full name, imported when it is called."""
    module, _, name = target.rpartition(".")

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(import_module(module), name)(*arguments, **options)

    return call


def _plainly(target: str) -> Run:
    """A verb whose function takes the configuration."""
    return lambda settings, _: _call(target)(settings)


def _by_fields(target: str, *names: str) -> Run:
    """A verb whose function takes some fields by position, the others by name."""

    def run(settings: BaseModel, _: Call) -> Mapping[str, Any]:
        options = {name: getattr(settings, name) for name in type(settings).model_fields if name not in names}
        result: Mapping[str, Any] = _call(target)(*(getattr(settings, name) for name in names), **options)
        return result

    return run


def _watched(target: str, stage: str) -> Run:
    """A verb whose function also takes a watcher; `stage` names its longest stage."""

    def run(settings: Any, call: Call) -> Mapping[str, Any]:
        from tlbatch.report.progress import watching

        with watching(stage, call.as_json) as watch:
            result: Mapping[str, Any] = _call(target)(settings, watch)
        return result

    return run


@dataclass(frozen=True)
class _Published:
    """A verb that publishes a run or a bundle: a run's page is written, and the command's end is posted to `notify`."""

    target: str
    stage: str
    work: str
    place: str = "output"

    def __call__(self, settings: Any, call: Call) -> Mapping[str, Any]:
        from tlbatch.cli.notify import notifying

        where = getattr(settings, self.place)
        with notifying(settings.notify, self.work, where) as tell, _interrupts_as_sentences():
            result = _watched(self.target, self.stage)(settings, call)
            if getattr(settings, "report", False):
                from tlbatch.report.run_report import write_report_after  # charts take half a second to import

                result = write_report_after(result, settings.storage_options)
            tell(result, _exit_code(settings, result))
        return result


def _exit_code(settings: Any, result: Mapping[str, Any]) -> int:
    """3 if more images failed than the configuration allows, and 1 if `verify` found differences."""
    if _too_many_failed(settings, result):
        return EXIT_TOO_MANY_FAILED
    if result.get("ok") is False:
        return EXIT_DIFFERENT
    return int(result.get("exit_code") or 0)


def _too_many_failed(settings: Any, result: Mapping[str, Any]) -> str | None:
    """The sentence about too many failed images, if the configuration limits them and there are too many."""
    most = getattr(settings, "max_failed_ratio", None)
    if most is None or "failed" not in result:
        return None
    sentence: str | None = _call("tlbatch.output.standing.too_many_failed")(result, most)
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

    verb, inner = read_job(call.words)
    passed = [word for word in call.words if word in ("--json", "--verbose")]
    stream = sys.stderr if call.as_json else results_stream()

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # the job goes on where nobody reads its log
            print(text, end="", flush=True, file=stream)

    return submit(settings, verb, inner, passed, say)


def _schedule(settings: configs.ScheduleConfig, call: Call) -> Mapping[str, Any]:
    from tlbatch.commands.schedule import schedule

    verb, inner = read_command(call.words)
    return {"target": settings.target, "install": schedule(settings, call.words, verb, inner)}


def _demo(settings: configs.DemoConfig, call: Call) -> Mapping[str, Any]:
    return dict(_call("tlbatch.commands.demo.demo")(settings, quiet=call.as_json))


TRAIN, RUN, LOOK, KEEP = "Train", "Run", "Look", "Keep house"

VERBS: Mapping[str, Verb] = {
    "train": Verb(
        TRAIN,
        configs.TrainConfig,
        "Train a head on a frozen, pretrained base, and save both as a bundle.",
        _Published("tlbatch.commands.train.train", "extracting", "training", "bundle"),
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
        _Published("tlbatch.commands.classify.classify", "classifying", "classifying"),
        "show_run",
        repeatable=("bundle",),
        verbose=True,
    ),
    "extract": Verb(
        RUN,
        configs.ExtractConfig,
        "Write the features of every image of a store, of a bundle's base or of a named base.",
        _Published("tlbatch.commands.extract.extract", "extracting", "extracting"),
        "show_run",
        verbose=True,
    ),
    "rescore": Verb(
        RUN,
        configs.RescoreConfig,
        "Give stored features the predictions of another head; no image is read.",
        _Published("tlbatch.commands.rescore.rescore", "rescoring", "rescoring"),
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
        takes_command=True,
    ),
    "schedule": Verb(
        RUN,
        configs.ScheduleConfig,
        'Print what runs a command every night: tlbatch schedule --target cron --at "0 2 * * *" classify ...',
        _schedule,
        "show_schedule",
        takes_command=True,
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

#: Settings of a verb that takes another command behind its own flags.
_COMMAND_FOLLOWS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def _register(name: str, verb: Verb) -> None:
    """Add a verb to the command line."""

    def command(context: typer.Context, **given: Any) -> None:
        _carry_out(verb, given, context.args)

    own = parameters_of(verb.config, verb.positional, repeatable=verb.repeatable, verbose=verb.verbose)
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *own]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    settings = _COMMAND_FOLLOWS if verb.takes_command else None
    app.command(name, help=verb.summary, rich_help_panel=verb.group, context_settings=settings)(command)


for _name, _verb in VERBS.items():
    _register(_name, _verb)


def _settings(verb: Verb, given: Mapping[str, Any]) -> Any:
    """The checked configuration of a command."""
    flags = {name: value for name, value in given.items() if name in verb.config.model_fields and value not in (None, [], ())}
    return configs.load(verb.config, flags, given["config_file"], given["assignments"] or ())


def read_command(words: Sequence[str]) -> tuple[str, BaseModel]:
    """The verb of a command and its checked settings; of `submit` those of the job behind it. Nothing is carried out."""
    if not words:
        raise ConfigError("Write the command behind the flags, for example: classify --images ... --bundle ...")
    name, rest = words[0], list(words[1:])
    if name not in VERBS or name in ("schedule", "demo"):
        raise ConfigError(f"{name}: this command cannot be submitted or scheduled.")
    group: Any = typer.main.get_command(app)
    context = group.commands[name].make_context(name, rest)
    settings = _settings(VERBS[name], context.params)
    return read_job(context.args) if VERBS[name].takes_command else (name, settings)


def read_job(words: Sequence[str]) -> tuple[str, BaseModel]:
    """As `read_command`, of a command that can be a job of a cluster."""
    from tlbatch.commands.schedule import JOBS

    if words and words[0] not in JOBS:
        raise ConfigError(f"{words[0]}: a job is one of {', '.join(JOBS)}.")
    return read_command(words)


def _carry_out(verb: Verb, given: Mapping[str, Any], words: Sequence[str]) -> None:
    """Run a verb, print its result, and exit with its exit code."""
    _prepare(bool(given.get("verbose")))
    settings = _settings(verb, given)
    as_json = bool(given["as_json"])
    # A verb that posts its outcome is interrupted only where it can do that.
    with contextlib.nullcontext() if isinstance(verb.run, _Published) else _interrupts_as_sentences():
        result = verb.run(settings, Call(as_json, words))
        signals.finished()
    _print_result(verb, result, as_json)
    code = _exit_code(settings, result)
    if code == EXIT_TOO_MANY_FAILED:
        print(_too_many_failed(settings, result), file=sys.stderr)
    if code:
        raise typer.Exit(code)


@contextlib.contextmanager
def _interrupts_as_sentences() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C, and what a library makes of them, into the error that says how to continue."""
    try:
        signals.ready()
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(_INTERRUPTED) from None
    except UnfinishedError:
        raise
    except Exception:
        if signals.came():
            raise InterruptedRunError(_INTERRUPTED) from None
        raise


def _print_result(verb: Verb, result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result. If standard output is closed or full, the exit code stays that of the work, which is done.

    Raises:
        OSError: the command does nothing but print, and the disk is full.
    """
    try:
        if as_json:
            print(json.dumps(result), file=results_stream())
        elif verb.show is not None:
            _call(f"tlbatch.report.console.{verb.show}")(result)
    except BrokenPipeError:
        pass  # whoever read it has read enough
    except OSError as error:
        if not _WRITTEN & result.keys():
            raise
        print(f"tlbatch: the result could not be printed: {error.strerror}.", file=sys.stderr)


def _prepare(verbose: bool) -> None:
    """Keep stdout for results, put the log on stderr, keep libraries quiet, and take the signals if nobody has."""
    reserve_stdout()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("tlbatch").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ code writes to the terminal
    signals.take()


def main() -> None:
    """Run the command line; a `TlbatchError` becomes its sentence and its exit code."""
    open_closed_streams()
    separate_python_stderr()
    atexit.register(collector.freeze)  # at its end Python would look through all objects for half a second
    try:
        app()
    except TlbatchError as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        _end(f"{error}; fix this and run the same command again.", UnfinishedError.exit_code)
    except KeyboardInterrupt:
        _end(_INTERRUPTED, UnfinishedError.exit_code)


def _end(sentence: str, code: int) -> NoReturn:
    """Say the sentence and exit.

    An interrupted process ends without another step. While Ray still has work, its `shutdown` ends the process with exit code 1
    and no word in one of ten cases; the processes of a Ray on this machine end with their parent.
    """
    signals.finished()
    print(f"tlbatch: {sentence}", file=sys.stderr, flush=True)
    if signals.came():
        os._exit(code)
    sys.exit(code)
