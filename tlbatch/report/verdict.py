"""What a run and the one before it counted -> one sentence on whether to trust it, and what is unusual; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tlbatch.report.drift import stability

#: From this population stability index on labels or scores have moved (Siddiqi, "Credit Risk Scorecards", 2006), unless chance
#: moves as much more often than once in a hundred nights, which among few images it does.
_MOVED, _CHANCE = 0.1, 0.01
#: More failed images than this share are worth a word, as `max_failed_ratio` has it by default.
_FAILED = 0.01

GOOD, DOUBTFUL, BAD = "good", "doubtful", "bad"


@dataclass(frozen=True)
class Side:
    """What one table counted: images a label, images by score, and how many failed."""

    labels: Mapping[str, int] = field(default_factory=dict)
    scores: Sequence[int] = ()
    failed: int = 0

    @property
    def predicted(self) -> int:
        """Images with a label."""
        return sum(self.labels.values())


class Verdict(NamedTuple):
    """`tone` is good, doubtful or bad; `sentence` says why; `odd` has a sentence for each thing that is."""

    tone: str
    sentence: str
    odd: tuple[str, ...]


def judge_run(report: Mapping[str, Any], now: Side, before: Side | None) -> Verdict:
    """Whether a run is to be trusted.

    Args:
        report: what its `report.json` says.
        now: its table.
        before: the table before it; None where there was none.
    """
    listed, failed = report["listed"], report["failed"]
    books = f"{listed:,} listed = {report['predicted']:,} predicted + {failed:,} failed"
    odd = _odd(now, before) if before is not None else []
    many = failed > _FAILED * listed
    if many:
        odd.insert(0, f"{failed / listed:.1%} of the images failed: see below why")
    if report.get("kept_back"):
        return Verdict(BAD, f"Complete, and not published: {'; '.join(report['kept_back'])}.", tuple(odd))
    if not odd:
        compared = "nothing odd against the run before" if before is not None else "there is no run before to compare with"
        return Verdict(GOOD, f"Complete: {books}; {compared}.", ())
    return Verdict(DOUBTFUL, f"Complete: {books}; but {_joined(odd)}.", tuple(odd))


def _odd(now: Side, before: Side) -> list[str]:
    found = []
    if now.predicted and before.predicted:
        labels = sorted({*now.labels, *before.labels})
        counts = [[side.labels.get(label, 0) for label in labels] for side in (before, now)]
        if _moved(*counts):
            found.append(_label_that_moved_most(labels, *counts))
        if _moved(before.scores, now.scores):
            found.append("the scores are distributed otherwise than in the run before")
    chance = stability([before.predicted, before.failed], [now.predicted, now.failed])[1]
    if chance < _CHANCE and now.failed * before.predicted > 2 * before.failed * now.predicted:
        found.append(f"{now.failed:,} images failed and {before.failed:,} in the run before")
    return found


def _moved(first: Sequence[int], second: Sequence[int]) -> bool:
    index, chance = stability(first, second)
    return index > _MOVED and chance < _CHANCE


def _label_that_moved_most(labels: Sequence[str], before: Sequence[int], now: Sequence[int]) -> str:
    shares = np.array([before, now], np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    most = int(np.abs(shares[1] - shares[0]).argmax())
    return f"the labels have moved: {labels[most]} was {shares[0, most]:.1%} of the images and is {shares[1, most]:.1%}"


def _joined(sentences: Sequence[str]) -> str:
    return sentences[0] if len(sentences) == 1 else "; ".join(sentences[:-1]) + "; and " + sentences[-1]
