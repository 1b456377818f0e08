"""Two samples of numbers or counts -> how far their distributions differ; pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Bins of a population stability index. Each holds the same share of the first sample.
_BINS = 10


def stability_index(first: np.ndarray, second: np.ndarray) -> float:
    """Population stability index of two samples of numbers, over bins that each hold a tenth of the first sample.

    The index is the sum of (q - p) ln(q / p) over the bins, where p and q are the shares of the first and the second sample.
    If the first sample has few distinct values, bins with equal edges are merged. If one sample is empty, the index is 0.
    """
    if not len(first) or not len(second):
        return 0.0
    edges = np.unique(np.quantile(first.astype(np.float64), np.linspace(0, 1, _BINS + 1)[1:-1]))
    counts = [
        np.bincount(np.searchsorted(edges, values.astype(np.float64), side="left"), minlength=len(edges) + 1)
        for values in (first, second)
    ]
    return index_of_shares(*(count / max(1, count.sum()) for count in counts))


#: Replaces a share of 0, which would make the index infinite.
_LEAST_SHARE = 1e-4


def stability(first: Sequence[int], second: Sequence[int]) -> tuple[float, float]:
    """Population stability index of two sets of counts, and the probability of such a difference by chance.

    The probability is the p-value of Pearson's chi-square test of homogeneity.

    Args:
        first: a count per bin.
        second: later counts of the same bins.
    """
    from scipy.stats import chi2_contingency

    counts = np.array([first, second], np.float64)
    counts = counts[:, counts.sum(axis=0) > 0]
    totals = counts.sum(axis=1, keepdims=True)
    if counts.shape[1] < 2 or not totals.all():
        return 0.0, 1.0
    return index_of_shares(*(counts / totals)), float(chi2_contingency(counts).pvalue)


def index_of_shares(first: np.ndarray, second: np.ndarray) -> float:
    """Population stability index of two sets of shares p and q: the sum of (q - p) ln(q / p)."""
    p, q = np.maximum(first, _LEAST_SHARE), np.maximum(second, _LEAST_SHARE)
    return float(((q - p) * np.log(q / p)).sum())
