"""Measure what it costs to bring a Delta and an Iceberg table of a million rows to a changed table.

    .venv/bin/python benchmarks/lakes.py [ROWS]

One row in a hundred is replaced: of one folder, as a camera's or a day's, or anywhere; and as many are added. Bytes are those
of the data files that each change writes, and memory is the peak of the process that does all this for a format.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from tlbatch.commands.sync import Copy
from tlbatch.output.changes import COPIED, Changes

AT_ONCE = 65_536


def main() -> None:
    """Print one table; each format is measured in a process of its own."""
    if sys.argv[1:2] == ["--format"]:
        measure(sys.argv[2], int(sys.argv[3]))
        return
    rows = sys.argv[1] if len(sys.argv) > 1 else "1000000"
    print("| format | change | s | MB written | of the whole, % |\n| --- | --- | ---: | ---: | ---: |", flush=True)
    for name in ("delta", "iceberg"):
        subprocess.run([sys.executable, __file__, "--format", name, rows], check=True)


def measure(name: str, rows: int) -> None:
    """Write a table and change it in three ways."""
    random, few = np.random.default_rng(0), rows // 100
    with tempfile.TemporaryDirectory() as folder:
        copy = opened(name, Path(folder))
        all_bytes = timed(name, "the whole table", Path(folder), 0, lambda: copy.replace(reader_of(rows), ["0"]))
        changes = {
            "1 % of the rows, of one folder": np.arange(rows // 2, rows // 2 + few),
            "1 % new, at the end": np.arange(rows, rows + few),
            "1 % of the rows, anywhere": np.sort(random.choice(rows, few, replace=False)),
        }
        for number, (what, places) in enumerate(changes.items(), 1):
            copy = opened(name, Path(folder))
            table = table_of(places)
            given = Changes(table["uri"].combine_chunks().cast(pa.large_string()), table)
            timed(name, what, Path(folder), all_bytes, partial(copy.change, given, [str(one) for one in range(number + 1)]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {name} | peak memory: {peak:,.0f} MiB | | | |", flush=True)


def timed(name: str, what: str, folder: Path, whole: int, work: Callable[[], object]) -> int:
    """Do a change, and print a row; returns the bytes that it wrote."""
    before = sizes(folder)
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    written = sum(size for path, size in sizes(folder).items() if path not in before)
    print(f"| {name} | {what} | {took:.1f} | {written / 1e6:.1f} | {100 * written / (whole or written):.1f} |", flush=True)
    return written


def sizes(folder: Path) -> dict[Path, int]:
    """The data files and their sizes."""
    return {path: path.stat().st_size for path in folder.rglob("*.parquet")}


def opened(name: str, folder: Path) -> Copy:
    """The copy of a format in a folder."""
    if name == "delta":
        from tlbatch.output.delta import DeltaCopy

        return DeltaCopy(str(folder / "table"), {})
    settings = {"TYPE": "sql", "URI": f"sqlite:///{folder}/catalog.db", "WAREHOUSE": f"file://{folder}/warehouse"}
    os.environ.update({f"PYICEBERG_CATALOG__LAKE__{key}": value for key, value in settings.items()})
    from tlbatch.output.iceberg import IcebergCopy

    return IcebergCopy("lake.photos.predictions")


def reader_of(rows: int) -> pa.RecordBatchReader:
    """The rows of a whole table, a batch at a time."""
    pieces = (table_of(np.arange(start, min(start + AT_ONCE, rows))) for start in range(0, rows, AT_ONCE))
    return pa.RecordBatchReader.from_batches(COPIED, (batch for piece in pieces for batch in piece.to_batches()))


def table_of(places: np.ndarray) -> pa.Table:
    """Rows as a run writes them, of images with these numbers."""
    random = np.random.default_rng(int(places[0]))
    scores = np.sort(random.dirichlet(np.ones(5), len(places)).astype(np.float32), axis=1)[:, ::-1]
    labels = np.array(["crack", "dust", "good", "hot spot", "shade"])[np.argsort(random.random((len(places), 5)))]
    keys = [f"2026/camera-{place // 10_000:04d}/{place:09d}.jpg" for place in places]
    columns = {
        "uri": [f"s3://bucket-of-photographs/images/{key}" for key in keys],
        "key": keys,
        "label": labels[:, 0],
        "score": scores[:, 0],
        "top_labels": labels.tolist(),
        "top_scores": scores.tolist(),
        "abstained": np.zeros(len(places), bool),
        "etag": [f"{place * 2654435761 % 2**128:032x}" for place in places.tolist()],
        "width": np.full(len(places), 500),
        "height": np.full(len(places), 375),
        "bundle": ["b" * 64] * len(places),
        "run_id": ["20261129T020000Z-abcdef"] * len(places),
        "index": np.zeros(len(places), np.int32),
    }
    return pa.table(columns, schema=COPIED)


if __name__ == "__main__":
    main()
