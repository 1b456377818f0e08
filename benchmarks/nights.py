"""Compare the estimate of `plan` with the run that follows, and time an incremental run with nothing to do.

    .venv/bin/python benchmarks/nights.py [--sizes 500 2000 8000] [--objects 1000000]

Every size is planned and run twice: a first run, whose rates come from a few seconds of work, and an incremental run with as
many new images, whose rates come from the first run if that was large enough. Then a table of ten runs over many objects is
generated, and a listing of the same objects is compared with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from photographs import repeated, run, train

from tlbatch import schema
from tlbatch.output.commit import RunInput
from tlbatch.output.diff import StalenessRule, diff_with_table
from tlbatch.output.documents import ReportDocument
from tlbatch.output.publish import swap_pointer, write_report_document
from tlbatch.output.run import begin_run, read_output, read_pointer
from tlbatch.storage.resolve import resolve


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2_000, 8_000])
    parser.add_argument("--objects", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plans(Path(folder), options.sizes)
        sorting(Path(folder), options.objects)


def plans(root: Path, sizes: list[int]) -> None:
    """Print planned and real seconds of a first run and of the incremental run that follows."""
    bundle = train(root)
    print("| images | night | known from | planned, s | real, s | planned / real |\n| ---: | --- | --- | ---: | ---: | ---: |")
    for size in sizes:
        whole, store = repeated(root, 2 * size), root / "store"
        for night, (first, last) in enumerate(((0, size), (size, 2 * size)), 1):
            store.mkdir(exist_ok=True)
            for path in sorted(whole.iterdir())[first:last]:
                (store / path.name).hardlink_to(path)
            words = ["--images", store, "--bundle", bundle, "--output", root / "table", "--incremental"]
            planned = run("plan", *words)
            began = time.perf_counter()
            report = run("classify", *words)
            took = time.perf_counter() - began
            assert planned["counts"] == report["counts"], (planned["counts"], report["counts"])
            known, ratio = planned["known_from"].split()[0], planned["seconds"] / took
            print(f"| {size:,} | {night} | {known} | {planned['seconds']:.1f} | {took:.1f} | {ratio:.2f} |", flush=True)
        print(json.dumps(run("classify", *words)["seconds"]), "s with nothing to do", file=sys.stderr)
        shutil.rmtree(store)
        shutil.rmtree(root / "table")


def sorting(root: Path, objects: int) -> None:
    """Print the seconds to compare a listing with a table of ten runs."""
    output = resolve(str(root / "many"))
    keys = [f"{number:09d}.jpg" for number in range(objects)]
    listed = listing(keys)
    for night in range(10):
        rows = listed if night == 0 else listed.take(np.arange(night, objects, 100))
        on = read_pointer(output)
        made = begin_run(output, f"night-{night}", rows, {"spec": {}, "bundle": "b", "base": ""}, on=on)
        counts = {"listed": 0, "predicted": 0, "failed": 0, "failed_by_kind": {}, "labels": {}, "files": {}}
        report = cast("ReportDocument", {**counts, "manifest_sha256": made.facts["manifest_sha256"], "failed_transient": 0})
        write_report_document(made, report)
        swap_pointer(output, made, report, lambda: None)
    began = time.perf_counter()
    found = diff_with_table(RunInput(listed, 0, 0.0), read_output(output), StalenessRule("bundle", "b"), "redo")
    took = time.perf_counter() - began
    print(f"\n{objects:,} objects against a table of ten nights: {took:.1f} s; nothing to do: {found.nothing_to_do}")


def listing(keys: list[str]) -> pa.Table:
    """A manifest of the keys, as a listing returns it."""
    columns = {
        "uri": [f"s3://bucket/images/{key}" for key in keys],
        "key": keys,
        "size": np.full(len(keys), 100_000),
        "etag": [f'"{number:032x}"' for number in range(len(keys))],
        "format": ["image"] * len(keys),
    }
    return pa.table(columns, schema=schema.MANIFEST_SCHEMA)


if __name__ == "__main__":
    main()
