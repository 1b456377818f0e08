"""Manifests, outcome rows and begun runs, built without Ray and without a model."""

from __future__ import annotations

import pyarrow as pa

from tlbatch.output.publish import require_current_base, swap_pointer, write_report_document
from tlbatch.output.run import begin_run
from tlbatch.schema import MANIFEST_SCHEMA, outcome_schema

SPEC = {"images": "/store", "top_k": 5}


def manifest(rows: int) -> pa.Table:
    keys = [f"{number:06d}.jpg" for number in range(rows)]
    return pa.table(
        {
            "uri": [f"/store/{key}" for key in keys],
            "key": keys,
            "size": [1] * rows,
            "etag": ["e"] * rows,
            "format": ["image"] * rows,
        },
        MANIFEST_SCHEMA,
    )


def begin(output, rows=10):
    return begin_run(output, "20260101T000000Z-000000", manifest(rows), {"spec": SPEC, "bundle": "b" * 64, "skipped": 0})


def outcome(rows: list[int], failed: tuple[int, ...] = ()) -> pa.Table:
    wanted = outcome_schema(classified=True, features_length=None, features_dtype="float32")
    columns = {
        "row": rows,
        "index": [0] * len(rows),
        "uri": [f"/store/{row:06d}.jpg" for row in rows],
        "key": [f"{row:06d}.jpg" for row in rows],
        "etag": ["e"] * len(rows),
        "kind": ["empty" if row in failed else None for row in rows],
        "label": [None if row in failed else "cat" for row in rows],
        "score": [None if row in failed else 0.5 for row in rows],
    }
    columns["images"] = [1] * len(rows)
    for name in ("fetch_seconds", "decode_seconds", "predict_seconds"):
        columns[name] = [0.25] * len(rows)
    return pa.table({name: columns.get(name, pa.nulls(len(rows), wanted.field(name).type)) for name in wanted.names}, wanted)


def publish_run(output, run, report: dict, require_lease=lambda: None) -> None:
    """Steps 7 and 8 of the protocol for a run whose files are written, or are not needed by the test."""
    write_report_document(run, report)
    require_current_base(output, run)
    swap_pointer(output, run, report, require_lease)
