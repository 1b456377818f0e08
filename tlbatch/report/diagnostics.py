"""A table and the true labels of its images -> accuracy, confusion examples, precision-recall curves and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tlbatch.images.labels import Labels
from tlbatch.output.run import Run
from tlbatch.report.evaluate import evaluate_rows, labelled_rows

#: Most images per cell of the confusion matrix, bins of the reliability diagram, and most labels with a curve.
_CELL_IMAGES, _BINS, _CURVES = 6, 10, 8
_CELL_COLUMNS = ["uri", "key", "label", "score", "true_label"]


class Curve(NamedTuple):
    """Precision against recall as the threshold on one label's score falls; `average` is the average precision."""

    label: str
    recall: np.ndarray
    precision: np.ndarray
    average: float


@dataclass(frozen=True)
class Diagnostics:
    """A table compared with the true labels.

    Attributes:
        source: the labels file.
        metrics: the result of `evaluate`.
        cells: `uri, key, label, score, true_label` of up to six images per cell of the confusion matrix, the highest scores
            first.
        curves: for the labels with the most images, up to eight.
        reliability: `score, correct, images` of each bin of scores that is not empty: mean score, share of correct
            predictions, number of images.
    """

    source: str
    metrics: dict[str, Any]
    cells: pd.DataFrame
    curves: tuple[Curve, ...] = ()
    reliability: pd.DataFrame | None = None


def diagnose(runs: Sequence[Run], labels: Labels) -> Diagnostics:
    """Compare a table with true labels; only the rows of labelled images are kept in memory.

    Raises:
        LabelsError: no image of the labels file is in the table.
    """
    found = labelled_rows(runs, labels)
    metrics = evaluate_rows(found)
    if labels.many or not metrics["images"]:
        return Diagnostics(labels.source, metrics, pd.DataFrame(columns=_CELL_COLUMNS))
    matched = found.rows.assign(true_label=[label for (label,) in found.rows["true_labels"]])
    by_cell = matched.sort_values("score", ascending=False, kind="stable").groupby(["true_label", "label"], sort=False)
    cells = by_cell.head(_CELL_IMAGES)[_CELL_COLUMNS].reset_index(drop=True)
    curves = tuple(_curve(str(label), matched) for label in matched["true_label"].value_counts().index[:_CURVES])
    return Diagnostics(labels.source, metrics, cells, curves, _reliability(matched))


def _curve(label: str, matched: pd.DataFrame) -> Curve:
    """The curve of one label against all others. An image whose top labels do not include the label has a score of 0."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    pairs = zip(matched["top_labels"], matched["top_scores"], strict=True)
    scores = np.array([next((s for name, s in zip(*pair, strict=True) if name == label), 0.0) for pair in pairs])
    positive = (matched["true_label"] == label).to_numpy()
    precision, recall, _ = precision_recall_curve(positive, scores)
    return Curve(label, recall, precision, float(average_precision_score(positive, scores)))


def _reliability(matched: pd.DataFrame) -> pd.DataFrame:
    bins = np.minimum((matched["score"].to_numpy() * _BINS).astype(int), _BINS - 1)
    correct = matched["true_label"] == matched["label"]
    frame = pd.DataFrame({"score": matched["score"], "correct": correct, "bin": bins, "images": 1})
    return frame.groupby("bin").agg({"score": "mean", "correct": "mean", "images": "sum"}).reset_index(drop=True)
