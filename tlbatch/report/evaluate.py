"""Predictions and the truth -> accuracy, precision and recall a class, and the confusion matrix."""

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
    runs = require_published(resolve(output, storage_options))
    truth = read_truth(runs, labels, split, storage_options)
    return evaluate_rows(runs, truth, labelled_rows(runs, truth))


def read_truth(runs: Sequence[Run], labels: str, split: str | None, storage_options: Mapping[str, Any] | None) -> Labels:
    """A labels file as the bundle of a table's newest run has its labels: one an image, or any number of them."""
    truth = read_labels(resolve(labels, storage_options), many=gives_many_labels(runs))
    return truth if split is None else truth.of_split(split)


def gives_many_labels(runs: Sequence[Run]) -> bool:
    """Whether the newest run of a table is of a bundle whose images have any number of labels."""
    return bool(runs[-1].facts.get("multi_label"))


def labelled_rows(runs: Sequence[Run], truth: Labels) -> pd.DataFrame:
    """The rows of a table that a labels file names: `uri, key, label, score, abstained, top_labels, top_scores`."""
    names = pa.array({name for name, _ in truth.pairs}, pa.string())
    columns = ["uri", "key", "label", "score", "abstained", "top_labels", "top_scores"]
    found = [piece.filter(pc.is_in(piece[truth.column], names)) for piece in read_groups(runs, "predictions", columns)]
    frame: pd.DataFrame = pa.concat_tables(found).to_pandas()
    return frame


def evaluate_rows(runs: Sequence[Run], truth: Labels, rows: pd.DataFrame) -> dict[str, Any]:
    """`evaluate`, given the rows that a labels file names."""
    if gives_many_labels(runs):
        return _evaluate_many(rows, truth, _failed_names(runs, truth))
    matched = matched_rows(truth, rows)
    names = _failed_names(runs, truth)
    failed = sum(name in names for name, _ in truth.pairs)
    if matched.empty and not failed:
        raise _names_no_image(truth)
    classes = sorted({*matched["truth"], *matched["label"]})
    return {
        **measure(matched["truth"].tolist(), matched["label"].tolist(), classes),
        "failed": failed,
        "missing": len(truth.pairs) - len(matched) - failed,
        "abstained": int(matched["abstained"].sum()),
    }


def matched_rows(truth: Labels, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table with a column `truth`, in the order of the labels file; of a name that stands twice the last."""
    by_name = rows.drop_duplicates(truth.column, keep="last").set_index(truth.column, drop=False)
    known = [(name, label) for name, label in truth.pairs if name in by_name.index]
    return by_name.loc[[name for name, _ in known]].assign(truth=[label for _, label in known]).reset_index(drop=True)


def _failed_names(runs: Sequence[Run], truth: Labels) -> set[str]:
    """The images of a labels file that stand among the errors."""
    named = {name for name, _ in truth.pairs}
    found: set[str] = set()
    for piece in read_groups(runs, "errors", ["uri", "key"]):
        found |= named.intersection(piece[truth.column].to_pylist())
    return found


def _names_no_image(truth: Labels) -> LabelsError:
    return LabelsError(f"No {truth.column} of {truth.source} is in the table; the first one is {truth.pairs[0][0]!r}.")


def _evaluate_many(table: pd.DataFrame, truth: Labels, failed: set[str]) -> dict[str, Any]:
    """`evaluate_rows`, where `top_labels` are the labels that an image is given."""
    wanted: dict[str, set[str]] = {}
    for name, label in truth.pairs:
        wanted.setdefault(name, set()).update(() if label == NO_LABEL else (label,))
    given = {name: set(labels) for name, labels in zip(table[truth.column], table["top_labels"], strict=True)}
    names = [name for name in wanted if name in given]
    if not names and not failed:
        raise _names_no_image(truth)
    classes = sorted(set().union(*(wanted[name] | given[name] for name in names)))
    measured = measure_many([wanted[name] for name in names], [given[name] for name in names], classes)
    missing = len(wanted) - len(names) - len(failed)
    return {**measured, "failed": len(failed), "missing": missing, "abstained": sum(not given[name] for name in names)}


def measure_many(
    truth: Sequence[Collection[str]], predicted: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, Any]:
    """As `measure`, where an image has any number of labels: accuracy is the share of images with exactly the right ones.

    There is no confusion matrix; `micro_f1` takes every label of every image as one decision.
    """
    from sklearn.metrics import f1_score, precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    if not truth:
        return {"accuracy": 0.0, "micro_f1": 0.0, "images": 0, "by_class": {}, "confusion": [], "labels": list(labels)}
    binary = MultiLabelBinarizer(classes=list(labels))
    right, given = binary.fit_transform(truth), binary.transform(predicted)
    # Of a single label scikit-learn would count the images without it as a class of their own.
    numbers = [1] if len(labels) == 1 else list(range(len(labels)))
    return {
        "accuracy": float((right == given).all(axis=1).mean()),
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

    if not truth:
        return {"accuracy": 0.0, "images": 0, "by_class": {}, "confusion": [], "labels": list(labels)}
    measured = precision_recall_fscore_support(truth, predicted, labels=list(labels), zero_division=0.0)
    right = sum(one == other for one, other in zip(truth, predicted, strict=True))
    return {
        "accuracy": right / len(truth),
        "images": len(truth),
        "by_class": _by_class(measured, labels),
        "confusion": confusion_matrix(list(truth), list(predicted), labels=list(labels)).tolist(),
        "labels": list(labels),
    }
