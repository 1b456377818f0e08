"""Predictions and true labels -> accuracy, precision and recall per class, and the confusion matrix."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tlbatch.config.settings import by_commas
from tlbatch.errors import LabelsError
from tlbatch.images.label_files import read_labels
from tlbatch.images.labels import Labels, in_short, names_of, warn_of_spelling
from tlbatch.output.run import Run
from tlbatch.output.table import read_groups, require_published
from tlbatch.schema import to_frame
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def evaluate(
    output: str,
    labels: str,
    *,
    labels_columns: Sequence[str] = (),
    split: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the accuracy of an output's published table on labelled images.

    Args:
        output: the output folder.
        labels: CSV or Parquet with `key` or `uri` or both, `label` and, if `split` is given, `split`.
        labels_columns: the columns that name the image and its label, if they are called otherwise; one text with a comma does.
        split: only the rows of this part, for example "test".
        storage_options: fsspec's options for both.

    Returns:
        The result of `measure`, and the number of labelled images that `failed`, are `missing` from the table, or were
        `abstained` (abstained images are measured too).

    Raises:
        LabelsError: the file cannot be used, none of its images is in the table, or a name fits several of them.
    """
    runs = require_published(resolve(output, storage_options))
    columns = by_commas(labels_columns)
    return evaluate_rows(labelled_rows(runs, read_true_labels(runs, labels, split, storage_options, columns)))


def read_true_labels(
    runs: Sequence[Run],
    url: str,
    split: str | None,
    storage_options: Mapping[str, Any] | None,
    columns: Sequence[str] = (),
) -> Labels:
    """Read a labels file: one label per image, or any number if the bundle of the table's newest run is multi-label."""
    labels = read_labels([resolve(url, storage_options)], many=gives_many_labels(runs), columns=columns)
    return labels if split is None else labels.of_split(split)


def gives_many_labels(runs: Sequence[Run]) -> bool:
    """Whether the bundle of a table's newest run gives an image any number of labels."""
    return bool(runs[-1].facts.get("multi_label"))


@dataclass(frozen=True)
class LabelledRows:
    """The labelled images of a table.

    Attributes:
        labels: the labels file.
        rows: `uri, key, label, score, abstained, top_labels, top_scores` of the predicted ones and `true_labels`, a tuple, in
            the order of the labels file.
        failed: labelled images that are rows of the errors table.
        missing: labels that belong to no image of the table.
    """

    labels: Labels
    rows: pd.DataFrame
    failed: int
    missing: int


def labelled_rows(runs: Sequence[Run], labels: Labels) -> LabelledRows:
    """Look up the labelled images of a table; only their rows are kept in memory.

    Raises:
        LabelsError: no image of the labels file is in the table, or a name fits several of them.
    """
    columns = ["uri", "key", "label", "score", "abstained", "top_labels", "top_scores"]
    frame: Any = to_frame(pa.concat_tables(labels.named(piece) for piece in read_groups(runs, "predictions", columns)))
    errors = [name for piece in read_groups(runs, "errors", ["uri", "key"]) for name in names_of(labels.named(piece))]
    predicted = list(zip(frame["uri"], frame["key"], strict=True))
    found = labels.of_images([*predicted, *errors])
    if not found.labels:
        fitted = labels.fitted_to(pa.concat_tables(read_groups(runs, "predictions", ["uri", "key"]))["key"])
        if fitted is not labels:
            return labelled_rows(runs, fitted)
        raise LabelsError(f"No image of {labels.source} is in the table; the first one is {labels.rows[0].name}.")
    place = {name: number for number, name in enumerate(predicted)}
    known = [name for name in found.labels if name in place]
    rows = frame.iloc[[place[name] for name in known]].assign(true_labels=[found.labels[name] for name in known])
    _warn_of_unknown_labels(rows, labels)
    return LabelledRows(labels, rows.reset_index(drop=True), len(found.labels) - len(known), len(found.missing))


def _warn_of_unknown_labels(rows: pd.DataFrame, labels: Labels) -> None:
    """Log true labels that no image has among its best labels: they may be spelled in another way than the model's."""
    given = Counter(label for names in rows["true_labels"] for label in names)
    warn_of_spelling(given.elements(), labels.source)
    known = {*rows["label"], *chain.from_iterable(rows["top_labels"])}
    unknown = [f"{label!r} ({count} images)" for label, count in sorted(given.items()) if label not in known]
    if unknown:
        log.warning(
            "No image of the table has these labels of %s among its best ones: %s; the table has %s",
            *(labels.source, in_short(unknown), in_short([repr(label) for label in sorted(known)])),
        )


def evaluate_rows(found: LabelledRows) -> dict[str, Any]:
    """`evaluate` for the result of `labelled_rows`."""
    if found.labels.many:
        return _evaluate_many(found)
    actual, predicted = [label for (label,) in found.rows["true_labels"]], found.rows["label"].tolist()
    return {
        **measure(actual, predicted, sorted({*actual, *predicted})),
        "failed": found.failed,
        "missing": found.missing,
        "abstained": int(found.rows["abstained"].sum()),
    }


def _evaluate_many(found: LabelledRows) -> dict[str, Any]:
    """`evaluate_rows` for multi-label tables, in which `top_labels` are the predicted labels."""
    actual, predicted = ([set(names) for names in found.rows[column]] for column in ("true_labels", "top_labels"))
    classes = sorted(set().union(*actual, *predicted))
    abstained = sum(not names for names in predicted)
    return {
        **measure_many(actual, predicted, classes),
        "failed": found.failed,
        "missing": found.missing,
        "abstained": abstained,
    }


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

    `balanced_accuracy` is the mean recall of the classes that have images: a head that never finds a rare class has a high
    accuracy and a low balanced one.

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
    recalls = [float(recall) for recall, support in zip(measured[1], measured[3], strict=True) if support]
    return {
        "accuracy": correct / len(actual),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "images": len(actual),
        "by_class": _by_class(measured, labels),
        "confusion": confusion_matrix(list(actual), list(predicted), labels=list(labels)).tolist(),
        "labels": list(labels),
    }
