"""Stage 7: parts -> few large Parquet files, books balanced, and then the one moment in which the result becomes visible.

Each file is made of its own rows of the manifest and nothing else, so files can be written in any order, on any machine,
twice, by two publishers at once: their bytes are the same.
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
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import ledger, schema
from tlbatch.errors import BooksError
from tlbatch.ledger import PARTS_AT_ONCE, Receipts, Run
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

    def nothing(self) -> pa.Table:
        """What parts would hold, without a row."""
        names: dict[str, pa.Field] = {}
        for table in (self.features, schema.PREDICTIONS, schema.ERRORS):
            names |= {field.name: field for field in table or ()}
        return pa.schema(list(names.values())).empty_table()

    @property
    def rows_per_file(self) -> int:
        """How many rows of the manifest one published file covers."""
        if self.features is None:
            return ROWS_PER_FILE
        vector = self.features.field("features").type
        return max(1, int(FEATURE_BYTES_PER_FILE // (vector.list_size * vector.value_type.bit_width // 8)))


@dataclass(frozen=True)
class Books:
    """What publishing found and wrote: `files` is relative path -> sha256, rows, and which rows of the manifest it is of."""

    listed: int
    predicted: int
    failed: int
    failed_by_kind: Mapping[str, int]
    transient: int
    labels: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]


class Window(NamedTuple):
    """Consecutive rows of the manifest that make up one file of each table, and the parts they are taken from."""

    number: int
    start: int
    #: (n,) int: for each row the number of its part, a key of `parts`.
    owner: np.ndarray
    #: (n,) int: how many images each row's object holds.
    images: np.ndarray
    parts: Mapping[int, Mapping[str, Any]]

    @property
    def end(self) -> int:
        """The first row behind it."""
        return self.start + len(self.owner)


class Written(NamedTuple):
    """What one window became."""

    predicted: int
    kinds: Counter[str]
    transient: int
    labels: Counter[str]
    files: dict[str, dict[str, Any]]

    def with_next(self, other: Written) -> Written:
        """Both together."""
        return Written(
            self.predicted + other.predicted,
            self.kinds + other.kinds,
            self.transient + other.transient,
            self.labels + other.labels,
            self.files | other.files,
        )


#: Applies a function to each window, in order, here or on other machines.
Each = Callable[[Callable[[Window], Written], Sequence[Window]], Iterable[Written]]


def write_tables(run: Run, receipts: Receipts, tables: Tables, each: Each = map) -> Books:
    """Write the published files of a run from its parts.

    Args:
        run: whose files they are.
        receipts: of its parts; an object that stands in two of them is taken from one.
        tables: which tables, and their constant columns.
        each: how the files are spread over machines.

    Raises:
        BooksError: an image is in no part, or a part is not the one its receipt describes.
    """
    bare = Run(run.place, run.facts)  # without the manifest it may hold
    total = Written(0, Counter(), 0, Counter(), {})
    for written in each(partial(write_window, bare, tables), windows(receipts, run.manifest.num_rows, tables.rows_per_file)):
        total = total.with_next(written)
    listed = int(receipts.images(run.manifest.num_rows).sum())
    failed = total.kinds.total()
    if total.predicted + failed != listed:
        raise BooksError(f"{listed} images were listed, {total.predicted} predicted and {failed} failed; nothing is published.")
    kinds, labels = (dict(sorted(counts.items())) for counts in (total.kinds, total.labels))
    return Books(listed, total.predicted, failed, kinds, total.transient, labels, total.files)


def windows(receipts: Receipts, rows: int, size: int) -> list[Window]:
    """The manifest's rows, all of them in a part, cut after about every `size` images; no object is cut in two."""
    owner, images = receipts.owners(rows), receipts.images(rows)
    window = (np.cumsum(images) - images) // size
    starts = [0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), rows]
    return [
        Window(
            number,
            start,
            owner[start:end],
            images[start:end],
            {int(part): receipts.bodies[part] for part in np.unique(owner[start:end])},
        )
        for number, (start, end) in enumerate(itertools.pairwise(starts))
    ]


def write_window(run: Run, tables: Tables, window: Window) -> Written:
    """Write the files of one window.

    Raises:
        BooksError: an image is in no part, or a part is not the one its receipt describes.
    """
    outcome = _outcome(run, window)
    if outcome is None:
        outcome = tables.nothing()
    failed = pc.is_valid(outcome["kind"])
    good, bad = outcome.filter(pc.invert(failed)), outcome.filter(failed)
    files = {}
    for folder, table in _shaped(good, bad, tables, first=window.number == 0):
        data = to_parquet(table)
        run.place.join(folder, part_name(window.number)).write(data)
        facts = {"sha256": sha256(data), "rows": table.num_rows, "objects": [window.start, window.end]}
        files[f"{folder}/{part_name(window.number)}"] = facts
    return Written(
        good.num_rows,
        count(bad["kind"]),
        pc.sum(bad["transient"]).as_py() or 0,
        count(good["label"]) if tables.predictions else Counter(),
        files,
    )


def count(column: pa.ChunkedArray) -> Counter[str]:
    """How often each value stands in a column."""
    counted = pc.value_counts(column)
    return Counter(dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True)))


def _outcome(run: Run, window: Window) -> pa.Table | None:
    """What became of each image of a window, sorted, each once, none missing; None where there is none."""
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        parts = list(pool.map(lambda part: _read_part(run, part[1], part[0]), window.parts.items()))
    if not parts:
        return None  # a night on which things were only deleted
    outcome = pa.concat_tables(parts).sort_by([("row", "ascending"), ("index", "ascending")])
    rows = outcome["row"].to_numpy()
    mine = (rows >= window.start) & (rows < window.end)
    mine[mine] = window.owner[rows[mine] - window.start] == outcome["part"].to_numpy()[mine]
    outcome = outcome.filter(pa.array(mine)).drop_columns(["part"])
    _require_whole(run, outcome, window)
    return outcome


def _require_whole(run: Run, outcome: pa.Table, window: Window) -> None:
    """Every object of the window is there with all its images, each once."""
    rows = outcome["row"].to_numpy() - window.start
    found = np.bincount(rows, minlength=len(window.images))
    wrong = np.flatnonzero(found != window.images)
    if len(wrong):
        key = run.manifest["key"][window.start + int(wrong[0])]
        raise BooksError(f"{key} was listed and is not whole in its part; nothing is published.")
    firsts = np.cumsum(found) - found
    if (outcome["index"].to_numpy() != np.arange(len(rows)) - firsts[rows]).any():
        raise BooksError("An image stands twice in a part, and another not at all; nothing is published.")


def _read_part(run: Run, receipt: Mapping[str, Any], number: int) -> pa.Table:
    data = run.staged.join(receipt["part"]).read()
    if sha256(data) != receipt["part_sha256"]:
        raise BooksError(
            f"The staged part {receipt['part']} differs from its receipt; nothing is published. "
            f"Delete its receipt in {run.staged.url} and run the same command again to redo its images."
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


def make_visible(output: Place, run: Run, report: Mapping[str, Any], still_mine: Callable[[], None]) -> None:
    """Publish: the report, then `latest.json` by compare-and-swap, the one moment in which the table changes.

    Args:
        output: the folder whose table this becomes.
        run: the run, its tables written.
        report: what `report.json` says.
        still_mine: raises if the lease is no longer ours; asked right before the flip.
    """
    run.place.join(schema.REPORT).write(schema.seal(report))
    if run.on and run.on != ledger.read_latest(output):
        raise BooksError(
            f"The table is no longer the one that run {run.run_id} adds to; nothing is published. Delete {run.place.url} and "
            "run the same command again."
        )
    flip(output, run, report, still_mine)


def flip(output: Place, run: Run, report: Mapping[str, Any], still_mine: Callable[[], None]) -> None:
    """Make a run, with those it adds to, the table."""
    place = output.join(schema.LATEST)
    old = place.read() if place.exists() else None
    pointer = {
        "schema_version": schema.SCHEMA_VERSION,
        "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "runs": [*run.on, {"run_id": run.run_id, "books_sha256": books_digest(report)}],
    }
    still_mine()
    if not place.swap(schema.seal(pointer), old):
        raise BooksError(
            f"{place.url} was changed by somebody else while run {run.run_id} was publishing; run the same command again."
        )


def books_digest(report: Mapping[str, Any]) -> str:
    """sha256 of what of a report follows from manifest and plan alone, whoever writes it, however long it took."""
    names = ["listed", "predicted", "failed", "failed_by_kind", "labels", "manifest_sha256", "files"]
    names += [name for name in ("on", "removed_sha256") if name in report]
    return sha256(json.dumps({name: report[name] for name in names}, sort_keys=True).encode())


def tidy(run: Run) -> None:
    """After the flip: remove what was staged for the run, then mark it as complete."""
    run.staged.delete()
    run.place.join(schema.SUCCESS).write(b"")
