"""Predictions and true labels -> accuracy, precision and recall per class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.errors import LabelsError
from tlbatch.images.labels import NO_LABEL, Labels, read_labels
from tlbatch.output.run import Run
from tlbatch.output.table import read_groups, require_published
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    output: str, labels: str, *, split: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Measure the accuracy of an output's published table on labelled images.

    Args:
        output: the output folder.
        labels: CSV or Parquet with `key` (or `uri`), `label` and, if `split` is given, `split`.
        split: only the rows of this part, for example "test".
        storage_options: fsspec's options for both.

    Returns:
        The result of `measure`, and the number of labelled images that `failed`, are `missing` from the table, or were
        `abstained` (abstained images are measured too).

    Raises:
        LabelsError: the file cannot be used, or none of its images is in the table.
    """
    runs = require_published(resolve(output, storage_options))
    found = read_true_labels(runs, labels, split, storage_options)
    return evaluate_rows(runs, found, labelled_rows(runs, found))


def read_true_labels(runs: Sequence[Run], url: str, split: str | None, storage_options: Mapping[str, Any] | None) -> Labels:
    """Read a labels file: one label per image, or any number if the bundle of the table's newest run is multi-label."""
    labels = read_labels(resolve(url, storage_options), many=gives_many_labels(runs))
    return labels if split is None else labels.of_split(split)


def gives_many_labels(runs: Sequence[Run]) -> bool:
    """Whether the bundle of a table's newest run gives an image any number of labels."""
    return bool(runs[-1].facts.get("multi_label"))


def labelled_rows(runs: Sequence[Run], labels: Labels) -> pd.DataFrame:
    """The rows of the labelled images of a table: `uri, key, label, score, abstained, top_labels, top_scores`."""
    names = pa.array({name for name, _ in labels.pairs}, pa.string())
    columns = ["uri", "key", "label", "score", "abstained", "top_labels", "top_scores"]
    found = [piece.filter(pc.is_in(piece[labels.column], names)) for piece in read_groups(runs, "predictions", columns)]
    frame: pd.DataFrame = pa.concat_tables(found).to_pandas()
    return frame


def evaluate_rows(runs: Sequence[Run], labels: Labels, rows: pd.DataFrame) -> dict[str, Any]:
    """`evaluate` for the result of `labelled_rows`."""
    if gives_many_labels(runs):
        return _evaluate_many(rows, labels, _failed_names(runs, labels))
    matched = matched_rows(labels, rows)
    names = _failed_names(runs, labels)
    failed = sum(name in names for name, _ in labels.pairs)
    if matched.empty and not failed:
        raise _no_labelled_image(labels)
    classes = sorted({*matched["true_label"], *matched["label"]})
    return {
        **measure(matched["true_label"].tolist(), matched["label"].tolist(), classes),
        "failed": failed,
        "missing": len(labels.pairs) - len(matched) - failed,
        "abstained": int(matched["abstained"].sum()),
    }


def matched_rows(labels: Labels, rows: pd.DataFrame) -> pd.DataFrame:
    """The labelled rows with a column `true_label`, in the order of the labels file.

    If several rows have the same name, the last one counts.
    """
    by_name = rows.drop_duplicates(labels.column, keep="last").set_index(labels.column, drop=False)
    known = [(name, label) for name, label in labels.pairs if name in by_name.index]
    return by_name.loc[[name for name, _ in known]].assign(true_label=[label for _, label in known]).reset_index(drop=True)


def _failed_names(runs: Sequence[Run], labels: Labels) -> set[str]:
    """The labelled images that are rows of the errors table."""
    named = {name for name, _ in labels.pairs}
    found: set[str] = set()
    for piece in read_groups(runs, "errors", ["uri", "key"]):
        found |= named.intersection(piece[labels.column].to_pylist())
    return found


def _no_labelled_image(labels: Labels) -> LabelsError:
    return LabelsError(f"No {labels.column} of {labels.source} is in the table; the first one is {labels.pairs[0][0]!r}.")


def _evaluate_many(table: pd.DataFrame, labels: Labels, failed: set[str]) -> dict[str, Any]:
    """`evaluate_rows` for multi-label tables, in which `top_labels` are the predicted labels."""
    expected: dict[str, set[str]] = {}
    for name, label in labels.pairs:
        expected.setdefault(name, set()).update(() if label == NO_LABEL else (label,))
    predicted = {name: set(top) for name, top in zip(table[labels.column], table["top_labels"], strict=True)}
    names = [name for name in expected if name in predicted]
    if not names and not failed:
        raise _no_labelled_image(labels)
    classes = sorted(set().union(*(expected[name] | predicted[name] for name in names)))
    measured = measure_many([expected[name] for name in names], [predicted[name] for name in names], classes)
    missing = len(expected) - len(names) - len(failed)
    return {**measured, "failed": len(failed), "missing": missing, "abstained": sum(not predicted[name] for name in names)}


def measure_many(
    actual: Sequence[Collection[str]], predicted: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, Any]:
    """`measure` for images with any number of labels; an image counts as correct if its set of labels is exactly right.

    There is no confusion matrix. `micro_f1` counts every label of every image as one decision.
    """
    from sklearn.metrics import f1_score, precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    if not actual:
        return {"accuracy": 0.0, "micro_f1": 0.0, "images": 0, "by_class": {}, "confusion": [], "labels": list(labels)}
    binary = MultiLabelBinarizer(classes=list(labels))
    expected, given = binary.fit_transform(actual), binary.transform(predicted)
    # With a single label, scikit-learn would count the images without it as a second class.
    numbers = [1] if len(labels) == 1 else list(range(len(labels)))
    return {
        "accuracy": float((expected == given).all(axis=1).mean()),
        "micro_f1": float(f1_score(expected, given, labels=numbers, average="micro", zero_division=0.0)),
        "images": len(actual),
        "by_class": _by_class(precision_recall_fscore_support(expected, given, labels=numbers, zero_division=0.0), labels),
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


def measure(actual: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy; precision, recall and F1 per class; and the confusion matrix (rows: true labels, columns: predicted labels).

    Args:
        actual: the true label of each image.
        predicted: the predicted label of each image.
        labels: the classes, in the order of the matrix.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    if not actual:
        return {"accuracy": 0.0, "images": 0, "by_class": {}, "confusion": [], "labels": list(labels)}
    measured = precision_recall_fscore_support(actual, predicted, labels=list(labels), zero_division=0.0)
    correct = sum(one == other for one, other in zip(actual, predicted, strict=True))
    return {
        "accuracy": correct / len(actual),
        "images": len(actual),
        "by_class": _by_class(measured, labels),
        "confusion": confusion_matrix(list(actual), list(predicted), labels=list(labels)).tolist(),
        "labels": list(labels),
    }
