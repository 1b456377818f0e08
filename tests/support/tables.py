"""Manifests, outcome rows and begun runs, built without Ray and without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from tlbatch import schema
from tlbatch.output.publish import mark_complete, require_current_base, swap_pointer, write_report_document
from tlbatch.output.run import Run, begin_run, read_pointer
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


def publish_images(
    output,
    name: str,
    images: Mapping[str, Mapping[str, Any]],
    *,
    removed: Sequence[str] = (),
    alone: bool = False,
    features: bool = False,
    rows_per_file: int = 3,
) -> Run:
    """Publish a run of loose images, by their keys, whose columns may be given; an image with a `kind` has failed.

    Args:
        output: where.
        name: the run's name; names sort by time.
        images: by key `etag`, `label`, `score`, `top_scores`, `features` (two numbers) and so on.
        removed: keys of the objects that leave the table.
        alone: whether it replaces the table, instead of adding to it.
        features: whether it has features.
        rows_per_file: rows of the manifest for each file.
    """
    rows = [_image(key, images[key], name) for key in sorted(images)]
    facts = {
        "spec": {"images": "/store", "predictions": True, "features": features, "features_dtype": "float32"},
        "bundle": "b" * 64,
        "base": "base",
        "skipped": 0,
    }
    left = [{"uri": f"/store/{key}", "key": key} for key in removed]
    run = begin_run(
        output,
        name,
        pa.Table.from_pylist(rows, MANIFEST_SCHEMA),
        facts,
        began=float(f"1{name[1:]}"),
        on=() if alone else read_pointer(output),
        removed=pa.Table.from_pylist(left, schema.REMOVED_SCHEMA),
    )
    tables = {"predictions": schema.PREDICTIONS, "errors": schema.ERRORS}
    if features:
        tables["features"] = schema.features_schema(2, "float32")
    files = {}
    for part, start in enumerate(range(0, max(1, len(rows)), rows_per_file)):
        of_file = rows[start : start + rows_per_file]
        for folder, columns in tables.items():
            own = [row for row in of_file if (row["kind"] is not None) == (folder == "errors")]
            data = schema.to_parquet(pa.Table.from_pylist(own, columns))
            run.location.join(folder, schema.part_name(part)).write(data)
            facts_of_file = {"sha256": schema.sha256(data), "rows": len(own), "objects": [start, start + len(of_file)]}
            files[f"{folder}/{schema.part_name(part)}"] = facts_of_file
    failed = sum(row["kind"] is not None for row in rows)
    report = {"run_id": name, "output": output.url, "listed": len(rows), "predicted": len(rows) - failed, "failed": failed}
    report |= {"objects": len(rows), "failed_by_kind": {}, "failed_transient": sum(row["transient"] for row in rows)}
    report |= {"labels": {}, "manifest_sha256": run.facts["manifest_sha256"], "files": files}
    publish_run(output, run, report)
    mark_complete(run)
    return run


def _image(key: str, given: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    score = given.get("score", 0.5)
    image = {"uri": f"/store/{key}", "key": key, "size": 1, "etag": "e", "format": "image", "label": "cat", "score": score}
    image |= {"top_labels": ["cat", "dog"], "top_scores": [score, 1 - score], "abstained": False, "bundle": "b" * 64}
    return {**image, "kind": None, "transient": False, "run_id": run_id, "index": 0, "features": [1.0, 0.0], **given}
