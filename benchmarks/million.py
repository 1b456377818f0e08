"""Measure the time and memory of commands that read the folder of a finished run, for growing runs.

    .venv/bin/python benchmarks/million.py [ROWS …]     1,000,000 and 3,000,000 by default

The rows are generated, with twelve labels; manifest, parts, receipts, published files and commands are tlbatch's own. The
images are links to two hundred photographs, and `report` shows a few hundred of them. The store is a list of addresses, so the
seconds do not include a listing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from generated import publish_generated
from photographs import repeated
from PIL import Image

from tlbatch import schema
from tlbatch.commands.classify import OutputTable
from tlbatch.config import RunConfig
from tlbatch.model.bundle import load_bundle
from tlbatch.output.parts import stage_part
from tlbatch.output.run import Run

TLBATCH = str(Path(sys.executable).parent / "tlbatch")
ROWS_PER_PART = 512
_LABELS = [f"label-{number:02d}" for number in range(12)]


def main() -> None:
    """Make an output of each size and time the commands on it."""
    sizes = [int(word.replace(",", "")) for word in sys.argv[1:]] or [1_000_000, 3_000_000]
    with tempfile.TemporaryDirectory() as folder:
        bundle = _bundle(Path(folder))
        print("| rows | command | seconds | peak memory, MiB |\n| ---: | --- | ---: | ---: |")
        for rows in sizes:
            _measure(Path(folder, str(rows)), bundle, rows)


def _bundle(folder: Path) -> str:
    """A real bundle whose base has random weights."""
    for label, color in (("dark", 40), ("light", 220)):
        (folder / "few" / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (96, 96), (color, color, color + number)).save(folder / "few" / label / f"{number}.png")
    bundle = str(folder / "bundle")
    few = ["--images", str(folder / "few"), "--weights", "random", "--size", "96", "--set", "epochs=1"]
    _run(["train", *few, "--bundle", bundle])
    return bundle


def _measure(folder: Path, bundle: str, rows: int) -> None:
    folder.mkdir()
    store = folder / "store.csv"
    images = sorted(os.listdir(repeated(folder, rows)))
    store.write_text("uri\n" + "".join(f"{folder}/store-{rows}/{name}\n" for name in images))
    labels = folder / "labels.csv"
    truth = (f"{folder}/store-{rows}/{name},{_LABELS[number * number % 12]}\n" for number, name in enumerate(images[::100]))
    labels.write_text("uri,label\n" + "".join(truth))
    output = folder / "out"
    config = RunConfig(images=str(store), bundle=bundle, output=str(output))
    table = OutputTable.of(config, load_bundle(bundle))
    began = time.monotonic()
    publish_generated(table, _stage)
    print(f"| {rows:,} | (staged and published here) | {time.monotonic() - began:.1f} | |", flush=True)
    same = ["classify", "--images", str(store), "--bundle", bundle, "--output", str(output)]
    telling = ["report", str(output), "--labels", str(labels)]
    commands = {"classify again": same, "status": ["status", str(output)], "verify": ["verify", str(output)], "report": telling}
    for name, words in commands.items():
        seconds, memory = _run(words)
        print(f"| {rows:,} | {name} | {seconds:.1f} | {memory:,.0f} |", flush=True)
    (page,) = output.glob("runs/*/report.html")
    print(f"| {rows:,} | (report.html: {page.stat().st_size / 1e6:.2f} MB) | | |", flush=True)


def _stage(runs: Sequence[Run], left: pa.Table) -> None:
    """Write parts and receipts as actors do."""
    random = np.random.default_rng(0)
    wanted = schema.outcome_schema(classified=True, features_length=None, features_dtype="float32")
    for start in range(0, left.num_rows, ROWS_PER_PART):
        rows = left.slice(start, ROWS_PER_PART)
        count = rows.num_rows
        first = random.random(count) / 2 + 0.5
        labels = [_LABELS[number] for number in random.integers(0, 12, count)]
        columns = {
            schema.IMAGES: [1] * count,
            **{name: rows[name] for name in ("row", "uri", "etag", "key")},
            "index": [0] * count,
            "label": labels,
            "score": first,
            "top_labels": [[label, "other"] for label in labels],
            "top_scores": [[score, 1 - score] for score in first],
            "abstained": [False] * count,
            "width": [640] * count,
            "height": [480] * count,
            **{name: [0.001] * count for name in ("fetch_seconds", "decode_seconds", "predict_seconds")},
        }
        filled = {field.name: columns.get(field.name, pa.nulls(count, field.type)) for field in wanted}
        stage_part(runs[0].staged, pa.table(filled, schema=wanted))


#: A small process in between, because the peak memory of a process includes that of the process it was forked from.
_MEASURED = """
import json, resource, subprocess, sys, time
began = time.monotonic()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(json.dumps([code, time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
"""


def _run(words: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a command; with several processes, the largest peak."""
    done = subprocess.run([sys.executable, "-c", _MEASURED, TLBATCH, *words], stdout=subprocess.PIPE, text=True, check=True)
    code, seconds, memory = json.loads(done.stdout)
    if code:
        raise SystemExit(f"tlbatch {words[0]} ended with {code}")
    return seconds, memory


if __name__ == "__main__":
    main()
