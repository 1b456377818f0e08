"""A bundle's facts -> `card.html`: how it was made, of what, how well it does, on one page without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tlbatch.report.html import render


class _Table(NamedTuple):
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


def make_model_card(title: str, training: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> bytes:
    """The card as HTML.

    Args:
        title: what the bundle is, in a few words.
        training: how it was made, name -> value; `calibration_error` and `abstaining` are told in words.
        metrics: what `measure` or `measure_many` gave on the untouched test part; None of a model nobody measured here.
    """
    plain = [[name, value] for name, value in training.items() if not isinstance(value, dict | list)]
    made = _Table("How it was made", [], plain)
    if metrics is None:
        said, measured = ["Nobody has measured it on images of its own yet."], []
    else:
        said = [f"Accuracy on {metrics['images']} test images training never saw: {metrics['accuracy']:.1%}."]
        measured = _measured(metrics)
    return render("card.html", title, sentences=[*said, *_honesty(training)], tables=[*measured, made])


def _measured(metrics: Mapping[str, Any]) -> list[_Table]:
    labels = list(metrics["labels"])
    by_class = [
        [
            label,
            *(f"{metrics['by_class'][label][name]:.3f}" for name in ("precision", "recall", "f1")),
            metrics["by_class"][label]["images"],
        ]
        for label in labels
    ]
    confusion = [[label, *row] for label, row in zip(labels, metrics["confusion"], strict=False)]
    tables = [_Table("Each class on the test part", ["", "precision", "recall", "F1", "images"], by_class)]
    if confusion:
        tables.append(_Table("Confusion: rows are the truth, columns what the model said", ["", *labels], confusion))
    return tables


def _honesty(training: Mapping[str, Any]) -> list[str]:
    """What the scores are worth: the calibration error, and what abstaining buys."""
    said = []
    if "calibration_error" in training:
        error = training["calibration_error"]
        said.append(
            f"Expected calibration error on the test images: {error['before']:.3f}, and {error['after']:.3f} after the "
            f"head's logits were divided by {training['temperature']:.3f}, which validation images asked for."
        )
    if "abstaining" in training:
        wanted, test = training["abstaining"]["wanted"], training["abstaining"]["test"]
        said.append(
            f"Below a score of {test['threshold']:.3f} it abstains, so that {wanted:.0%} of its answers are right: on the "
            f"test images {test['precision']:.1%} of {test['answered']} answers, with "
            f"{test['images'] - test['answered']} abstentions."
        )
    return said
