"""Stage 5: rows with their outcome -> a staged part, then its receipt.

A part exists when its receipt exists. A task that Ray runs twice stages two parts with the same rows; publishing takes each row
once, so nothing here needs to know.
"""

from __future__ import annotations

import collections
import json
import time
import uuid
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.errors import CountsError
from tlbatch.output.documents import Receipt
from tlbatch.output.receipts import receipt_name
from tlbatch.schema import IMAGES, PART, PART_SUFFIX, PASSED, TABLE, TIMINGS, seal, sha256, to_parquet
from tlbatch.storage.location import Location


def stage_parts(staged: Sequence[Location], rows: pa.Table) -> list[Receipt]:
    """Stage rows as one part for each run; returns the receipts, of each part one for each run.

    Args:
        staged: the runs' folders of parts. If there are several, a column `table` of the rows says which run a row is for.
        rows: of `schema.outcome_schema`; without rows nothing is staged. With a column `part`, the rows of each of its values
            are staged by themselves.
    """
    if not rows.num_rows:
        return []
    if PART in rows.column_names:
        parts, rows = rows[PART], rows.drop_columns([PART])
        return [receipt for part in pc.unique(parts) for receipt in stage_parts(staged, rows.filter(pc.equal(parts, part)))]
    if len(staged) == 1:
        return [stage_part(staged[0], rows)]
    receipts = []
    for number, location in enumerate(staged):
        own = rows.filter(pc.equal(rows[TABLE], number)).drop_columns([TABLE])
        if number:
            own = own.drop_columns([name for name in own.column_names if name == "features"])
        receipts.append(stage_part(location, own))
    return receipts


def stage_part(staged: Location, rows: pa.Table) -> Receipt:
    """Write rows as one part, then its receipt; returns the receipt.

    Args:
        staged: the run's folder of parts.
        rows: of `schema.outcome_schema`, at least one.
    """
    began = time.perf_counter()
    rows = rows.sort_by([("row", "ascending"), ("index", "ascending")])
    seconds = {stage: float(pc.sum(rows[f"{stage}_seconds"]).as_py() or 0.0) for stage in TIMINGS}
    numbers, firsts, images = np.unique(rows["row"].to_numpy(), return_index=True, return_counts=True)
    if (rows[IMAGES].to_numpy()[firsts] != images).any():
        raise CountsError("A part got some images of an object and not all of them; it is not staged.")
    passed = {str(rows["row"][at].as_py()): json.loads(rows[PASSED][at].as_py()) for at in _given(rows[PASSED])}
    data = to_parquet(rows.drop_columns([IMAGES, PASSED, *(f"{stage}_seconds" for stage in TIMINGS)]))
    kinds = collections.Counter(kind for kind in rows["kind"].to_pylist() if kind is not None)
    failed = kinds.total()
    name = f"{numbers[0]:012d}-{uuid.uuid4().hex[:12]}"
    staged.join(name + PART_SUFFIX).write(data)
    receipt: Receipt = {
        "part": name + PART_SUFFIX,
        "part_sha256": sha256(data),
        "rows": _to_ranges(numbers),
        "images": {str(row): int(count) for row, count in zip(numbers, images, strict=True) if count != 1},
        "predicted": rows.num_rows - failed,
        "failed": failed,
        "failed_by_kind": dict(sorted(kinds.items())),
        "stage_seconds": {**seconds, "write": time.perf_counter() - began},
    }
    if passed:
        receipt["passed"] = passed
    staged.join(receipt_name(receipt)).write(seal(receipt))
    return receipt


def _given(column: pa.ChunkedArray) -> list[int]:
    """The numbers of the rows that are not null."""
    found: list[int] = np.flatnonzero(pc.is_valid(column).to_numpy()).tolist()
    return found


def _to_ranges(numbers: np.ndarray) -> list[list[int]]:
    """Sorted, unique numbers as half-open ranges: [4, 5, 6, 9] -> [[4, 7], [9, 10]]."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(numbers, breaks)]
