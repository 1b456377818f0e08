"""A table and the one before, read once in pieces -> counts of labels, scores and errors, and a few sample images per label.

Memory is bounded by the number of labels, not by the number of images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.output.publish import count_values
from tlbatch.output.run import Run
from tlbatch.output.table import read_groups_beside
from tlbatch.report.evaluate import gives_many_labels
from tlbatch.report.verdict import Side
from tlbatch.schema import to_frame

#: Reasons for showing an image.
SURE, UNSURE, NEAR = "most certain", "least certain", "near the threshold"
#: Most sample images per label and reason, most examples per kind of error, and bins of scores between 0 and 1.
_SHOWN, _EXAMPLES, _BINS = 6, 5, 20
_COLUMNS = ["uri", "key", "label", "score", "abstained"]
_ERRORS = ["uri", "key", "stage", "kind", "message", "transient"]


@dataclass
class TableSummary:
    """The facts about a table that the report shows.

    Attributes:
        images: number of rows.
        abstained: number of images on which the model abstained.
        labels: images per label; an image with several labels counts once for each.
        scores: (20,) images per bin of scores between 0 and 1.
        shown: `uri, key, label, score, why` of the sample images, up to six per label and reason.
        errors: images per kind of error.
        examples: `uri, key, stage, kind, message, transient` of up to five errors per kind.
    """

    images: int = 0
    abstained: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    shown: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["uri", "key", "label", "score", "why"]))
    errors: Counter[str] = field(default_factory=Counter)
    examples: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=_ERRORS))

    @property
    def edges(self) -> np.ndarray:
        """(21,) edges of the bins of `scores`."""
        return np.linspace(0, 1, _BINS + 1)

    @property
    def side(self) -> Side:
        """The counts that `judge_run` compares with another table."""
        return Side(dict(self.labels), self.scores.tolist(), self.errors.total())

    def add_errors(self, rows: pa.Table) -> None:
        """Count rows of the errors table."""
        if rows.num_rows:
            self.errors.update(count_values(rows["kind"]))
            self.examples = _appended(self.examples, to_frame(rows)).groupby("kind", sort=False).head(_EXAMPLES)

    def add_images(self, rows: pa.Table, *, many: bool) -> None:
        """Count rows of the predictions table, whose images may have many labels."""
        if rows.num_rows:
            self.images += rows.num_rows
            self.abstained += pc.sum(rows["abstained"]).as_py()
            self.labels.update(count_values(pc.list_flatten(rows["top_labels"]) if many else rows["label"]))
            scores = rows["score"].to_numpy().clip(0, 1)  # a rounded softmax can be 1.0000001
            self.scores += np.histogram(scores, self.edges)[0]


def summarize(
    runs: Sequence[Run], earlier: Sequence[Run] = (), *, predictions: bool, threshold: float | None = None
) -> tuple[TableSummary, TableSummary]:
    """Read a table and summarize it, and beside it an earlier table; files that both have are read once.

    Args:
        runs: the runs that form the table, the oldest first.
        earlier: the runs that form the earlier table, of which no sample images are chosen.
        predictions: whether the tables have predictions; they always have errors.
        threshold: score below which the bundle abstains; None if it never abstains.
    """
    both = now, before = TableSummary(), TableSummary()
    for pieces in read_groups_beside(runs, earlier, "errors", _ERRORS):
        for found, piece in zip(both, pieces, strict=True):
            found.add_errors(piece)
    if not predictions:
        return both
    many = [bool(table) and gives_many_labels(table) for table in (runs, earlier)]
    for pieces in read_groups_beside(runs, earlier, "predictions", [*_COLUMNS, *(["top_labels"] if any(many) else [])]):
        now.add_images(pieces[0], many=many[0])
        before.add_images(pieces[1], many=many[1])
        if pieces[0].num_rows:
            now.shown = _sample_images(now.shown, to_frame(pieces[0]), threshold)
    return both


def _sample_images(shown: pd.DataFrame, frame: pd.DataFrame, threshold: float | None) -> pd.DataFrame:
    """The sample images of the rows read so far, updated with further rows."""
    orders = {SURE: -frame["score"], UNSURE: frame["score"]}
    if threshold is not None:
        orders[NEAR] = (frame["score"] - threshold).abs()
    chosen = [shown]
    for why, rank in orders.items():
        more = frame.assign(rank=rank, why=why).drop(columns=["abstained", "top_labels"], errors="ignore")
        so_far = _appended(shown[shown["why"] == why], more).sort_values("rank", kind="stable")
        chosen.append(so_far.groupby("label", sort=False).head(_SHOWN))
    return pd.concat(chosen[1:], ignore_index=True)


def _appended(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Both tables in one. An empty first table is dropped, because pandas would guess the types of its columns."""
    return other if one.empty else pd.concat([one, other], ignore_index=True)
