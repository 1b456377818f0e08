"""Stage 7: parts -> few large Parquet files, books balanced, and then the one moment in which the result becomes visible.

The order is: data files, `report.json` with their digests, `latest.json`; then the staged parts are removed, and last
comes `_SUCCESS`. A crash before the flip of `latest.json` leaves a run that the same command publishes again, with the same
bytes; a crash after it, one that only wants tidying.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import BooksError
from tlbatch.schema import from_parquet, part_name, sha256, to_parquet
from tlbatch.storage import Place

#: Images of one published file. A file's place in the table follows from the manifest alone, never from the scheduling.
ROWS_PER_FILE = 500_000
#: With features a file is bounded by its bytes.
FEATURE_BYTES_PER_FILE = 256 * 1024 * 1024


@dataclass(frozen=True)
class Tables:
    """What a run publishes: constants of its columns, and which tables there are."""

    run_id: str
    bundle: str
    base: str
    predictions: bool
    features: pa.Schema | None

    @property
    def rows_per_file(self) -> int:
        """How many rows of the manifest one published file covers."""
        if self.features is None:
            return ROWS_PER_FILE
        vector = self.features.field("features").type
        return max(1, int(FEATURE_BYTES_PER_FILE // (vector.list_size * vector.value_type.bit_width // 8)))


@dataclass(frozen=True)
class Books:
    """What publishing found and wrote: `files` is relative path -> {"sha256", "rows"}."""

    predicted: int
    failed: int
    failed_by_kind: Mapping[str, int]
    transient: int
    labels: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]


def write_tables(run: Place, manifest: pa.Table, receipts: Sequence[Mapping[str, Any]], tables: Tables) -> Books:
    """Write the published files of a run from its parts.

    Args:
        run: the run's folder.
        manifest: what was promised.
        receipts: their bodies; a row that stands in two parts is taken once.
        tables: which tables, and their constant columns.

    Raises:
        BooksError: an image is in no part, or a part is not the one its receipt describes.
    """
    kinds: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    files: dict[str, dict[str, Any]] = {}
    predicted = transient = 0
    for number, outcome in enumerate(_windows(run, manifest, receipts, tables.rows_per_file)):
        failed_here = pc.is_valid(outcome["kind"])
        good, bad = outcome.filter(pc.invert(failed_here)), outcome.filter(failed_here)
        predicted += good.num_rows
        kinds.update(bad["kind"].to_pylist())
        transient += pc.sum(bad["transient"]).as_py() or 0
        if tables.predictions:
            labels.update(dict(zip(*_count(good["label"]), strict=True)))
        for folder, table in _shaped(good, bad, tables, first=number == 0):
            data = to_parquet(table)
            name = f"{folder}/{part_name(number)}"
            run.join(folder, part_name(number)).write(data)
            files[name] = {"sha256": sha256(data), "rows": table.num_rows}
    if predicted + kinds.total() != manifest.num_rows:
        raise BooksError(
            f"{manifest.num_rows} images were listed, {predicted} predicted and {kinds.total()} failed; nothing is published."
        )
    return Books(predicted, kinds.total(), dict(sorted(kinds.items())), transient, dict(sorted(labels.items())), files)


def _count(column: pa.ChunkedArray) -> tuple[list[str], list[int]]:
    counted = pc.value_counts(column)
    return counted.field("values").to_pylist(), counted.field("counts").to_pylist()


def _windows(run: Place, manifest: pa.Table, receipts: Sequence[Mapping[str, Any]], size: int) -> Iterator[pa.Table]:
    """For each `size` rows of the manifest their outcomes, sorted, each row once, none missing."""
    for start in range(0, manifest.num_rows, size):
        end = min(start + size, manifest.num_rows)
        parts = [_read_part(run, body) for body in receipts if any(a < end and b > start for a, b in body["rows"])]
        if not parts:
            raise BooksError(f"{manifest['key'][start]} was listed and is in no part; nothing is published.")
        outcome = pa.concat_tables(parts).sort_by([("row", "ascending"), ("index", "ascending")])
        rows = outcome["row"].to_numpy()
        repeated = np.zeros(len(rows), bool)
        repeated[1:] = (rows[1:] == rows[:-1]) & (np.diff(outcome["index"].to_numpy()) == 0)
        outcome = outcome.filter(pa.array(~repeated & (rows >= start) & (rows < end)))
        missing = np.setdiff1d(np.arange(start, end), outcome["row"].to_numpy())
        if len(missing):
            raise BooksError(f"{manifest['key'][int(missing[0])]} was listed and is in no part; nothing is published.")
        yield outcome


def _read_part(run: Place, receipt: Mapping[str, Any]) -> pa.Table:
    data = run.join(schema.STAGED, receipt["part"]).read()
    if sha256(data) != receipt["part_sha256"]:
        raise BooksError(
            f"The staged part {receipt['part']} differs from its receipt; nothing is published. "
            f"Delete its receipt in {run.url}/{schema.STAGED} and run the same command again to redo its images."
        )
    return from_parquet(data)


def _shaped(good: pa.Table, bad: pa.Table, tables: Tables, *, first: bool) -> Iterator[tuple[str, pa.Table]]:
    """The published tables of one window, by folder. Errors are rare: only the first file may be empty, to show its columns."""
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


def make_visible(output: Place, run: Place, run_id: str, report: Mapping[str, Any], still_mine: Callable[[], None]) -> None:
    """Publish: the report, then `latest.json` by compare-and-swap.

    Args:
        output: the folder whose table this becomes.
        run: the run's folder, its tables written.
        run_id: its name.
        report: what `report.json` says.
        still_mine: raises if the lease is no longer ours; asked right before the flip.
    """
    data = json.dumps(report, indent=1).encode()
    run.join(schema.REPORT).write(data)
    entry = {"run_id": run_id, "report_sha256": sha256(data)}
    pointer = {"schema_version": schema.SCHEMA_VERSION, "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    place = output.join(schema.LATEST)
    old = place.read() if place.exists() else None
    still_mine()
    if not place.swap(schema.seal({**pointer, "runs": [entry]}), old):
        raise BooksError(
            f"{place.url} was changed by somebody else while run {run_id} was publishing; run the same command again."
        )
    tidy(run)


def tidy(run: Place) -> None:
    """After the flip: remove what was staged for the run, then mark it as complete."""
    run.join(schema.STAGED).delete()
    run.join(schema.SUCCESS).write(b"")
