"""Two samples of numbers or counts -> how far their distributions differ; pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Bins of a population stability index. Each holds the same share of the first sample.
_BINS = 10
#: Numbers of a sample that are counted at a time.
_AT_ONCE = 1 << 20


def stability_index(first: np.ndarray, second: np.ndarray) -> float:
    """Population stability index of two samples of numbers, over bins that each hold a tenth of the first sample.

    The index is the sum of (q - p) ln(q / p) over the bins, where p and q are the shares of the first and the second sample.
    If the first sample has few distinct values, bins with equal edges are merged. If one sample is empty, the index is 0.
    """
    if not len(first) or not len(second):
        return 0.0
    inner = np.linspace(0, 1, _BINS + 1)[1:-1]
    edges = np.unique(np.quantile(first.astype(np.float64), inner, overwrite_input=True))
    counts = [_count(values, edges) for values in (first, second)]
    return index_of_shares(*(count / max(1, count.sum()) for count in counts))


def _count(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(edges + 1,) int: how many numbers are in each bin; the upper edge belongs to a bin."""
    counts = np.zeros(len(edges) + 1, np.int64)
    for start in range(0, len(values), _AT_ONCE):
        some = values[start : start + _AT_ONCE].astype(np.float64)
        counts += np.bincount(np.searchsorted(edges, some, side="left"), minlength=len(counts))
    return counts


#: Replaces a share of 0, which would make the index infinite.
_LEAST_SHARE = 1e-4


def stability(first: Sequence[int], second: Sequence[int]) -> tuple[float, float]:
    """Population stability index of two sets of counts, and the probability of such a difference by chance.

    The probability is the p-value of Pearson's chi-square test of homogeneity, for two bins with Yates's correction.

    Args:
        first: a count per bin.
        second: later counts of the same bins.
    """
    from scipy.special import chdtrc  # `scipy.stats` takes two seconds to import

    counts = np.array([first, second], np.float64)
    counts = counts[:, counts.sum(axis=0) > 0]
    totals = counts.sum(axis=1, keepdims=True)
    if counts.shape[1] < 2 or not totals.all():
        return 0.0, 1.0
    expected = totals * counts.sum(axis=0) / counts.sum()
    off = np.abs(counts - expected)
    if counts.shape[1] == 2:
        off -= np.minimum(0.5, off)
    return index_of_shares(*(counts / totals)), float(chdtrc(counts.shape[1] - 1, (off**2 / expected).sum()))


def index_of_shares(first: np.ndarray, second: np.ndarray) -> float:
    """Population stability index of two sets of shares p and q: the sum of (q - p) ln(q / p)."""
    p, q = np.maximum(first, _LEAST_SHARE), np.maximum(second, _LEAST_SHARE)
    return float(((q - p) * np.log(q / p)).sum())
