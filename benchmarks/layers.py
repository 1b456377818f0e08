"""Measure what a table of ten nights costs, beside a table of one run over the same objects.

    .venv/bin/python benchmarks/layers.py [OBJECTS …]     1,000,000 and 10,000,000 by default

The rows are generated; manifests, files and commands are tlbatch's own. Each of the nine later nights has one object in a
thousand. Every step runs in a process of its own, whose processor time and largest memory are shown. `night` compares a listing
of the same objects, which it holds in memory, with the table, and finds nothing to do; `listing` is that process without the
comparison.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.output.commit import RunInput
from tlbatch.output.diff import StalenessRule, diff_with_table
from tlbatch.output.documents import PublishedFile, ReportDocument
from tlbatch.output.publish import ROWS_PER_FILE, mark_complete, swap_pointer, write_report_document
from tlbatch.output.run import Run, begin_run, read_output, read_pointer
from tlbatch.schema import part_name, sha256, to_parquet
from tlbatch.storage.resolve import resolve

_CHUNK, _NIGHTS, _CHANGED = 65_536, 10, 1_000
_LABELS = [f"label-{number:02d}" for number in range(12)]
_STEPS = ("listing", "night", "verify", "report", "compare", "review")
_MEASURED = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def main() -> None:
    """Print a row for each size and step; with the name of a step, take it in this process."""
    if sys.argv[1:2] and sys.argv[1] in _STEPS:
        _take(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        return
    sizes = [int(word.replace(",", "")) for word in sys.argv[1:]] or [1_000_000, 10_000_000]
    print("| objects | step | one run: CPU s | ten nights: CPU s | times | one run: MiB | ten nights: MiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for objects in sizes:
        with tempfile.TemporaryDirectory() as folder:
            outputs = [f"{folder}/one", f"{folder}/ten"]
            for output, nights in zip(outputs, (1, _NIGHTS), strict=True):
                _publish_table(output, objects, nights)
            for step in _STEPS:
                (one, less), (ten, more) = (_measure(step, output, objects) for output in outputs)
                row = f"| {objects:,} | {step} | {one:.1f} | {ten:.1f} | {ten / one:.2f} | {less:,.0f} | {more:,.0f} |"
                print(row, flush=True)


def _measure(step: str, output: str, objects: int) -> tuple[float, float]:
    """Processor seconds and MiB of a step."""
    words = [sys.executable, "-c", _MEASURED, sys.executable, __file__, step, output, str(objects)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    code, seconds, memory = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{step} ended with {code}")
    return seconds, memory


def _take(step: str, output: str, objects: int) -> None:
    if step in ("listing", "night"):
        listed = pa.concat_tables(
            _objects(np.arange(start, min(objects, start + _CHUNK))) for start in range(0, objects, _CHUNK)
        )
        if step == "night":
            rule = StalenessRule("bundle", "b")
            assert diff_with_table(RunInput(listed, 0, 0.0), read_output(resolve(output)), rule, "redo").nothing_to_do
        return
    from tlbatch.cli import main as tlbatch

    words = {"compare": [str(Path(output).with_name("one")), output], "review": [output, "--to", f"{output}-review"]}
    sys.argv = ["tlbatch", step, *words.get(step, [output])]
    tlbatch()


def _publish_table(url: str, objects: int, nights: int) -> None:
    output = resolve(url)
    for night in range(nights):
        numbers = np.arange(objects) if night == 0 else np.arange(night, objects, _CHANGED)
        rows = pa.concat_tables(_objects(numbers[start : start + _CHUNK]) for start in range(0, len(numbers), _CHUNK))
        facts = {
            "spec": {"images": "/none", "engine": "openvino", "predictions": True, "features": False},
            "bundle": "b",
            "base": "",
            "skipped": 0,
            "list_seconds": 0.0,
        }
        run = begin_run(output, f"night-{night}", rows, facts, began=1e9 + night, on=read_pointer(output))
        report = _publish_files(run, rows, numbers)
        write_report_document(run, report)
        swap_pointer(output, run, report, lambda: None)
        mark_complete(run)


def _publish_files(run: Run, rows: pa.Table, numbers: np.ndarray) -> ReportDocument:
    files: dict[str, PublishedFile] = {}
    labels: Counter[str] = Counter()
    for part, start in enumerate(range(0, rows.num_rows, ROWS_PER_FILE)):
        table = _predictions(rows.slice(start, ROWS_PER_FILE), numbers[start : start + ROWS_PER_FILE], run.run_id)
        labels.update(table["label"].to_pylist())
        tables = {f"predictions/{part_name(part)}": table}
        if not part:
            tables[f"errors/{part_name(part)}"] = schema.ERRORS.empty_table()
        for name, one in tables.items():
            data = to_parquet(one)
            run.location.join(*name.split("/")).write(data)
            files[name] = {"sha256": sha256(data), "rows": one.num_rows, "objects": [start, start + table.num_rows]}
    body: dict[str, Any] = {
        "run_id": run.run_id,
        "output": run.location.url.rpartition("/runs/")[0],
        "objects": rows.num_rows,
        "listed": rows.num_rows,
        "predicted": rows.num_rows,
        "failed": 0,
        "skipped": 0,
        "seconds": 1.0,
        "images_per_second": 1.0,
        "bundle": "b",
        "engine": "openvino",
        "failed_by_kind": {},
        "failed_transient": 0,
        "stage_seconds": {},
        "labels": dict(sorted(labels.items())),
        "manifest_sha256": run.facts["manifest_sha256"],
        "files": files,
    }
    if run.on:
        body["on"] = run.on
    return cast("ReportDocument", body)


def _objects(numbers: np.ndarray) -> pa.Table:
    """Manifest rows of objects, with uris of 76 bytes."""
    keys = [f"folder-{number >> 10:08d}/{number:012d}-picture-of-a-camera.jpg" for number in numbers.tolist()]
    columns = {
        "uri": [f"/a-store-with-some-name/{key}" for key in keys],
        "key": keys,
        "size": np.full(len(keys), 100_000),
        "etag": [f"{number * 2_654_435_761:032x}" for number in numbers.tolist()],
        "format": ["image"] * len(keys),
    }
    return pa.table(columns, schema=schema.MANIFEST_SCHEMA)


def _predictions(rows: pa.Table, numbers: np.ndarray, run_id: str) -> pa.Table:
    """Rows of the predictions table: labels and scores that follow from the object's number."""
    scores = (0.5 + (numbers * 7_919 % 100_003) / 200_006).astype(np.float32)
    labels = [_LABELS[number % 12] for number in (numbers * 31 % 977).tolist()]
    count = len(numbers)
    columns = {
        **{name: rows[name] for name in ("uri", "key", "etag")},
        "index": np.zeros(count, np.int32),
        "label": labels,
        "score": scores,
        "top_labels": [[label] for label in labels],
        "top_scores": [[score] for score in scores],
        "abstained": np.zeros(count, bool),
        "width": np.full(count, 640),
        "height": np.full(count, 480),
        "bundle": ["b"] * count,
        "run_id": [run_id] * count,
    }
    return pa.table({field.name: columns[field.name] for field in schema.PREDICTIONS}, schema=schema.PREDICTIONS)


if __name__ == "__main__":
    main()
