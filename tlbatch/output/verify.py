"""An output folder -> the differences between what it records and what its files contain; everything is computed again.

A table is compared with its manifest one file at a time, and the manifest is read at the same pace, so memory use does not grow
with the number of images.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import CountsError
from tlbatch.output.publish import count_values, counts_digest
from tlbatch.output.receipts import read_receipts
from tlbatch.output.run import Pointer, Run, read_output, read_report, require_runs
from tlbatch.output.snapshot import SnapshotRun, snapshot
from tlbatch.output.table import FileRange, file_ranges
from tlbatch.schema import IMAGE, from_parquet, sha256

#: The most differences that `verify` names. It counts all of them.
MOST_DIFFERENCES = 20


def verify(output: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Recompute counts, identities and digests of every run of an output.

    Returns:
        `ok`; `output`; `runs`, the number of runs in the output; `listed`, `predicted` and `failed` of the published table;
        `differences`, at most `MOST_DIFFERENCES` sentences; and `differences_in_all`, their total number.

    Raises:
        OutputError: there is no output.
    """
    location = require_runs(output, storage_options)
    differences: list[str] = []
    totals = {"listed": 0, "predicted": 0, "failed": 0}
    state = read_output(location)
    entries = {entry["run_id"]: entry for entry in state.pointer}
    differences += [f"{schema.LATEST} names run {name}, which does not exist" for name in entries if name not in state.by_id]
    for run in state.runs:
        if run.run_id not in entries:
            differences += _check_unpublished(run)
    table = [state.by_id[name] for name in entries if name in state.by_id]
    differences += _check_order(table, list(entries.values()))
    try:
        for one in snapshot(table):
            counts, wrong = _check_published(one, entries[one.run.run_id]["books_sha256"])
            differences += wrong
            totals = {name: totals[name] + counts[name] for name in totals}
    except (CountsError, FileNotFoundError) as error:
        differences.append(str(error))
    return {
        "ok": not differences,
        "output": location.url,
        "runs": len(state.runs),
        **totals,
        "differences": differences[:MOST_DIFFERENCES],
        "differences_in_all": len(differences),
    }


def _check_order(table: list[Run], entries: Pointer) -> list[str]:
    """Check that each run adds to exactly the runs before it in the pointer."""
    return [
        f"{run.run_id}: adds to runs other than those before it in {schema.LATEST}"
        for number, run in enumerate(table)
        if run.on != entries[:number]
    ]


def _check_unpublished(run: Run) -> list[str]:
    """Check a run that is not part of the table: its manifest and the parts that are still staged."""
    if run.finished() or not run.has_manifest():
        return []
    wrong = []
    try:
        _ = run.manifest
    except (CountsError, OSError, pa.ArrowInvalid) as error:
        wrong.append(f"{run.run_id}: {error}")
    receipts = read_receipts(run, each=True)
    wrong += [f"{run.run_id}/{schema.STAGED}/{name}: is damaged" for name in receipts.broken]
    for body in receipts.bodies:
        with contextlib.suppress(FileNotFoundError):  # the run has just published and removed its parts
            if sha256(run.staged.join(body["part"]).read()) != body["part_sha256"]:
                wrong.append(f"{run.run_id}/{schema.STAGED}/{body['part']}: differs from its receipt")
    return wrong


def _check_published(one: SnapshotRun, books_sha256: str) -> tuple[dict[str, int], list[str]]:
    """The counts that a run adds to the table, and its differences. The rows of one file are in memory at a time."""
    run = one.run
    nothing = {"listed": 0, "predicted": 0, "failed": 0}
    try:
        report = read_report(run)
    except FileNotFoundError:
        return nothing, [f"{run.run_id}/{schema.REPORT}: missing"]
    except CountsError as error:
        return nothing, [str(error)]
    if counts_digest(report) != books_sha256:
        return nothing, [f"{run.run_id}/{schema.REPORT}: differs from the sha256 in {schema.LATEST}"]
    manifest = _Manifest(run)
    if manifest.damage:
        return nothing, [f"{run.run_id}/{schema.MANIFEST}: {manifest.damage}"]
    wrong = [f"{run.run_id}/{name}: is not in the report" for name in _unexpected(run, report)]
    found = _FileCounts(one)
    for files in file_ranges(report["files"]):
        wrong += [f"{run.run_id}/{damage}" for damage in _check_range(run, manifest, files, found)]
    if manifest.rest():
        wrong.append(f"{run.run_id}: the manifest has rows that no file of the tables covers")
    recorded = cast("Mapping[str, Any]", report)
    for name, counted in found.counts().items():
        if not wrong and counted != recorded[name]:
            wrong.append(f"{run.run_id}: {name} is {recorded[name]} in the report and {counted} in the files")
    return found.current, wrong


@dataclass
class _FileCounts:
    """Counts of a run's tables, summed file by file. `current` counts only rows that no newer run has superseded."""

    snapshot_run: SnapshotRun
    current: dict[str, int] = field(default_factory=lambda: {"listed": 0, "predicted": 0, "failed": 0})
    predicted: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, table: pa.Table) -> None:
        """Count one file."""
        current = self.snapshot_run.current_rows(table).num_rows
        self.current["listed"] += current
        self.current["failed" if name.startswith("errors/") else "predicted"] += current
        if name.startswith("errors/"):
            self.kinds += count_values(table["kind"])
            return
        self.predicted += table.num_rows
        if "label" in table.column_names:
            self.labels += count_values(table["label"])

    def counts(self) -> dict[str, Any]:
        """The numbers that the report also has, under the same names."""
        failed = self.kinds.total()
        return {
            "listed": self.predicted + failed,
            "predicted": self.predicted,
            "failed": failed,
            "failed_by_kind": dict(sorted(self.kinds.items())),
            "labels": dict(sorted(self.labels.items())),
        }


class _Manifest:
    """The rows of a run's manifest in order, read in batches. `damage` says what is wrong with it; empty if it is intact."""

    def __init__(self, run: Run) -> None:
        self.damage = ""
        self._left = pa.table({name: pa.array([], pa.string()) for name in ("uri", "key", "format")})
        self._pieces = run.manifest_pieces(self._left.column_names)
        try:
            self._left = next(self._pieces)
        except FileNotFoundError:
            self.damage = "missing"
        except CountsError:
            self.damage = "differs from its recorded sha256"

    def take(self, rows: int) -> pa.Table:
        """The next rows; fewer at the end of the manifest."""
        while self._left.num_rows < rows:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._left = pa.concat_tables([self._left, piece])
        taken, self._left = self._left.slice(0, rows), self._left.slice(rows)
        return taken

    def rest(self) -> bool:
        """Whether rows are left that were not taken."""
        return bool(self.take(1).num_rows)


#: The columns of each table that are compared with the manifest and counted.
_COLUMNS = {"predictions": ["uri", "key", "label"], "errors": ["uri", "key", "kind"], "features": ["uri", "key"]}


def _check_range(run: Run, manifest: _Manifest, files: FileRange, found: _FileCounts) -> Iterator[str]:
    """Differences of a range: its damaged files, or if there are none, its missing, extra and duplicate images."""
    listed = manifest.take(files.end - files.start)
    seen = []
    damaged = False
    for name, facts in files.files.items():
        try:
            data = run.location.join(*name.split("/")).read()
        except FileNotFoundError:
            yield f"{name}: missing"
            damaged = True
            continue
        if sha256(data) != facts["sha256"]:
            yield f"{name}: differs from its recorded sha256"
            damaged = True
            continue
        if name.startswith("features/") and any(other.startswith("predictions/") for other in files.files):
            continue  # its rows are those of the predictions file
        table = from_parquet(data, _COLUMNS[name.split("/")[0]])
        found.add(name, table)
        seen.append(table.select(["uri", "key"]))
    if not damaged:
        yield from _image_differences(listed, pa.concat_tables(seen))


def _unexpected(run: Run, report: Mapping[str, Any]) -> list[str]:
    """Files that a reader would take for part of the run's tables, but which the report does not list."""
    folders = ("predictions", "errors", "features")
    found = [f"{folder}/{name}" for folder in folders for name in run.location.join(folder).names()]
    return [name for name in found if name.endswith(schema.PART_SUFFIX) and name not in report["files"]]


def _image_differences(listed: pa.Table, seen: pa.Table) -> Iterator[str]:
    """Images that are not in the tables as often as they are listed, and listed shards without any image there."""
    shards = listed.filter(pc.not_equal(listed["format"], IMAGE))["uri"]
    for uri in shards.filter(pc.invert(pc.is_in(shards, seen["uri"].combine_chunks()))).to_pylist():
        yield f"the shard {uri} was listed, but none of its images are in the tables"
    # The manifest lists each loose image by name. It does not list the images of a shard.
    loose = listed.filter(pc.equal(listed["format"], IMAGE)).select(["uri", "key"])
    seen = seen.filter(pc.invert(pc.is_in(seen["uri"], shards.combine_chunks())))
    left, right = (_how_often(table, name) for table, name in ((loose, "listed"), (seen, "found")))
    joined = left.join(right, keys=["uri", "key"], join_type="full outer", use_threads=False)
    wrong = joined.filter(pc.fill_null(pc.not_equal(joined["listed"], joined["found"]), True))
    for row in wrong.sort_by("key").to_pylist():
        yield f"{row['key']} was listed {row['listed'] or 0} times and is in the tables {row['found'] or 0} times"


def _how_often(images: pa.Table, name: str) -> pa.Table:
    """The number of rows with each uri and key of a table, in a column `name`."""
    counted = images.group_by(["uri", "key"], use_threads=False).aggregate([([], "count_all")])
    return counted.rename_columns({"count_all": name})
