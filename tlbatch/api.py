"""The verbs as Python functions: keyword arguments with the names of the flags -> the same result as `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tlbatch.config import (
    CompactConfig,
    ExportConfig,
    ExtractConfig,
    ImportConfig,
    RescoreConfig,
    ReviewConfig,
    RunConfig,
    TrainConfig,
    load,
)
from tlbatch.errors import ConfigError

if TYPE_CHECKING:
    from tlbatch.notebook import Report


def classify(**settings: Any) -> dict[str, Any]:
    """Classify every image of a store and publish the table.

    Args:
        **settings: the fields of `tlbatch.config.RunConfig`; `images`, `bundle` and `output` are needed. `bundle` may be a
            list of bundles of one base: they share a pass, and each has its table in a folder of its name.

    Returns:
        The run's report: run_id, output, listed, predicted, failed, seconds and more; of several bundles also `tables`.

    Raises:
        TlbatchError: see `tlbatch.errors` for which kind means what.
    """
    from tlbatch import pipeline

    return pipeline.run(load(RunConfig, settings))


def run(**settings: Any) -> Report:
    """`classify` for a notebook: shows how far it is, writes `report.html`, and returns the report as something to look at.

    Args:
        **settings: as for `classify`, with one bundle.

    Returns:
        The report: its `verdict`, the `result` that `classify` returns, `predictions`, `show("label", n=12)`. A notebook
        shows the page itself.
    """
    from tlbatch import notebook

    return notebook.run(settings)


def load_report(
    output: str, *, labels: str | None = None, split: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> Report:
    """The report of an output's newest published run; `report.html` beside it is written anew.

    Args:
        output: the output folder or URL.
        labels: CSV or Parquet with `key` (or `uri`) and `label`: the report then holds the table against the truth.
        split: only this part of the labels file.
        storage_options: fsspec's options for both.
    """
    from tlbatch import notebook

    return notebook.load_report(output, labels=labels, split=split, storage_options=storage_options)


def read_predictions(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["pandas", "arrow", "ray"] = "pandas",  # noqa: A002 - the word a reader looks for
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """The predictions of an output: one row an image, columns as in `docs/formats.md`.

    Args:
        output: the output folder or URL.
        columns: only these columns.
        format: pandas for a DataFrame, arrow for a `pyarrow.Table`, ray for a `ray.data.Dataset`, which reads each published
            file where its rows are used.
        storage_options: fsspec's options for it.

    Raises:
        OutputError: nothing is published there.
        ConfigError: there is no such format.
    """
    from tlbatch.report import table
    from tlbatch.storage import resolve

    if format == "ray":
        from tlbatch.execution import dataset
        from tlbatch.session import ray_for_good

        runs = table.published(resolve(output, storage_options))
        wanted = list(columns) if columns is not None else None
        ray_for_good()
        return dataset(table.parts_of(runs, "predictions"), lambda part: table.read_part(part[0], part[1], wanted))
    if format not in ("pandas", "arrow"):
        raise ConfigError(f"format: write pandas, arrow or ray; found {format!r}.")
    found = table.read_published(output, "predictions", columns, storage_options)
    return found if format == "arrow" else found.to_pandas()


def extract(**settings: Any) -> dict[str, Any]:
    """Write the features of every image of a store, as `classify` writes its predictions.

    Args:
        **settings: the fields of `tlbatch.config.ExtractConfig`; `images`, `output`, and `bundle` or `base` are needed.
    """
    from tlbatch import extraction

    return extraction.extract(load(ExtractConfig, settings))


def rescore(**settings: Any) -> dict[str, Any]:
    """Give every image of a run with features the predictions of another head; no image is read.

    Args:
        **settings: the fields of `tlbatch.config.RescoreConfig`; `features`, `bundle` and `output` are needed.
    """
    from tlbatch import rescoring

    return rescoring.run(load(RescoreConfig, settings))


def review(**settings: Any) -> dict[str, Any]:
    """Choose the images of a table that a person should look at; write a contact sheet and a labels file to fill in.

    Args:
        **settings: the fields of `tlbatch.config.ReviewConfig`; `output` is needed.
    """
    from tlbatch import reviewing

    return reviewing.review(load(ReviewConfig, settings))


def import_model(**settings: Any) -> dict[str, Any]:
    """Make a bundle of a Keras classifier that was trained elsewhere.

    Args:
        **settings: the fields of `tlbatch.config.ImportConfig`; `model`, `labels`, `scale` and `bundle` are needed.
    """
    from tlbatch import importing

    return importing.import_model(load(ImportConfig, settings))


def export_model(**settings: Any) -> dict[str, Any]:
    """Write a bundle's model as a plain Keras model, from uint8 pixels to scores.

    Args:
        **settings: the fields of `tlbatch.config.ExportConfig`; `bundle` and `model` are needed.
    """
    from tlbatch import importing

    return importing.export_model(load(ExportConfig, settings))


def plan(**settings: Any) -> dict[str, Any]:
    """What `classify` with these settings would do, and what it would take; nothing is written.

    Args:
        **settings: the fields of `tlbatch.config.RunConfig`; `images`, `bundle` and `output` are needed.
    """
    from tlbatch import forecast

    return forecast.forecast(load(RunConfig, settings))


def compact(**settings: Any) -> dict[str, Any]:
    """Fold the runs of many nights into one; the table stays as it is.

    Args:
        **settings: the fields of `tlbatch.config.CompactConfig`; `output` is needed.
    """
    from tlbatch import compacting

    return compacting.compact(load(CompactConfig, settings))


def rollback(output: str, to: str, *, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Make a table what it was after an earlier run; nothing is done again.

    Args:
        output: the output folder or URL.
        to: the run's name.
        storage_options: fsspec's options for it.
    """
    from tlbatch import commit
    from tlbatch.storage import resolve

    return commit.roll_back(resolve(output, storage_options), to)


def train(**settings: Any) -> dict[str, Any]:
    """Train a head on a frozen base and save both as a bundle.

    Args:
        **settings: the fields of `tlbatch.config.TrainConfig`; `images` (or `features`) and `bundle` are needed.
    """
    from tlbatch import training

    return training.train(load(TrainConfig, settings))
