"""An output folder -> whether it is whole: believes nothing that can be computed again.

A table is checked file by file against the manifest, whose rows are read along with them, so that memory does not grow with
the number of images.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch import schema
from tlbatch.errors import CountsError
from tlbatch.output.publish import count_values, counts_digest
from tlbatch.output.receipts import read_receipts
from tlbatch.output.run import Pointer, Run, read_output, read_report, require_runs
from tlbatch.output.snapshot import SnapshotRun, snapshot
from tlbatch.output.table import FileRange, file_ranges
from tlbatch.schema import IMAGE, from_parquet, sha256
from tlbatch.storage.range_file import open_range_file

#: Differences that `verify` names before it stops counting them.
MOST_DIFFERENCES = 20
#: Bytes and rows of a manifest that are held at a time.
_PIECE, _ROWS = 8 << 20, 65_536


def verify(output: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Recompute counts, identities and digests of every run of an output.

    Returns:
        `ok`; `runs`, how many were checked; `listed`, `predicted` and `failed` of the published table; and
        `differences`, at most `MOST_DIFFERENCES` sentences.

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
    """A night's run adds to the runs before it, and to no others."""
    return [
        f"{run.run_id}: it adds to other runs than those before it in {schema.LATEST}"
        for number, run in enumerate(table)
        if run.on != entries[:number]
    ]


def _check_unpublished(run: Run) -> list[str]:
    """A run that is not in the table: its manifest, and its parts as far as they are there."""
    if run.finished() or not run.has_manifest():
        return []
    wrong = []
    try:
        _ = run.manifest
    except (CountsError, OSError, pa.ArrowInvalid) as error:
        wrong.append(f"{run.run_id}: {error}")
    receipts = read_receipts(run)
    wrong += [f"{run.run_id}/{schema.STAGED}/{name}: the receipt is damaged" for name in receipts.broken]
    for body in receipts.bodies:
        with contextlib.suppress(FileNotFoundError):  # the run is at work and has just published
            if sha256(run.staged.join(body["part"]).read()) != body["part_sha256"]:
                wrong.append(f"{run.run_id}/{schema.STAGED}/{body['part']}: differs from its receipt")
    return wrong


def _check_published(one: SnapshotRun, books_sha256: str) -> tuple[dict[str, int], list[str]]:
    """What a run adds to the table's counts, and what is wrong with it; one file's worth of rows is held at a time."""
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
    found = _Found(one)
    for files in file_ranges(report["files"]):
        wrong += [f"{run.run_id}/{damage}" for damage in _check_range(run, manifest, files, found)]
    if manifest.rest():
        wrong.append(f"{run.run_id}: the manifest goes on where the tables end")
    recorded = cast("Mapping[str, Any]", report)
    for name, counted in found.counts().items():
        if not wrong and counted != recorded[name]:
            wrong.append(f"{run.run_id}: {name} is {recorded[name]} in the report and {counted} in the files")
    return found.seen, wrong


@dataclass
class _Found:
    """What a run's tables hold, added up file by file; `seen` is what of it no newer run has taken the place of."""

    snapshot_run: SnapshotRun
    seen: dict[str, int] = field(default_factory=lambda: {"listed": 0, "predicted": 0, "failed": 0})
    predicted: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, table: pa.Table) -> None:
        """Count one file."""
        current = self.snapshot_run.current_rows(table).num_rows
        self.seen["listed"] += current
        self.seen["failed" if name.startswith("errors/") else "predicted"] += current
        if name.startswith("errors/"):
            self.kinds += count_values(table["kind"])
            return
        self.predicted += table.num_rows
        if "label" in table.column_names:
            self.labels += count_values(table["label"])

    def counts(self) -> dict[str, Any]:
        """The same numbers as the report's, under the same names."""
        failed = self.kinds.total()
        return {
            "listed": self.predicted + failed,
            "predicted": self.predicted,
            "failed": failed,
            "failed_by_kind": dict(sorted(self.kinds.items())),
            "labels": dict(sorted(self.labels.items())),
        }


class _Manifest:
    """A run's manifest from its first row to its last, read piece by piece."""

    def __init__(self, run: Run) -> None:
        self.damage = ""
        self._left = pa.table({name: pa.array([], pa.string()) for name in ("uri", "key", "format")})
        self._batches: Iterator[pa.RecordBatch] = iter(())
        location = run.location.join(schema.MANIFEST)
        found = location.info()
        if found is None:
            self.damage = "missing"
            return
        digest = hashlib.sha256()
        with open_range_file(location, found.size) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        if digest.hexdigest() != run.facts["manifest_sha256"]:
            self.damage = "differs from its recorded sha256"
            return
        self._batches = pq.ParquetFile(open_range_file(location, found.size)).iter_batches(
            _ROWS, columns=self._left.column_names
        )

    def take(self, rows: int) -> pa.Table:
        """The next rows, fewer at its end."""
        while self._left.num_rows < rows:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._left = pa.concat_tables([self._left, pa.Table.from_batches([batch]).cast(self._left.schema)])
        taken, self._left = self._left.slice(0, rows), self._left.slice(rows)
        return taken

    def rest(self) -> bool:
        """Whether there are rows that nobody took."""
        return bool(self.take(1).num_rows)


#: What of each table is held against the manifest and counted.
_COLUMNS = {"predictions": ["uri", "key", "label"], "errors": ["uri", "key", "kind"], "features": ["uri", "key"]}


def _check_range(run: Run, manifest: _Manifest, files: FileRange, found: _Found) -> Iterator[str]:
    """Sentences about damaged files; where there are none, about images in no table, not promised, or in the tables twice."""
    promised = manifest.take(files.end - files.start)
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
            continue  # it has the rows of the predictions
        table = from_parquet(data, _COLUMNS[name.split("/")[0]])
        found.add(name, table)
        seen.append(table.select(["uri", "key"]))
    if not damaged:
        yield from _unbalanced(promised, pa.concat_tables(seen))


def _unexpected(run: Run, report: Mapping[str, Any]) -> list[str]:
    """Files a reader of the run's folders would take for its tables."""
    folders = ("predictions", "errors", "features")
    found = [f"{folder}/{name}" for folder in folders for name in run.location.join(folder).names()]
    return [name for name in found if name.endswith(schema.PART_SUFFIX) and name not in report["files"]]


def _unbalanced(promised: pa.Table, seen: pa.Table) -> Iterator[str]:
    """Sentences about images that were promised and are in no table, or are there and were not promised, or twice."""
    shards = promised.filter(pc.not_equal(promised["format"], IMAGE))["uri"]
    for uri in shards.filter(pc.invert(pc.is_in(shards, seen["uri"].combine_chunks()))).to_pylist():
        yield f"the shard {uri} was listed and nothing of it is in the tables"
    # Which images a shard holds is known from the shard alone; of loose ones each is promised by name.
    loose = promised.filter(pc.equal(promised["format"], IMAGE)).select(["uri", "key"])
    seen = seen.filter(pc.invert(pc.is_in(seen["uri"], shards.combine_chunks())))
    left, right = (_how_often(table, name) for table, name in ((loose, "promised"), (seen, "found")))
    joined = left.join(right, keys=["uri", "key"], join_type="full outer")
    wrong = joined.filter(pc.fill_null(pc.not_equal(joined["promised"], joined["found"]), True))
    for row in wrong.sort_by("key").to_pylist():
        yield f"{row['key']} was listed {row['promised'] or 0} times and is in the tables {row['found'] or 0} times"


def _how_often(images: pa.Table, name: str) -> pa.Table:
    """How often each uri and key stands in a table, in a column `name`."""
    counted = images.group_by(["uri", "key"]).aggregate([([], "count_all")])
    return counted.rename_columns({"count_all": name})
