"""A table and its images' true labels -> how often it is right, where it is wrong, and what its scores are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tlbatch.images.labels import Labels
from tlbatch.output.run import Run
from tlbatch.report.evaluate import evaluate_rows, gives_many_labels, labelled_rows, matched_rows

#: Images of one cell of the confusion matrix that are shown, bins of a reliability diagram, labels with a curve.
_SHOWN, _BINS, _CURVES = 6, 10, 8


class Curve(NamedTuple):
    """Precision against recall as the threshold on one label's score goes down; `average` is the average precision."""

    label: str
    recall: np.ndarray
    precision: np.ndarray
    average: float


@dataclass(frozen=True)
class Diagnostics:
    """How a table stands to the truth.

    Attributes:
        source: the labels file.
        metrics: what `evaluate` gives.
        cells: `uri, key, label, score, truth` of up to six images of each cell of the confusion matrix, the surest first.
        curves: of the labels with the most images, up to eight.
        reliability: `score, right, images` of each bin of scores that has images: their mean score, and the share of right
            answers.
    """

    source: str
    metrics: dict[str, Any]
    cells: pd.DataFrame
    curves: tuple[Curve, ...] = ()
    reliability: pd.DataFrame | None = None


def diagnose(runs: Sequence[Run], truth: Labels) -> Diagnostics:
    """Hold a table against the truth; only the rows of labelled images are kept.

    Raises:
        LabelsError: no image of the labels file is in the table.
    """
    rows = labelled_rows(runs, truth)
    metrics = evaluate_rows(runs, truth, rows)
    if gives_many_labels(runs) or not metrics["images"]:
        return Diagnostics(truth.source, metrics, pd.DataFrame(columns=["uri", "key", "label", "score", "truth"]))
    matched = matched_rows(truth, rows)
    surest = matched.sort_values("score", ascending=False, kind="stable").groupby(["truth", "label"], sort=False)
    cells = surest.head(_SHOWN)[["uri", "key", "label", "score", "truth"]].reset_index(drop=True)
    curves = tuple(_curve(str(label), matched) for label in matched["truth"].value_counts().index[:_CURVES])
    return Diagnostics(truth.source, metrics, cells, curves, _reliability(matched))


def _curve(label: str, matched: pd.DataFrame) -> Curve:
    """One label against all others; an image whose top labels do not name it has it with a score of 0."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    pairs = zip(matched["top_labels"], matched["top_scores"], strict=True)
    scores = np.array([next((s for name, s in zip(*pair, strict=True) if name == label), 0.0) for pair in pairs])
    right = (matched["truth"] == label).to_numpy()
    precision, recall, _ = precision_recall_curve(right, scores)
    return Curve(label, recall, precision, float(average_precision_score(right, scores)))


def _reliability(matched: pd.DataFrame) -> pd.DataFrame:
    bins = np.minimum((matched["score"].to_numpy() * _BINS).astype(int), _BINS - 1)
    frame = pd.DataFrame({"score": matched["score"], "right": matched["truth"] == matched["label"], "bin": bins, "images": 1})
    return frame.groupby("bin").agg({"score": "mean", "right": "mean", "images": "sum"}).reset_index(drop=True)
