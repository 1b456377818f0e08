"""Stage 5: rows with their outcome -> a staged part, then its receipt.

A part is real when its receipt exists. A task that Ray runs twice stages two parts with the same rows; publishing takes each
row once, so nothing here needs to know.
"""

from __future__ import annotations

import collections
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.util.metrics import Counter

from tlbatch.errors import BooksError
from tlbatch.schema import IMAGES, PART_SUFFIX, RECEIPT_SUFFIX, TABLE, TIMINGS, seal, sha256, to_parquet
from tlbatch.storage import Place


def stage_parts(staged: Sequence[Place], rows: pa.Table) -> None:
    """Stage rows as one part for each run; each has rows among them.

    Args:
        staged: the runs' folders of parts; where there are several, a column `table` says whose a row is.
        rows: of `schema.outcome_schema`; where there are none, nothing is staged.
    """
    if not rows.num_rows:
        return
    if len(staged) == 1:
        stage_part(staged[0], rows)
        return
    for number, place in enumerate(staged):
        own = rows.filter(pc.equal(rows[TABLE], number)).drop_columns([TABLE])
        if number:
            own = own.drop_columns([name for name in own.column_names if name == "features"])
        stage_part(place, own)


def stage_part(staged: Place, rows: pa.Table) -> str:
    """Write rows as one part and then its receipt; returns the part's name.

    The receipt's name carries the counts, so that whoever wants to know how far a run is lists the folder and opens nothing.

    Args:
        staged: the run's folder of parts.
        rows: of `schema.outcome_schema`, at least one.
    """
    began = time.perf_counter()
    rows = rows.sort_by([("row", "ascending"), ("index", "ascending")])
    seconds = {stage: float(pc.sum(rows[f"{stage}_seconds"]).as_py() or 0.0) for stage in TIMINGS}
    numbers, firsts, images = np.unique(rows["row"].to_numpy(), return_index=True, return_counts=True)
    if (rows[IMAGES].to_numpy()[firsts] != images).any():
        raise BooksError("A part was handed some of an object's images and not all; nothing of it is staged.")
    data = to_parquet(rows.drop_columns([IMAGES, *(f"{stage}_seconds" for stage in TIMINGS)]))
    kinds = collections.Counter(kind for kind in rows["kind"].to_pylist() if kind is not None)
    failed = kinds.total()
    name = f"{numbers[0]:012d}-{uuid.uuid4().hex[:12]}"
    staged.join(name + PART_SUFFIX).write(data)
    body: dict[str, Any] = {
        "part": name + PART_SUFFIX,
        "part_sha256": sha256(data),
        "rows": _to_ranges(numbers),
        "images": {str(row): int(count) for row, count in zip(numbers, images, strict=True) if count != 1},
        "predicted": rows.num_rows - failed,
        "failed": failed,
        "failed_by_kind": dict(sorted(kinds.items())),
        "stage_seconds": {**seconds, "write": time.perf_counter() - began},
    }
    staged.join(f"{name}.n{len(numbers)}.p{body['predicted']}.f{failed}{RECEIPT_SUFFIX}").write(seal(body))
    _meter(body)
    return name


@cache
def _counters() -> tuple[Counter, Counter]:
    images = Counter("tlbatch_images", "Images whose outcome is staged", ("outcome", "kind"))
    return images, Counter("tlbatch_stage_seconds", "Seconds in a stage, summed over all workers", ("stage",))


def _meter(receipt: Mapping[str, Any]) -> None:
    """Add a receipt to the counters that Ray gives Prometheus."""
    images, seconds = _counters()
    counted = {("predicted", ""): receipt["predicted"]}
    counted |= {("failed", kind): count for kind, count in receipt["failed_by_kind"].items()}
    for (outcome, kind), count in counted.items():
        if count:
            images.inc(count, {"outcome": outcome, "kind": kind})
    for stage, taken in receipt["stage_seconds"].items():
        if taken > 0:
            seconds.inc(taken, {"stage": stage})


def _to_ranges(numbers: np.ndarray) -> list[list[int]]:
    """Sorted, unique numbers as half-open ranges: [4, 5, 6, 9] -> [[4, 7], [9, 10]]."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(numbers, breaks)]
