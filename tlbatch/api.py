"""The verbs as Python functions: keyword arguments with the names of the flags -> the same result as `--json` prints."""

from __future__ import annotations

from typing import Any

from tlbatch.config import ExtractConfig, RunConfig, TrainConfig, load


def classify(**settings: Any) -> dict[str, Any]:
    """Classify every image of a store and publish the table.

    Args:
        **settings: the fields of `tlbatch.config.RunConfig`; `images`, `bundle` and `output` are needed.

    Returns:
        The run's report: run_id, output, listed, predicted, failed, seconds and more.

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
    from tlbatch import training

    return training.extract(load(ExtractConfig, settings))


def train(**settings: Any) -> dict[str, Any]:
    """Train a head on a frozen base and save both as a bundle.

    Args:
        **settings: the fields of `tlbatch.config.TrainConfig`; `images` and `bundle` are needed.
    """
    from tlbatch import training

    return training.train(load(TrainConfig, settings))
