"""Population stability indices: the numbers, and how little they hold."""

import tracemalloc

import numpy as np

from tlbatch.report.drift import stability_index


def test_the_index_of_many_numbers_is_that_of_all_at_once_and_holds_one_copy_of_them():
    random = np.random.default_rng(1)
    first, second = random.random(3_000_000).astype(np.float32), random.random(2_500_000).astype(np.float32) ** 2
    tracemalloc.start()
    found = stability_index(first, second)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    edges = np.quantile(first.astype(np.float64), np.linspace(0, 1, 11)[1:-1])
    p, q = (np.bincount(np.searchsorted(edges, values.astype(np.float64))) / len(values) for values in (first, second))
    assert found == float(((q - p) * np.log(q / p)).sum())
    assert most < 12 * len(first)
