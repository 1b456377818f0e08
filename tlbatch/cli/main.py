"""The command line: for each verb flags -> a configuration -> one call -> an exit code. No work is done here.

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
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import typer
from pydantic import BaseModel

from tlbatch import config as configs
from tlbatch import signals
from tlbatch.cli.options import parameters_of
from tlbatch.cli.verbs import (
    EXIT_TOO_MANY_FAILED,
    INTERRUPTED,
    VERBS,
    Call,
    Published,
    Verb,
    call_of,
    exit_code,
    interrupts_as_sentences,
    too_many_failed,
)
from tlbatch.errors import ConfigError, TlbatchError, UnfinishedError
from tlbatch.stdio import open_closed_streams, reserve_stdout, results_stream, separate_python_stderr

#: A result with one of these keys says what was written or started elsewhere.
_WRITTEN = frozenset({"run_id", "bundle", "model", "job", "sheet", "report"})

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Classify millions of stored images with a transfer-learned Keras model on Ray, and account for every image.",
)


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
    settings = _COMMAND_FOLLOWS if verb.takes != "nothing" else None
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
    return read_job(context.args) if VERBS[name].takes == "job" else (name, settings)


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
    with contextlib.nullcontext() if isinstance(verb.run, Published) else interrupts_as_sentences():
        result = verb.run(settings, Call(as_json, words, read_job if verb.takes == "job" else read_command))
        signals.finished()
    _print_result(verb, result, as_json)
    code = exit_code(settings, result)
    if code == EXIT_TOO_MANY_FAILED:
        print(too_many_failed(settings, result), file=sys.stderr)
    if code:
        raise typer.Exit(code)


def _print_result(verb: Verb, result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result. If standard output is closed or full, the exit code stays that of the work, which is done.

    Raises:
        OSError: the command does nothing but print, and the disk is full.
    """
    try:
        if as_json:
            print(json.dumps(result), file=results_stream())
        elif verb.show is not None:
            call_of(f"tlbatch.report.console.{verb.show}")(result)
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
        _end(INTERRUPTED, UnfinishedError.exit_code)


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
