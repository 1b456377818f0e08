"""Stage 7: parts -> few large Parquet files, books balanced, and then the one moment in which the result becomes visible.

The order is: data files, `report.json` with their digests, `latest.json`; then the staged parts are removed, and last
comes `_SUCCESS`. A crash before the flip of `latest.json` leaves a run that the same command publishes again, with the same
bytes; a crash after it, one that only wants tidying.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import BooksError
from tlbatch.ledger import Receipts
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

    listed: int
    predicted: int
    failed: int
    failed_by_kind: Mapping[str, int]
    transient: int
    labels: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]


def write_tables(run: Place, manifest: pa.Table, receipts: Receipts, tables: Tables) -> Books:
    """Write the published files of a run from its parts.

    Args:
        run: the run's folder.
        manifest: what was promised.
        receipts: of its parts; an object that stands in two of them is taken from one.
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
    listed = int(receipts.images(manifest.num_rows).sum())
    if predicted + kinds.total() != listed:
        raise BooksError(
            f"{listed} images were listed, {predicted} predicted and {kinds.total()} failed; nothing is published."
        )
    return Books(listed, predicted, kinds.total(), dict(sorted(kinds.items())), transient, dict(sorted(labels.items())), files)


def _count(column: pa.ChunkedArray) -> tuple[list[str], list[int]]:
    counted = pc.value_counts(column)
    return counted.field("values").to_pylist(), counted.field("counts").to_pylist()


def _windows(run: Place, manifest: pa.Table, receipts: Receipts, size: int) -> Iterator[pa.Table]:
    """For each `size` images of the manifest their outcomes, sorted, each once, none missing; no object is cut in two."""
    owner, images = receipts.owners(manifest.num_rows), receipts.images(manifest.num_rows)
    if (owner < 0).any():
        raise BooksError(f"{manifest['key'][int(np.argmin(owner))]} was listed and is in no part; nothing is published.")
    window = (np.cumsum(images) - images) // size
    starts = [0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), manifest.num_rows]
    for start, end in itertools.pairwise(starts):
        parts = [_read_part(run, receipts.bodies[number], number) for number in np.unique(owner[start:end])]
        outcome = pa.concat_tables(parts).sort_by([("row", "ascending"), ("index", "ascending")])
        rows = outcome["row"].to_numpy()
        mine = (rows >= start) & (rows < end)
        mine[mine] = owner[rows[mine]] == outcome["part"].to_numpy()[mine]
        outcome = outcome.filter(pa.array(mine)).drop_columns(["part"])
        _require_whole(outcome, manifest, images, start, end)
        yield outcome


def _require_whole(outcome: pa.Table, manifest: pa.Table, images: np.ndarray, start: int, end: int) -> None:
    """Every object from `start` to `end` is there with all its images, each once."""
    rows = outcome["row"].to_numpy()
    found = np.bincount(rows - start, minlength=end - start)
    wrong = np.flatnonzero(found != images[start:end])
    if len(wrong):
        key = manifest["key"][start + int(wrong[0])]
        raise BooksError(f"{key} was listed and is not whole in its part; nothing is published.")
    firsts = np.cumsum(found) - found
    if (outcome["index"].to_numpy() != np.arange(len(rows)) - firsts[rows - start]).any():
        raise BooksError("An image stands twice in a part, and another not at all; nothing is published.")


def _read_part(run: Place, receipt: Mapping[str, Any], number: int) -> pa.Table:
    data = run.join(schema.STAGED, receipt["part"]).read()
    if sha256(data) != receipt["part_sha256"]:
        raise BooksError(
            f"The staged part {receipt['part']} differs from its receipt; nothing is published. "
            f"Delete its receipt in {run.url}/{schema.STAGED} and run the same command again to redo its images."
        )
    table = from_parquet(data)
    return table.append_column("part", pa.array(np.full(table.num_rows, number)))


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
