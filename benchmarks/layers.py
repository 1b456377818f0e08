"""Measure what a table of ten nights costs, beside a table of one run over the same objects.

    .venv/bin/python benchmarks/layers.py [OBJECTS …] [steps=listing,night] [mib=1024]
    .venv/bin/python benchmarks/layers.py first

By default 1,000,000 and 10,000,000 objects, all steps, and as much memory as there is. The rows are generated; manifests, files
and commands are tlbatch's own. Each of the nine later nights has one object in a thousand. Every step runs in a process of its
own, whose processor time and largest memory are shown, without the pages of files that it maps, which the kernel drops when
memory is short. With `mib` a control group gives the process, its pages of files included, no more memory than that; this needs
the rights of root and version 1 of the groups. `night` compares a listing of the same objects in 16 parts with the table, and
finds nothing to do; `listing` is that process without the comparison, and `shuffled` lists the objects in no order. Two steps
are taken only if they are named: `compact`, of which the workers of Ray are not measured, and which tells how many rows of
staged parts the published files are made from; and `run`, which lists as many objects with uris of 500 bytes, stages made-up
predictions, and publishes them. `first` measures what Ray needs until it processes the first of many objects.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.config import CompactConfig
from tlbatch.errors import TlbatchError
from tlbatch.execution.executor import MOST_BLOCKS, map_file_tasks, run_actors
from tlbatch.execution.resources import ActorPool
from tlbatch.execution.session import ray_session
from tlbatch.execution.sizing import cut_blocks, work_of
from tlbatch.output.commit import Promotion, RunInput, RunSpec, Target, WorkStats, run_to_publication
from tlbatch.output.diff import StalenessRule, diff_with_table
from tlbatch.output.documents import PublishedFile, ReportDocument
from tlbatch.output.parts import stage_parts
from tlbatch.output.publish import ROWS_PER_FILE, WrittenFiles, mark_complete, swap_pointer, write_report_document
from tlbatch.output.receipts import numbered
from tlbatch.output.run import OutputState, Run, begin_run, read_output, read_pointer
from tlbatch.schema import part_name, sha256, to_parquet
from tlbatch.storage.resolve import resolve
from tlbatch.storage.temporary_rows import sorted_table, stored_table

_CHUNK, _NIGHTS, _CHANGED = 65_536, 10, 1_000
_LABELS = [f"label-{number:02d}" for number in range(12)]
_STEPS = ("listing", "shuffled", "night", "verify", "report", "compare", "review")
_LISTINGS = {"listing", "shuffled", "night", "run"}
#: Characters that make uris 500 bytes long, and objects of one staged part.
_LONGER, _PER_PART = "and-longer-" * 38 + "names/", 5_000
#: Folders of a made-up listing, which are listed concurrently, and seconds between two looks at a process's memory.
_FOLDERS, _SECONDS = 16, 0.02
_GROUP = Path("/sys/fs/cgroup/memory/tlbatch-layers")


def main() -> None:
    """Print a row for each size and step; with the name of a step, take it in this process."""
    if sys.argv[1:2] and sys.argv[1] in {*_STEPS, "run", "compact"}:
        _take(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        return
    if sys.argv[1:2] == ["first"]:
        _measure_first(*map(int, sys.argv[2:]))
        return
    given = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
    steps = given["steps"].split(",") if "steps" in given else _STEPS
    sizes = [int(word.replace(",", "")) for word in sys.argv[1:] if "=" not in word] or [1_000_000, 10_000_000]
    print("| objects | step | one run: CPU s | ten nights: CPU s | times | one run: MiB | ten nights: MiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for objects in sizes:
        with tempfile.TemporaryDirectory() as folder:
            outputs = [f"{folder}/one", f"{folder}/ten"]
            for output, nights in zip(outputs, (1, _NIGHTS), strict=True):
                _publish_table(output, objects, nights, whole=bool(set(steps) - _LISTINGS))
            for step in steps:
                (one, less), (ten, more) = (_measure(step, output, objects, given.get("mib")) for output in outputs)
                row = f"| {objects:,} | {step} | {one:.1f} | {ten:.1f} | {ten / one:.2f} | {less:,.0f} | {more:,.0f} |"
                print(row, flush=True)


def _measure(step: str, output: str, objects: int, mib: str | None) -> tuple[float, float]:
    """Processor seconds and MiB of a step."""
    words = [sys.executable, __file__, step, output, str(objects)]
    if mib is not None:
        _GROUP.mkdir(exist_ok=True)
        (_GROUP / "memory.limit_in_bytes").write_text(str(int(mib) << 20))
        words = ["sh", "-c", f'echo $$ > {_GROUP}/cgroup.procs; exec "$@"', "sh", *words]
    most = 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while process.returncode is None:
            most = max(most, _anonymous(process.pid))
            pid, code, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(code)
            time.sleep(_SECONDS)
    if process.returncode:
        raise SystemExit(f"{step} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, most / 1024


def _take(step: str, output: str, objects: int) -> None:
    if step == "run":
        with tempfile.TemporaryDirectory() as folder:
            spec = RunSpec(
                {"images": "/none", "engine": "openvino", "predictions": True, "features": False}, "b", "", True, None
            )
            target = Target(resolve(f"{folder}/output"), spec, _Staging(objects))
            (report,) = run_to_publication([target], "a-run", began=time.monotonic())
            assert report["predicted"] == objects, report
            return
    if step in _LISTINGS:
        listed = sorted_table(_listed(objects, shuffled=step == "shuffled"), schema.MANIFEST_SCHEMA, "key")
        if step == "night":
            rule = StalenessRule("bundle", "b")
            assert diff_with_table(RunInput(listed, 0, 0.0), read_output(resolve(output)), rule, "redo").nothing_to_do
        return
    if step == "compact":
        _compact(output)
        return
    from tlbatch.cli import main as tlbatch

    words = {"compare": [str(Path(output).with_name("one")), output], "review": [output, "--to", f"{output}-review"]}
    sys.argv = ["tlbatch", step, *words.get(step, [output])]
    tlbatch()


def _compact(output: str) -> None:
    """Fold a table, and tell on standard error how many rows of parts its files were made from."""
    from tlbatch.commands.compact import compact

    read = list[int]()

    def counted(*arguments: Any) -> Iterator[WrittenFiles]:
        read.extend(end - start for task in arguments[-1] for part in task.parts.values() for start, end in part["rows"])
        return map_file_tasks(*arguments)

    with mock.patch("tlbatch.commands.compact.map_file_tasks", counted):
        report = compact(CompactConfig(output=output, address="local"))
    print(f"{report['listed']:,} rows; of parts {sum(read):,} rows were read", file=sys.stderr)


def _measure_first(objects: int = 0) -> None:
    """Print a row for 10,000 and 10,000,000 objects, each in a process of its own; with a number, take it in this process."""
    if not objects:
        print("| objects to do | s to the first block | driver: bytes an object | given to Ray: MiB |")
        print("| ---: | ---: | ---: | ---: |")
        for count in (10_000, 1_000_000, 10_000_000) * 2:
            subprocess.run([sys.executable, __file__, "first", str(count)], check=True)
        return
    numbers = range(0, objects, _CHUNK)
    pieces = (_objects(np.arange(start, min(start + _CHUNK, objects))) for start in numbers)
    with tempfile.TemporaryDirectory() as folder, ray_session("local") as start_ray:
        facts = {"spec": {"images": "/none"}, "bundle": "b"}
        run = begin_run(resolve(f"{folder}/output"), "a-run", stored_table(pieces, schema.MANIFEST_SCHEMA), facts)
        manifest = run.manifest
        start_ray()
        told, most = Path(folder, "first"), list[int]()
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_SECONDS):
                most.append(_anonymous(os.getpid()))

        threading.Thread(target=watch).start()
        began, before = time.time(), _anonymous(os.getpid())
        rows = numbered(manifest)
        blocks = cut_blocks(rows, work_of(rows, 500), 500)
        given = (blocks.places() if len(blocks) > MOST_BLOCKS else rows).nbytes
        with contextlib.suppress(TlbatchError):
            run_actors([run], blocks, [(_first_block(), ActorPool(1, 0, 1, 1))], told, lambda _: None)
        ended.set()
        seconds, held = float(told.read_text()) - began, (max(most) - before) * 1024 / objects
        print(f"| {objects:,} | {seconds:.1f} | {held:,.0f} | {given / 2**20:.2f} |", flush=True)


def _first_block() -> type:
    """A worker that tells when it got its first block, and ends the run; made here, since workers cannot import this file."""

    class First:
        def __init__(self, told: Path, **_: bool) -> None:
            self._told = told

        def __call__(self, _block: pa.Table) -> pa.Table:
            self._told.write_text(str(time.time()))
            raise TlbatchError("enough")

    return First


def _anonymous(pid: int) -> int:
    """Memory of a process in KiB, without the pages of files; 0 once it has ended."""
    found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


class _Staging:
    """The work of a run that stages made-up predictions."""

    def __init__(self, objects: int) -> None:
        self._objects = objects

    def plan(self, _state: OutputState) -> RunInput:
        """Every object, with a longer uri."""

        def longer(batch: pa.RecordBatch) -> pa.RecordBatch:
            names = [pc.binary_join_element_wise(start, batch["key"], "") for start in (f"/a-store/{_LONGER}", _LONGER)]
            return pa.RecordBatch.from_arrays([*names, *batch.columns[2:]], schema=schema.MANIFEST_SCHEMA)

        listed = map(longer, _listed(self._objects, shuffled=False))
        return RunInput(sorted_table(listed, schema.MANIFEST_SCHEMA, "key"), 0, 0.0)

    def process(self, runs: Sequence[Run], rows: pa.Table) -> WorkStats:
        """Stage the rows."""
        wanted = schema.outcome_schema(classified=True, features_length=None, features_dtype="float32")
        for start in range(0, rows.num_rows, _PER_PART):
            block = rows.slice(start, _PER_PART)
            known = {
                **{name: block[name] for name in ("row", "uri", "key", "etag")},
                schema.IMAGES: np.ones(len(block), np.int32),
            }
            made = _predictions(block, block["row"].to_numpy(), "a-run").drop_columns(
                ["uri", "key", "etag", "bundle", "run_id"]
            )
            known |= {name: made[name] for name in made.column_names}
            columns = [known.get(field.name, pa.nulls(len(block), field.type)) for field in wanted]
            stage_parts([run.staged for run in runs], pa.table(columns, schema=wanted))
        return WorkStats()

    def promotion_check(self, _run: Run, _report: ReportDocument, _state: OutputState) -> Promotion:
        """Let it through."""
        return Promotion()


def _listed(objects: int, *, shuffled: bool) -> Iterator[pa.RecordBatch]:
    """A listing of all objects, as several folders at once give it; or shuffled."""
    each = -(-objects // _FOLDERS)
    if shuffled:
        step = next(number for number in range(objects * 3 // 5, objects) if math.gcd(number, objects) == 1)
    for start in range(0, each, 8_192):
        for folder in range(_FOLDERS):
            first = folder * each + start
            numbers = np.arange(first, min(first + min(8_192, each - start), objects))
            yield from _objects(numbers * step % objects if shuffled else numbers).to_batches()


def _publish_table(url: str, objects: int, nights: int, *, whole: bool) -> None:
    """Publish the table of some nights; without its predictions if only manifests are read."""
    output = resolve(url)
    for night in range(nights):
        numbers = np.arange(objects) if night == 0 else np.arange(night, objects, _CHANGED)
        pieces = (_objects(numbers[start : start + _CHUNK]) for start in range(0, len(numbers), _CHUNK))
        rows = stored_table(pieces, schema.MANIFEST_SCHEMA)
        facts = {
            "spec": {"images": "/none", "engine": "openvino", "predictions": True, "features": False},
            "bundle": "b",
            "base": "",
            "skipped": 0,
            "list_seconds": 0.0,
        }
        run = begin_run(output, f"night-{night}", rows, facts, began=1e9 + night, on=read_pointer(output))
        report = _publish_files(run, rows if whole else rows.slice(0, 0), numbers)
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
