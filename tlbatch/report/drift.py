"""How far numbers or shares have moved between two samples; pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Bins of a population stability index, cut where the first run has as many images in each.
_BINS = 10


def stability_index(first: np.ndarray, second: np.ndarray) -> float:
    """Population stability index of two samples of numbers, over bins with a tenth of the first sample each.

    Sum of (q - p) ln(q / p) over the bins, p and q being the shares of the first and the second sample. Where the first
    sample has few values, bins that would be cut at the same value are one.
    Without a number on one side there is nothing to tell, and the index is 0.
    """
    if not len(first) or not len(second):
        return 0.0
    edges = np.unique(np.quantile(first.astype(np.float64), np.linspace(0, 1, _BINS + 1)[1:-1]))
    counts = [
        np.bincount(np.searchsorted(edges, values.astype(np.float64), side="left"), minlength=len(edges) + 1)
        for values in (first, second)
    ]
    return index_of_shares(*(count / max(1, count.sum()) for count in counts))


#: A share of no image counts as this, or the index would be infinite.
_LEAST_SHARE = 1e-4


def stability(first: Sequence[int], second: Sequence[int]) -> tuple[float, float]:
    """How far counts have moved: their population stability index, and how probable as much would be by chance.

    The probability is that of Pearson's chi-square test of homogeneity.

    Args:
        first: a count for each bin.
        second: the same bins, counted later.
    """
    from scipy.stats import chi2_contingency

    counts = np.array([first, second], np.float64)
    counts = counts[:, counts.sum(axis=0) > 0]
    totals = counts.sum(axis=1, keepdims=True)
    if counts.shape[1] < 2 or not totals.all():
        return 0.0, 1.0
    return index_of_shares(*(counts / totals)), float(chi2_contingency(counts).pvalue)


def index_of_shares(first: np.ndarray, second: np.ndarray) -> float:
    """Population stability index of shares p and q: the sum of (q - p) ln(q / p)."""
    p, q = np.maximum(first, _LEAST_SHARE), np.maximum(second, _LEAST_SHARE)
    return float(((q - p) * np.log(q / p)).sum())
