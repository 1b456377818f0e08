"""The verbs as Python functions: keyword arguments with the names of the flags -> the same result as `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
