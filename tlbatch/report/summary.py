"""A table, read once in pieces -> how often each label and score, and the few images of each label worth a look.

However many images a table has, what is kept is bounded by the number of labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from tlbatch.output.publish import count_values
from tlbatch.output.run import Run
from tlbatch.output.table import read_groups
from tlbatch.report.evaluate import gives_many_labels
from tlbatch.report.verdict import Side

#: Why an image is shown.
SURE, UNSURE, NEAR = "most certain", "least certain", "near the threshold"
#: Images of a label for each reason, examples of a kind of error, and bins of scores between 0 and 1.
_SHOWN, _EXAMPLES, _BINS = 6, 5, 20
_COLUMNS = ["uri", "key", "label", "score", "abstained"]
_ERRORS = ["uri", "key", "stage", "kind", "message", "transient"]


@dataclass
class TableSummary:
    """What a page tells of a table.

    Attributes:
        images: rows of the table.
        abstained: those the model would not answer.
        labels: images a label; an image of several labels counts for each.
        scores: (20,) images by score, between 0 and 1.
        shown: `uri, key, label, score, why` of the images worth a look, up to six of each label and reason.
        errors: images by kind of error.
        examples: `uri, key, stage, kind, message, transient` of up to five of each kind.
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
        """(21,) limits of the bins of `scores`."""
        return np.linspace(0, 1, _BINS + 1)

    @property
    def side(self) -> Side:
        """What is compared with another table."""
        return Side(dict(self.labels), self.scores.tolist(), self.errors.total())


def summarize(runs: Sequence[Run], *, predictions: bool, threshold: float | None = None, pictures: bool = True) -> TableSummary:
    """Read a table.

    Args:
        runs: those that make it up, the oldest first.
        predictions: whether it has predictions; errors it always has.
        threshold: below it the bundle abstains.
        pictures: whether images to look at are chosen.
    """
    found = TableSummary()
    for piece in read_groups(runs, "errors", _ERRORS):
        found.errors.update(count_values(piece["kind"]))
        found.examples = _some(found.examples, piece.to_pandas()).groupby("kind", sort=False).head(_EXAMPLES)
    if not predictions:
        return found
    many = gives_many_labels(runs)
    for piece in read_groups(runs, "predictions", [*_COLUMNS, *(["top_labels"] if many else [])]):
        frame = piece.to_pandas()
        found.images += len(frame)
        found.abstained += int(frame["abstained"].sum())
        found.labels.update(count_values(piece["label"] if not many else pc.list_flatten(piece["top_labels"])))
        found.scores += np.histogram(frame["score"].clip(0, 1), found.edges)[0]  # rounding leaves a softmax at 1.0000001
        if pictures:
            found.shown = _worth_a_look(found.shown, frame, threshold)
    return found


def _worth_a_look(shown: pd.DataFrame, frame: pd.DataFrame, threshold: float | None) -> pd.DataFrame:
    """The images worth a look so far, given some more."""
    orders = {SURE: -frame["score"], UNSURE: frame["score"]}
    if threshold is not None:
        orders[NEAR] = (frame["score"] - threshold).abs()
    chosen = [shown]
    for why, rank in orders.items():
        more = frame.assign(rank=rank, why=why).drop(columns=["abstained", "top_labels"], errors="ignore")
        so_far = _some(shown[shown["why"] == why], more).sort_values("rank", kind="stable")
        chosen.append(so_far.groupby("label", sort=False).head(_SHOWN))
    return pd.concat(chosen[1:], ignore_index=True)


def _some(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Two tables below each other; pandas will not be asked to guess the types of an empty one."""
    return other if one.empty else pd.concat([one, other], ignore_index=True)
