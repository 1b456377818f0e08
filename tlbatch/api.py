"""The verbs as Python functions: keyword arguments with the names of the flags -> the result that `--json` prints.

A verb's settings are the fields of its configuration class. The signature comes from that class, so a type checker, completion
and `help()` know every setting, and each description stands in one place.
"""

from __future__ import annotations

import functools
import inspect
import operator
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, Field

from tlbatch.config import (
    BrowseConfig,
    CompactConfig,
    DemoConfig,
    ExportConfig,
    ExtractConfig,
    ImportConfig,
    RescoreConfig,
    ReviewConfig,
    RunConfig,
    ScheduleConfig,
    SqlConfig,
    SubmitConfig,
    SyncConfig,
    TrainConfig,
    load,
)
from tlbatch.errors import OutputError

if TYPE_CHECKING:
    from tlbatch.output.documents import ReportDocument
    from tlbatch.report.notebook import Report

    class _Run(RunConfig):
        """`RunConfig` as a caller writes it: a list of bundles becomes `bundle` and `other_bundles`."""

        bundle: str | Sequence[str]  # type: ignore[assignment]

else:
    _Run = RunConfig


class _Command(BaseModel):
    """A command that another one passes on."""

    command: Literal["train", "classify", "extract", "rescore"] = Field(description="train, classify, extract or rescore.")
    settings: dict[str, Any] = Field(description="The command's own settings, by name.")

    def checked(self) -> BaseModel:
        """The command's configuration.

        Raises:
            ConfigError: a setting is missing, wrong or unknown.
        """
        from tlbatch.commands.schedule import JOBS

        return load(JOBS[self.command], self.settings)


class _Submit(_Command, SubmitConfig):
    """A job of a cluster."""


class _Schedule(_Command, ScheduleConfig):
    """A command of every night."""


P = ParamSpec("P")
C = TypeVar("C", bound=BaseModel)
R = TypeVar("R")


def _settings_of(kind: Callable[P, C]) -> Callable[[Callable[[C], R]], Callable[P, R]]:
    """Turn a function of a configuration into a function of the configuration's fields, documented by them."""

    def decorate(work: Callable[[C], R]) -> Callable[P, R]:
        @functools.wraps(work)
        def verb(*args: P.args, **settings: P.kwargs) -> R:
            if args:
                raise TypeError(f"{work.__name__}: give the settings by name.")
            return work(cast("C", load(cast("type[BaseModel]", kind), settings)))

        shown: Any = verb
        shown.__signature__ = _signature(cast("type[BaseModel]", kind), work.__annotations__["return"])
        shown.__annotations__ = {name: one.annotation for name, one in shown.__signature__.parameters.items()}
        shown.__annotations__["return"] = work.__annotations__["return"]
        shown.__doc__ = _documented(work, cast("type[BaseModel]", kind))
        del shown.__wrapped__  # or `inspect` would show the inner function
        return verb

    return decorate


def _signature(kind: type[BaseModel], returns: Any) -> inspect.Signature:
    """A keyword for each field, the required ones first; types without the limits that the configuration checks."""
    fields = sorted(kind.model_fields.items(), key=lambda item: not item[1].is_required())
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.default,
            annotation=_without_limits(field.annotation),
        )
        for name, field in fields
    ]
    return inspect.Signature(parameters, return_annotation=returns)


def _without_limits(annotation: Any) -> Any:
    """A type without `Annotated`, at any depth."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _without_limits(arguments[0])
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_without_limits, arguments))
    return annotation


def _documented(work: Callable[..., Any], kind: type[BaseModel]) -> str:
    """The docstring of a verb with an Args section from the field descriptions."""
    summary, _, rest = inspect.cleandoc(work.__doc__ or "").partition("\n\n")
    settings = [
        textwrap.fill(f"{name}: {field.description}", 100, initial_indent="    ", subsequent_indent="        ")
        for name, field in kind.model_fields.items()
        if field.description
    ]
    return "\n\n".join([summary, "\n".join(["Args:", *settings]), *([rest] if rest else [])])


@_settings_of(_Run)
def classify(config: RunConfig) -> ReportDocument:
    """Classify every image of a store and publish the table.

    `bundle` may also be a list of bundles of one base: they share a pass over the images, and each table is in a folder of the
    bundle's name below `output`.

    Returns:
        The run's report: run_id, output, listed, predicted, failed, seconds and more; with several bundles also `tables`.

    Raises:
        TlbatchError: see `tlbatch.errors` for the kinds.
    """
    from tlbatch.commands.classify import classify as work

    return work(config)


@_settings_of(RunConfig)
def run(config: RunConfig) -> Report:
    """`classify` for a notebook: shows progress, writes `report.html`, and returns the report as an object to look at.

    Returns:
        The report: its `verdict`, the `result` that `classify` returns, `predictions`, `show("label", n=12)`. A notebook
        displays the page itself.
    """
    from dataclasses import replace

    from tlbatch.commands.classify import classify as work
    from tlbatch.report.progress import watching

    if config.other_bundles:
        raise OutputError("bundle: a report is about one table; use tlbatch.classify for several, then tlbatch.load_report.")
    with watching("classifying") as watch:
        result = work(config, watch)
    return replace(load_report(config.output, storage_options=config.storage_options), result=result)


def load_report(
    output: str, *, labels: str | None = None, split: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> Report:
    """The report of an output's newest published run; its `report.html` is written again.

    Args:
        output: the output folder or URL.
        labels: CSV or Parquet with `key` (or `uri`) and `label`: the report then shows the accuracy on these images.
        split: only this part of the labels file.
        storage_options: fsspec's options for both.

    Raises:
        OutputError: nothing is published there.
        LabelsError: the labels file cannot be used.
    """
    from tlbatch.report import notebook

    return notebook.load_report(output, labels=labels, split=split, storage_options=storage_options)


@_settings_of(ExtractConfig)
def extract(config: ExtractConfig) -> ReportDocument:
    """Write the features of every image of a store, as `classify` writes its predictions; give `bundle` or `base`.

    Returns:
        The run's report, as `classify` returns it.
    """
    from tlbatch.commands.extract import extract as work

    return work(config)


@_settings_of(RescoreConfig)
def rescore(config: RescoreConfig) -> ReportDocument:
    """Give stored features the predictions of another head; no image is read.

    Returns:
        The run's report, as `classify` returns it.
    """
    from tlbatch.commands.rescore import rescore as work

    return work(config)


@_settings_of(ReviewConfig)
def review(config: ReviewConfig) -> dict[str, Any]:
    """Choose the images of a table that a person should look at; write a labelling page and a labels file to fill in.

    Returns:
        `labels` and `sheet` (the two files), `images`, `why`, `near_duplicates` and `unreadable`.
    """
    from tlbatch.commands.review import review as work

    return work(config)


@_settings_of(ImportConfig)
def import_model(config: ImportConfig) -> dict[str, Any]:
    """Make a bundle from a Keras classifier that was trained elsewhere.

    Returns:
        `bundle`, `digest`, `labels`, `size`, `features_length`, `multi_label`, `split`, `off` and `seconds`.
    """
    from tlbatch.commands.import_export import import_model as work

    return work(config)


@_settings_of(ExportConfig)
def export_model(config: ExportConfig) -> dict[str, Any]:
    """Write a bundle's model as a plain Keras model, from pixels to scores.

    Returns:
        `model` (the file) and `labels` (in the order of its scores).
    """
    from tlbatch.commands.import_export import export_model as work

    return work(config)


@_settings_of(RunConfig)
def plan(config: RunConfig) -> dict[str, Any]:
    """Estimate what `classify` with these settings would do, and what it would cost; nothing is written.

    Returns:
        `counts`, `objects`, `rescored`, `bytes`, `images`, `seconds`, `cpu_hours`, `gpu_hours`, `known_from`, `output`,
        `list_seconds` and `images_per_second`; `inventory` if one was read in place of a listing.
    """
    from tlbatch.commands.plan import plan as work

    return work(config)


@_settings_of(_Submit)
def submit(config: _Submit) -> dict[str, Any]:
    """Run a command as a job on a Ray cluster; with `follow`, print its log here.

    Returns:
        `job`, its name; `address`; and, if it was followed, `status` and `exit_code`.

    Raises:
        ClusterError: the cluster has no such name, refuses the caller, or accepts jobs from everybody.
        UnfinishedError: it does not answer.
    """
    from tlbatch.commands.submit import submit as work

    return work(config, config.command, config.checked(), (), functools.partial(print, end="", flush=True))


@_settings_of(_Schedule)
def schedule(config: _Schedule) -> str:
    """What to install so that a command runs on a schedule; nothing is installed.

    Returns:
        A line for cron, units for systemd, or manifests for KubeRay, with comments that say how to install and remove it.

    Raises:
        ConfigError: the time is not in cron syntax, or the target cannot express it.
    """
    from tlbatch.commands.schedule import schedule as work
    from tlbatch.commands.schedule import words_of

    settings = config.checked()
    return work(config, words_of(config.command, settings), config.command, settings)


@_settings_of(DemoConfig)
def demo(config: DemoConfig) -> dict[str, Any]:
    """Train, classify and verify on photographs of solar cells, here, and print what happens.

    Returns:
        `accuracy` and `metrics` on the test part; `run`, the report of the run; `verify`; `report`, the URL of the report page;
        `seconds`.
    """
    from tlbatch.commands.demo import demo as work

    return work(config)


@_settings_of(CompactConfig)
def compact(config: CompactConfig) -> ReportDocument:
    """Fold the runs of a table into one; the table stays the same.

    Returns:
        The new run's report, as `classify` returns it.
    """
    from tlbatch.commands.compact import compact as work

    return work(config)


def rollback(output: str, to: str, *, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Make a table what it was after an earlier run; nothing is processed again.

    Args:
        output: the output folder or URL.
        to: the run's name.
        storage_options: fsspec's options for the output.

    Returns:
        `output`, `table` (the runs that make it up now) and `before` (those that did).
    """
    from tlbatch.output.rollback import roll_back
    from tlbatch.storage.resolve import resolve

    return roll_back(resolve(output, storage_options), to)


def sql(output: str, query: str | None = None, *, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The views of a table for DuckDB, or the answer to a query of them.

    Args:
        output: the output folder or URL.
        query: SQL over the views `predictions`, `errors` and `features`.
        storage_options: fsspec's options for the output.

    Returns:
        `views`, the statements that create them; with a query instead `columns`, its names, and `rows`.
    """
    from tlbatch.commands.sql import sql as work

    return work(load(SqlConfig, {"output": output, "query": query, "storage_options": dict(storage_options or {})}))


@_settings_of(BrowseConfig)
def browse(config: BrowseConfig) -> dict[str, Any]:
    """Show the images of an output's published table in a browser on this machine, until it is interrupted.

    Prints the address, which has a token, on standard error.

    Returns:
        `images`, the number of images of the table, and `corrections`, the URL of the labels file with what was corrected.
    """
    from tlbatch.web.serve import browse as work

    return work(config)


@_settings_of(SyncConfig)
def sync(config: SyncConfig) -> dict[str, Any]:
    """Bring a Delta or Iceberg table to the predictions that an output has published; only what has changed is written.

    Returns:
        `output`, `to`, `as`, `runs`, `written` (all, changes or nothing) and `added`, the rows that were written.
    """
    from tlbatch.commands.sync import sync as work

    return work(config)


@_settings_of(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Train a head on a frozen base and save both as a bundle; give `images` or `features`.

    Returns:
        `bundle`, `digest`, `base`, `labels`, `images` in each part, `failed`, `images_read`, `accuracy`, `metrics`,
        `calibration`, `head`, `held_out`, `epochs`, `quantized` and `seconds`.
    """
    from tlbatch.commands.train import train as work

    return work(config)
