"""Predictions and the truth -> accuracy, precision and recall a class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlbatch.errors import LabelsError
from tlbatch.labels import NO_LABEL, Labels, read_labels
from tlbatch.ledger import newest_published
from tlbatch.report.table import read_errors, read_predictions
from tlbatch.storage import resolve

if TYPE_CHECKING:
    import pandas as pd


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
    many = _gives_many_labels(output, storage_options)
    truth = read_labels(resolve(labels, storage_options), many=many)
    if split is not None:
        truth = truth.of_split(split)
    columns = ["key", "uri", "label", "abstained", "top_labels"]
    table = read_predictions(output, columns=columns, storage_options=storage_options)
    if many:
        return _evaluate_many(table, truth, output)
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


def _gives_many_labels(output: str, storage_options: Mapping[str, Any] | None) -> bool:
    """Whether the newest published run is of a bundle whose images have any number of labels."""
    newest = newest_published(resolve(output, storage_options))
    return newest is not None and bool(newest.facts.get("multi_label"))


def _evaluate_many(table: pd.DataFrame, truth: Labels, output: str) -> dict[str, Any]:
    """`evaluate`, where `top_labels` are the labels that an image is given."""
    wanted: dict[str, set[str]] = {}
    for name, label in truth.pairs:
        wanted.setdefault(name, set()).update(() if label == NO_LABEL else (label,))
    given = {name: set(labels) for name, labels in zip(table[truth.column], table["top_labels"], strict=True)}
    names = [name for name in wanted if name in given]
    if not names:
        raise LabelsError(
            f"No {truth.column} of {truth.source} is in the table of {output}; the first is {truth.pairs[0][0]!r}."
        )
    classes = sorted(set().union(*(wanted[name] | given[name] for name in names)))
    measured = measure_many([wanted[name] for name in names], [given[name] for name in names], classes)
    return {**measured, "missing": len(wanted) - len(names), "abstained": sum(not given[name] for name in names)}


def measure_many(
    truth: Sequence[Collection[str]], predicted: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, Any]:
    """As `measure`, where an image has any number of labels: accuracy is the share of images with exactly the right ones.

    There is no confusion matrix; `micro_f1` takes every label of every image as one decision.
    """
    from sklearn.metrics import f1_score, precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    binary = MultiLabelBinarizer(classes=list(labels))
    right, given = binary.fit_transform(truth), binary.transform(predicted)
    # Of a single label scikit-learn would count the images without it as a class of their own.
    numbers = [1] if len(labels) == 1 else list(range(len(labels)))
    return {
        "accuracy": float((right == given).all(axis=1).mean()) if len(truth) else 0.0,
        "micro_f1": float(f1_score(right, given, labels=numbers, average="micro", zero_division=0.0)),
        "images": len(truth),
        "by_class": _by_class(precision_recall_fscore_support(right, given, labels=numbers, zero_division=0.0), labels),
        "confusion": [],
        "labels": list(labels),
    }


def _by_class(measured: Sequence[Any], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    precision, recall, f1, support = measured
    return {
        label: {
            "precision": float(precision[number]),
            "recall": float(recall[number]),
            "f1": float(f1[number]),
            "images": int(support[number]),
        }
        for number, label in enumerate(labels)
    }


def measure(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 a class, and the confusion matrix (rows: truth, columns: predicted).

    Args:
        truth: one label an image.
        predicted: what the model said of each.
        labels: the classes, in the order of the matrix.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    measured = precision_recall_fscore_support(truth, predicted, labels=list(labels), zero_division=0.0)
    right = sum(one == other for one, other in zip(truth, predicted, strict=True))
    return {
        "accuracy": right / len(truth) if truth else 0.0,
        "images": len(truth),
        "by_class": _by_class(measured, labels),
        "confusion": confusion_matrix(list(truth), list(predicted), labels=list(labels)).tolist() if truth else [],
        "labels": list(labels),
    }
