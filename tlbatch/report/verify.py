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
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch import commit, ledger, schema
from tlbatch.errors import BooksError
from tlbatch.ledger import Published, Run, read_latest, require_runs
from tlbatch.overlay import Layer, layers
from tlbatch.publish import books_digest, count
from tlbatch.schema import from_parquet, sha256
from tlbatch.shards import IMAGE
from tlbatch.storage import open_patiently

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
    place = require_runs(output, storage_options)
    differences: list[str] = []
    totals = {"listed": 0, "predicted": 0, "failed": 0}
    entries = {entry["run_id"]: entry for entry in read_latest(place)}
    found = ledger.runs(place)
    by_name = {run.run_id: run for run in found}
    differences += [f"latest.json names run {name}, which is not there" for name in entries if name not in by_name]
    for run in found:
        if run.run_id not in entries:
            differences += _check_unpublished(run)
    table = [by_name[name] for name in entries if name in by_name]
    differences += _check_order(table, list(entries.values()))
    try:
        for layer in layers(table):
            counts, wrong = _check_published(layer, entries[layer.run.run_id]["books_sha256"])
            differences += wrong
            totals = {name: totals[name] + counts[name] for name in totals}
    except (BooksError, FileNotFoundError) as error:
        differences.append(str(error))
    return {
        "ok": not differences,
        "output": place.url,
        "runs": len(found),
        **totals,
        "differences": differences[:MOST_DIFFERENCES],
        "differences_in_all": len(differences),
    }


def _check_order(table: list[Run], entries: Published) -> list[str]:
    """A night's run adds to the runs before it, and to no others."""
    return [
        f"{run.run_id}: it adds to other runs than those before it in {schema.LATEST}"
        for number, run in enumerate(table)
        if run.on != entries[:number]
    ]


def _check_unpublished(run: Run) -> list[str]:
    """A run that is not in the table: its manifest, and its parts as far as they are there."""
    if run.finished() or not run.promises():
        return []
    wrong = []
    try:
        _ = run.manifest
    except (BooksError, OSError, pa.ArrowInvalid) as error:
        wrong.append(f"{run.run_id}: {error}")
    receipts = ledger.read_receipts(run)
    wrong += [f"{run.run_id}/{schema.STAGED}/{name}: the receipt is damaged" for name in receipts.broken]
    for body in receipts.bodies:
        with contextlib.suppress(FileNotFoundError):  # the run is at work and has just published
            if sha256(run.staged.join(body["part"]).read()) != body["part_sha256"]:
                wrong.append(f"{run.run_id}/{schema.STAGED}/{body['part']}: differs from its receipt")
    return wrong


def _check_published(layer: Layer, books_sha256: str) -> tuple[dict[str, int], list[str]]:
    """What a run adds to the table's counts, and what is wrong with it; one file's worth of rows is held at a time."""
    run = layer.run
    nothing = {"listed": 0, "predicted": 0, "failed": 0}
    try:
        report = commit.read_report(run)
    except FileNotFoundError:
        return nothing, [f"{run.run_id}/{schema.REPORT}: missing"]
    except BooksError as error:
        return nothing, [str(error)]
    if books_digest(report) != books_sha256:
        return nothing, [f"{run.run_id}/{schema.REPORT}: differs from the sha256 in {schema.LATEST}"]
    manifest = _Manifest(run)
    if manifest.damage:
        return nothing, [f"{run.run_id}/{schema.MANIFEST}: {manifest.damage}"]
    wrong = [f"{run.run_id}/{name}: is not in the report" for name in _unexpected(run, report)]
    found = _Found(layer)
    for window in _windows(report["files"]):
        wrong += [f"{run.run_id}/{damage}" for damage in _check_window(run, manifest, window, found)]
    if manifest.rest():
        wrong.append(f"{run.run_id}: the manifest goes on where the tables end")
    for name, counted in found.books().items():
        if not wrong and counted != report[name]:
            wrong.append(f"{run.run_id}: {name} is {report[name]} in the report and {counted} in the files")
    return found.seen, wrong


@dataclass
class _Found:
    """What a run's tables hold, added up file by file; `seen` is what of it no newer run has taken the place of."""

    layer: Layer
    seen: dict[str, int] = field(default_factory=lambda: {"listed": 0, "predicted": 0, "failed": 0})
    predicted: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, table: pa.Table) -> None:
        """Count one file."""
        visible = self.layer.visible(table).num_rows
        self.seen["listed"] += visible
        self.seen["failed" if name.startswith("errors/") else "predicted"] += visible
        if name.startswith("errors/"):
            self.kinds += count(table["kind"])
            return
        self.predicted += table.num_rows
        if "label" in table.column_names:
            self.labels += count(table["label"])

    def books(self) -> dict[str, Any]:
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
        place = run.place.join(schema.MANIFEST)
        found = place.info()
        if found is None:
            self.damage = "missing"
            return
        digest = hashlib.sha256()
        with open_patiently(place, found.size) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        if digest.hexdigest() != run.facts["manifest_sha256"]:
            self.damage = "differs from its recorded sha256"
            return
        self._batches = pq.ParquetFile(open_patiently(place, found.size)).iter_batches(_ROWS, columns=self._left.column_names)

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


class _Window(NamedTuple):
    """The files of the same rows of the manifest: `files` is name -> sha256 and more."""

    start: int
    end: int
    files: dict[str, Mapping[str, Any]]


def _windows(files: Mapping[str, Mapping[str, Any]]) -> list[_Window]:
    """Published files by the rows of the manifest they are of."""
    found: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for name, facts in files.items():
        start, end = facts["objects"]
        found.setdefault((start, end), {})[name] = facts
    return [_Window(start, end, found[start, end]) for start, end in sorted(found)]


def _check_window(run: Run, manifest: _Manifest, window: _Window, found: _Found) -> Iterator[str]:
    """Sentences about damaged files; where there are none, about images in no table, not promised, or in the tables twice."""
    promised = manifest.take(window.end - window.start)
    seen = []
    damaged = False
    for name, facts in window.files.items():
        try:
            data = run.place.join(*name.split("/")).read()
        except FileNotFoundError:
            yield f"{name}: missing"
            damaged = True
            continue
        if sha256(data) != facts["sha256"]:
            yield f"{name}: differs from its recorded sha256"
            damaged = True
            continue
        if name.startswith("features/") and any(other.startswith("predictions/") for other in window.files):
            continue  # it has the rows of the predictions
        table = from_parquet(data, _COLUMNS[name.split("/")[0]])
        found.add(name, table)
        seen.append(table.select(["uri", "key"]))
    if not damaged:
        yield from _unbalanced(promised, pa.concat_tables(seen))


def _unexpected(run: Run, report: Mapping[str, Any]) -> list[str]:
    """Files a reader of the run's folders would take for its tables."""
    folders = ("predictions", "errors", "features")
    found = [f"{folder}/{name}" for folder in folders for name in run.place.join(folder).names()]
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
