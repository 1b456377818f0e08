"""Any number of rows -> batches of one fixed shape, and the outputs of the batches -> one array.

Because a batch has one shape, nothing is compiled twice, and an image's scores depend neither on its neighbors nor on their
number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

#: Rows of features in a batch of a head alone.
HEAD_BATCH = 16


class Outputs(NamedTuple):
    """float32 features (n, F), and scores (n, C); the scores are None if the bundle has no head."""

    features: np.ndarray
    scores: np.ndarray | None


def in_fixed_batches(infer: Callable[[np.ndarray], list[np.ndarray]], rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Call `infer` on batches of exactly `size`, the last one padded, and join the outputs."""
    outputs = [infer(batch) for batch in fixed_batches(rows, size)]
    return joined(outputs, len(rows))


def fixed_batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of exactly `size`, at least one, the last one padded with zeros."""
    for start in range(0, max(1, len(rows)), size):
        batch = rows[start : start + size]
        if len(batch) < size:
            batch = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), rows.dtype)])
        yield np.ascontiguousarray(batch)


def joined(outputs: list[list[np.ndarray]], rows: int) -> list[np.ndarray]:
    """The outputs of all batches, without those of the padding."""
    return [np.concatenate(arrays)[:rows] for arrays in zip(*outputs, strict=True)]


def outputs_of(arrays: list[np.ndarray]) -> Outputs:
    """Features and, if there are any, scores."""
    return Outputs(arrays[0], arrays[1] if len(arrays) > 1 else None)
