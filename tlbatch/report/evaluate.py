"""Predictions and the truth -> accuracy, precision and recall a class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tlbatch.errors import LabelsError
from tlbatch.labels import read_labels
from tlbatch.report.table import read_errors, read_predictions
from tlbatch.storage import resolve


def evaluate(
    output: str, labels: str, *, split: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Measure the published table of an output against a labels file.

    Args:
        output: the output folder.
        labels: CSV or Parquet with `key` (or `uri`), `label` and, where `split` is asked for, `split`.
        split: only the rows of this part, for example "test".
        storage_options: fsspec's options for both.

    Returns:
        What `measure` gives, and how many labelled images `failed`, are `missing` from the table, or were `abstained` on
        (those are measured all the same).

    Raises:
        LabelsError: the file cannot be used, or names no image of the table.
    """
    truth = read_labels(resolve(labels, storage_options))
    if split is not None:
        truth = truth.of_split(split)
    table = read_predictions(output, columns=["key", "uri", "label", "abstained"], storage_options=storage_options)
    failed_names = set(read_errors(output, storage_options=storage_options)[truth.column])
    by_name = dict(zip(table[truth.column], zip(table["label"], table["abstained"], strict=True), strict=True))
    matched = [(label, *by_name[name]) for name, label in truth.pairs if name in by_name]
    failed = sum(name in failed_names for name, _ in truth.pairs)
    if not matched and not failed:
        raise LabelsError(f"No {truth.column} of {labels} is in the table of {output}; the first one is {truth.pairs[0][0]!r}.")
    classes = sorted({label for label, _, _ in matched} | {label for _, label, _ in matched})
    return {
        **measure([label for label, _, _ in matched], [label for _, label, _ in matched], classes),
        "failed": failed,
        "missing": len(truth.pairs) - len(matched) - failed,
        "abstained": sum(bool(abstained) for _, _, abstained in matched),
    }


def measure(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 a class, and the confusion matrix (rows: truth, columns: predicted).

    Args:
        truth: one label an image.
        predicted: what the model said of each.
        labels: the classes, in the order of the matrix.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    precision, recall, f1, support = precision_recall_fscore_support(truth, predicted, labels=list(labels), zero_division=0.0)
    by_class = {
        label: {
            "precision": float(precision[number]),
            "recall": float(recall[number]),
            "f1": float(f1[number]),
            "images": int(support[number]),
        }
        for number, label in enumerate(labels)
    }
    right = sum(one == other for one, other in zip(truth, predicted, strict=True))
    return {
        "accuracy": right / len(truth) if truth else 0.0,
        "images": len(truth),
        "by_class": by_class,
        "confusion": confusion_matrix(list(truth), list(predicted), labels=list(labels)).tolist() if truth else [],
        "labels": list(labels),
    }
