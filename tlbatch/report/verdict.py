"""The counts of a run and of the previous run -> a verdict: whether to trust the run, and what is unusual; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tlbatch.report.drift import stability

#: Labels or scores have shifted if the population stability index is above the first number (Siddiqi, "Credit Risk
#: Scorecards", 2006) and chance alone would cause such a shift in fewer than one run in a hundred. With few images, an index
#: above 0.1 is often chance.
_SHIFTED, _CHANCE = 0.1, 0.01
#: A larger share of failed images is reported as unusual; equal to the default of `max_failed_ratio`.
_FAILED = 0.01

GOOD, DOUBTFUL, BAD = "good", "doubtful", "bad"


@dataclass(frozen=True)
class Side:
    """The counts of one table: images per label, images per score bin, and failed images."""

    labels: Mapping[str, int] = field(default_factory=dict)
    scores: Sequence[int] = ()
    failed: int = 0

    @property
    def predicted(self) -> int:
        """Images with a label. An image with several labels counts once for each."""
        return sum(self.labels.values())


class Verdict(NamedTuple):
    """`tone` is good, doubtful or bad; `sentence` gives the reason; `odd` has one sentence per unusual finding."""

    tone: str
    sentence: str
    odd: tuple[str, ...]


def judge_run(report: Mapping[str, Any], now: Side, before: Side | None) -> Verdict:
    """Decide whether a run can be trusted.

    Args:
        report: the content of its `report.json`.
        now: the counts of its table.
        before: the counts of the previous table; None if there was none.
    """
    listed, failed = report["listed"], report["failed"]
    counts = f"{listed:,} listed = {report['predicted']:,} predicted + {failed:,} failed"
    odd = _odd(now, before) if before is not None else []
    table = report.get("table", report)
    if report.get("failed_new", failed) and table["failed"] > _FAILED * table["listed"]:
        odd.insert(0, f"{table['failed'] / table['listed']:.1%} of the images failed (the errors table has the reasons)")
    if report.get("unreadable"):
        odd.append(f"folders that could not be opened are missing: {', '.join(report['unreadable'])}")
    if report.get("kept_back"):
        return Verdict(BAD, f"Complete, but not published: {'; '.join(report['kept_back'])}.", tuple(odd))
    if not odd:
        compared = "nothing unusual compared with the previous run" if before is not None else "there is no previous run"
        return Verdict(GOOD, f"Complete: {counts}; {compared}.", ())
    return Verdict(DOUBTFUL, f"Complete: {counts}; but {_joined(odd)}.", tuple(odd))


def _odd(now: Side, before: Side) -> list[str]:
    found = []
    if now.predicted and before.predicted:
        labels = sorted({*now.labels, *before.labels})
        counts = [[side.labels.get(label, 0) for label in labels] for side in (before, now)]
        if _shifted(*counts):
            found.append(_most_shifted_label(labels, *counts))
        if _shifted(before.scores, now.scores):
            found.append("the distribution of scores differs from the previous run")
    chance = stability([before.predicted, before.failed], [now.predicted, now.failed])[1]
    if chance < _CHANCE and now.failed * before.predicted > 2 * before.failed * now.predicted:
        found.append(f"{now.failed:,} images failed, compared with {before.failed:,} in the previous run")
    return found


def _shifted(first: Sequence[int], second: Sequence[int]) -> bool:
    index, chance = stability(first, second)
    return index > _SHIFTED and chance < _CHANCE


def _most_shifted_label(labels: Sequence[str], before: Sequence[int], now: Sequence[int]) -> str:
    shares = np.array([before, now], np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    most = int(np.abs(shares[1] - shares[0]).argmax())
    return f"the labels have shifted: {labels[most]} was {shares[0, most]:.1%} of the images and is now {shares[1, most]:.1%}"


def _joined(sentences: Sequence[str]) -> str:
    return sentences[0] if len(sentences) == 1 else "; ".join(sentences[:-1]) + "; and " + sentences[-1]
