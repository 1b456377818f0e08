"""Stage 7: staged parts -> a few large Parquet files, then the swap of the pointer that makes them visible.

Each file is made from its own range of manifest rows and nothing else. So files can be written in any order, on any machine,
twice, or by two publishers at once: the bytes are the same.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import CountsError
from tlbatch.output.documents import PointerDocument, PublishedFile, Receipt, ReportDocument
from tlbatch.output.receipts import Receipts
from tlbatch.output.run import READS_AT_ONCE, Run, read_pointer
from tlbatch.schema import from_parquet, part_name, sha256, to_parquet
from tlbatch.storage.location import Location

#: Images of one published file. A file's range follows from the manifest alone, never from the scheduling.
ROWS_PER_FILE = 500_000
#: With features a file is limited by its bytes.
FEATURE_BYTES_PER_FILE = 256 * 1024 * 1024


@dataclass(frozen=True)
class TableSpec:
    """The tables that a run publishes, and the constants of their columns."""

    run_id: str
    bundle: str
    base: str
    predictions: bool
    features: pa.Schema | None

    def nothing(self) -> pa.Table:
        """The columns of parts, without a row."""
        names: dict[str, pa.Field] = {}
        for table in (self.features, schema.PREDICTIONS, schema.ERRORS):
            names |= {field.name: field for field in table or ()}
        names[schema.WHITE_LEVEL] = pa.field(schema.WHITE_LEVEL, pa.float64())
        return pa.schema(list(names.values())).empty_table()

    @property
    def rows_per_file(self) -> int:
        """How many images one published file covers."""
        if self.features is None:
            return ROWS_PER_FILE
        vector = self.features.field("features").type
        return max(1, int(FEATURE_BYTES_PER_FILE // (vector.list_size * vector.value_type.bit_width // 8)))


@dataclass(frozen=True)
class PublishedCounts:
    """What was published: counts, and each file with its digest, its rows and its range of manifest rows."""

    listed: int
    predicted: int
    failed: int
    failed_by_kind: Mapping[str, int]
    transient: int
    labels: Mapping[str, int]
    #: Images of more than 8 bits, by the value that was taken as white.
    white_levels: Mapping[str, int]
    files: Mapping[str, PublishedFile]


class FileTask(NamedTuple):
    """Consecutive manifest rows that make up one file of each table, and the parts they are taken from."""

    number: int
    start: int
    #: (n,) int: for each row the number of its part, a key of `parts`.
    owner: np.ndarray
    #: (n,) int: how many images each row's object holds.
    images: np.ndarray
    parts: Mapping[int, Receipt]

    @property
    def end(self) -> int:
        """The first row after it."""
        return self.start + len(self.owner)


class WrittenFiles(NamedTuple):
    """What one file task wrote."""

    predicted: int
    kinds: Counter[str]
    transient: int
    labels: Counter[str]
    white_levels: Counter[float]
    files: dict[str, PublishedFile]

    def with_next(self, other: WrittenFiles) -> WrittenFiles:
        """The sum of both."""
        return WrittenFiles(
            self.predicted + other.predicted,
            self.kinds + other.kinds,
            self.transient + other.transient,
            self.labels + other.labels,
            self.white_levels + other.white_levels,
            self.files | other.files,
        )


#: Applies a function to each file task, in order: `map`, or the same on many machines.
MapFileTasks = Callable[[Callable[[FileTask], WrittenFiles], Sequence[FileTask]], Iterable[WrittenFiles]]


def write_files(run: Run, receipts: Receipts, tables: TableSpec, map_tasks: MapFileTasks = map) -> PublishedCounts:
    """Write the published files of a run from its parts.

    Args:
        run: the run.
        receipts: of its parts; an object that is in two parts is taken from one of them.
        tables: which tables, and their constant columns.
        map_tasks: how the files are spread over machines.

    Raises:
        CountsError: an image is in no part, or a part differs from its receipt.
    """
    bare = Run(run.location, run.facts)  # without the manifest it may have cached
    tasks = cut_file_tasks(receipts, run.manifest.num_rows, tables.rows_per_file)
    total = WrittenFiles(0, Counter(), 0, Counter(), Counter(), {})
    for written in map_tasks(partial(write_file_task, bare, tables), tasks):
        total = total.with_next(written)
    listed = int(receipts.images(run.manifest.num_rows).sum())
    failed = total.kinds.total()
    if total.predicted + failed != listed:
        raise CountsError(f"{listed} images were listed, {total.predicted} predicted, {failed} failed; nothing is published.")
    kinds, labels = (dict(sorted(counts.items())) for counts in (total.kinds, total.labels))
    whites = {f"{white:.15g}": count for white, count in sorted(total.white_levels.items())}
    return PublishedCounts(listed, total.predicted, failed, kinds, total.transient, labels, whites, total.files)


def cut_file_tasks(receipts: Receipts, rows: int, size: int) -> list[FileTask]:
    """The manifest's rows, each of them in a part, cut after about every `size` images; no object is cut in two."""
    owner, images = receipts.owners(rows), receipts.images(rows)
    task = (np.cumsum(images) - images) // size
    starts = [0, *(np.flatnonzero(np.diff(task)) + 1).tolist(), rows]
    return [
        FileTask(
            number,
            start,
            owner[start:end],
            images[start:end],
            {int(part): receipts.bodies[part] for part in np.unique(owner[start:end])},
        )
        for number, (start, end) in enumerate(itertools.pairwise(starts))
    ]


def write_file_task(run: Run, tables: TableSpec, task: FileTask) -> WrittenFiles:
    """Write one file of each table.

    Raises:
        CountsError: an image is in no part, or a part differs from its receipt.
    """
    outcome = _outcome(run, task)
    if outcome is None:
        outcome = tables.nothing()
    failed = pc.is_valid(outcome["kind"])
    good, bad = outcome.filter(pc.invert(failed)), outcome.filter(failed)
    files: dict[str, PublishedFile] = {}
    for folder, table in _published_tables(good, bad, tables, first=task.number == 0):
        data = to_parquet(table)
        run.location.join(folder, part_name(task.number)).write(data)
        facts: PublishedFile = {"sha256": sha256(data), "rows": table.num_rows, "objects": [task.start, task.end]}
        files[f"{folder}/{part_name(task.number)}"] = facts
    return WrittenFiles(
        good.num_rows,
        count_values(bad["kind"]),
        pc.sum(bad["transient"]).as_py() or 0,
        count_values(good["label"]) if tables.predictions else Counter(),
        count_values(good[schema.WHITE_LEVEL].drop_null()),
        files,
    )


def count_values(column: pa.ChunkedArray) -> Counter[Any]:
    """How often each value occurs in a column."""
    counted = pc.value_counts(column)
    return Counter(dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True)))


def _outcome(run: Run, task: FileTask) -> pa.Table | None:
    """The outcome of each image of a task, sorted, each image once; None if the task has no rows."""
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        parts = list(pool.map(lambda part: _read_part(run, part[1], part[0]), task.parts.items()))
    if not parts:
        return None  # an incremental run in which objects were only deleted
    unknown = pa.schema([(schema.WHITE_LEVEL, pa.float64())]).empty_table()  # parts of older versions lack the column
    outcome = pa.concat_tables([*parts, unknown], promote_options="default").sort_by(
        [("row", "ascending"), ("index", "ascending")]
    )
    rows = outcome["row"].to_numpy()
    own = (rows >= task.start) & (rows < task.end)
    own[own] = task.owner[rows[own] - task.start] == outcome["part"].to_numpy()[own]
    outcome = outcome.filter(pa.array(own)).drop_columns(["part"])
    _require_complete(run, outcome, task)
    places = outcome[schema.INDEX]
    places = pc.if_else(pc.less(places, 0), pa.scalar(None, places.type), places)
    return outcome.set_column(outcome.column_names.index(schema.INDEX), schema.INDEX, places)


def _require_complete(run: Run, outcome: pa.Table, task: FileTask) -> None:
    """Every object of the task has all of its images, each once."""
    rows = outcome["row"].to_numpy() - task.start
    found = np.bincount(rows, minlength=len(task.images))
    wrong = np.flatnonzero(found != task.images)
    if len(wrong):
        key = run.manifest["key"][task.start + int(wrong[0])]
        raise CountsError(f"{key} was listed and is not complete in its part; nothing is published.")
    firsts, places = np.cumsum(found) - found, outcome[schema.INDEX].to_numpy().astype(np.int64)
    begins = places[firsts]
    consecutive = places - begins[rows] == np.arange(len(rows)) - firsts[rows]
    if not (consecutive.all() and np.isin(begins, (0, schema.UNKNOWN_INDEX)).all()):
        raise CountsError("An image is in a part twice, and another image is missing; nothing is published.")


def _read_part(run: Run, receipt: Receipt, number: int) -> pa.Table:
    data = run.staged.join(receipt["part"]).read()
    if sha256(data) != receipt["part_sha256"]:
        raise CountsError(
            f"The staged part {receipt['part']} differs from its receipt; nothing is published. "
            f"Delete its receipt in {run.staged.url} and run the same command again to redo its images."
        )
    table = from_parquet(data)
    return table.append_column("part", pa.array(np.full(table.num_rows, number)))


def _published_tables(good: pa.Table, bad: pa.Table, tables: TableSpec, *, first: bool) -> Iterator[tuple[str, pa.Table]]:
    """The tables of one task, by folder. Only the first errors file may be empty, to show its columns."""
    constants = {"run_id": tables.run_id, "bundle": tables.bundle, "base": tables.base}
    if tables.predictions:
        yield "predictions", _with_constants(good, constants, schema.PREDICTIONS)
    if tables.features is not None:
        yield "features", _with_constants(good, constants, tables.features)
    if first or bad.num_rows:
        yield "errors", _with_constants(bad, constants, schema.ERRORS)


def _with_constants(table: pa.Table, constants: Mapping[str, str], wanted: pa.Schema) -> pa.Table:
    columns = [
        pa.array([constants[field.name]] * table.num_rows, field.type)
        if field.name in constants
        else table[field.name].cast(field.type)
        for field in wanted
    ]
    return pa.Table.from_arrays(columns, schema=wanted)


def write_report_document(run: Run, report: ReportDocument) -> None:
    """Write `report.json`."""
    run.location.join(schema.REPORT).write(schema.seal(report))


def require_current_base(output: Location, run: Run) -> None:
    """Raises CountsError if the table is no longer the one that an incremental run adds to."""
    if run.on and run.on != read_pointer(output):
        raise CountsError(
            f"The table is no longer the one that run {run.run_id} adds to; nothing is published. "
            f"Delete {run.location.url} and run the same command again."
        )


def swap_pointer(output: Location, run: Run, report: ReportDocument, require_lease: Callable[[], None]) -> None:
    """Make a run, with the runs it adds to, the table: replace `latest.json` by compare-and-swap.

    Args:
        output: the folder whose table this becomes.
        run: the run, its files and report written.
        report: its `report.json`.
        require_lease: raises if the lease was lost; called right before the swap.
    """
    location = output.join(schema.LATEST)
    old = location.read() if location.exists() else None
    pointer: PointerDocument = {
        "schema_version": schema.SCHEMA_VERSION,
        "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "runs": [*run.on, {"run_id": run.run_id, "books_sha256": counts_digest(report)}],
    }
    require_lease()
    if not location.swap(schema.seal(pointer), old):
        raise CountsError(
            f"Another process changed {location.url} while run {run.run_id} was publishing; run the same command again."
        )


def counts_digest(report: ReportDocument) -> str:
    """SHA-256 of the part of a report that follows from manifest and part plan alone, whichever process writes it."""
    body = cast("Mapping[str, Any]", report)
    names = ["listed", "predicted", "failed", "failed_by_kind", "labels", "manifest_sha256", "files"]
    names += [name for name in ("on", "removed_sha256") if name in body]
    return sha256(json.dumps({name: body[name] for name in names}, sort_keys=True).encode())


def remove_staged(run: Run) -> None:
    """Remove the run's parts, receipts and plan, which published files have replaced."""
    run.staged.delete()


def mark_complete(run: Run) -> None:
    """Put `_SUCCESS`: nothing of the run is left to do."""
    run.location.join(schema.SUCCESS).write(b"")
