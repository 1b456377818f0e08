"""A bundle's facts -> `card.html`: how it was made, of what, how well it does, on one page without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
"""


def make_card(title: str, training: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> bytes:
    """The card as HTML.

    Args:
        title: what the bundle is, in a few words.
        training: how it was made, name -> value; `calibration_error` and `abstaining` are told in words.
        metrics: what `measure` or `measure_many` gave on the untouched test part; None of a model nobody measured here.
    """
    measured = _measured(metrics) if metrics is not None else ["<p>Nobody has measured it on images of its own yet.</p>"]
    plain = [[name, value] for name, value in training.items() if not isinstance(value, dict | list)]
    body = [f"<h1>{escape(title)}</h1>", *measured, *_honesty(training), _table("How it was made", ["", ""], plain)]
    head = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
    ]
    return "".join(head + body).encode()


def _measured(metrics: Mapping[str, Any]) -> list[str]:
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
    tables = [
        f"<p>Accuracy on {metrics['images']} test images training never saw: <strong>{metrics['accuracy']:.1%}</strong>.</p>",
        _table("Each class on the test part", ["class", "precision", "recall", "F1", "images"], by_class),
    ]
    if confusion:
        tables.append(_table("Confusion: rows are the truth, columns what the model said", ["", *labels], confusion))
    return tables


def _honesty(training: Mapping[str, Any]) -> list[str]:
    """What the scores are worth: the calibration error, and what abstaining buys."""
    said = []
    if "calibration_error" in training:
        error = training["calibration_error"]
        said.append(
            f"<p>Expected calibration error on the test images: {error['before']:.3f}, and {error['after']:.3f} after the "
            f"head's logits were divided by {training['temperature']:.3f}, which validation images asked for.</p>"
        )
    if "abstaining" in training:
        wanted, test = training["abstaining"]["wanted"], training["abstaining"]["test"]
        said.append(
            f"<p>Below a score of {test['threshold']:.3f} it abstains, so that {wanted:.0%} of its answers are right: on the "
            f"test images {test['precision']:.1%} of {test['answered']} answers, with "
            f"{test['images'] - test['answered']} abstentions.</p>"
        )
    return said


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
