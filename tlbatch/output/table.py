"""An output folder -> its table: for each image, the row of the newest published run that lists its object."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch import schema
from tlbatch.errors import OutputError
from tlbatch.output.documents import PublishedFile
from tlbatch.output.ranges import manifest_pieces, pieces_of
from tlbatch.output.run import Run, read_table_runs
from tlbatch.output.snapshot import UriSet, current_in_range, snapshot
from tlbatch.schema import from_parquet
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import open_range_file
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    import pandas as pd


#: Sources of one run in `sources_of_table`.
SOURCES = 3


class FileRange(NamedTuple):
    """A half-open range of manifest rows, and the published files with its images: path below the run -> facts of the file."""

    start: int
    end: int
    files: Mapping[str, PublishedFile]


def file_ranges(files: Mapping[str, PublishedFile], *, predictions: bool = True) -> list[FileRange]:
    """The published files of a run by range of manifest rows, in order. Every row is in exactly one range.

    Args:
        files: `files` of `report.json`.
        predictions: whether to include the files of predictions.
    """
    found: dict[tuple[int, int], dict[str, PublishedFile]] = {}
    for name, facts in files.items():
        # If the only file of a range is a file of predictions, the range is kept even if predictions are not included.
        of_range = found.setdefault((facts["objects"][0], facts["objects"][1]), {})
        if predictions or not name.startswith("predictions/"):
            of_range[name] = facts
    return [FileRange(start, end, found[start, end]) for start, end in sorted(found)]


def read_predictions(
    output: str, columns: Sequence[str] | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The predictions of an output: one row per image, with the columns described in `docs/formats.md`.

    Args:
        output: the output folder or URL.
        columns: the columns to read; None reads all.
        storage_options: fsspec options for the output.

    Raises:
        OutputError: nothing is published there.
    """
    return schema.to_frame(read_published(output, "predictions", columns, storage_options))


def read_errors(
    output: str, columns: Sequence[str] | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The images of an output that could not be classified, with the reasons. Arguments and errors as in `read_predictions`."""
    return schema.to_frame(read_published(output, "errors", columns, storage_options))


def require_published(location: Location) -> list[Run]:
    """The runs that make up the table of an output, the oldest first; raises OutputError if nothing is published."""
    found = read_table_runs(location)
    if not found:
        raise OutputError(f"Nothing is published at {location.url}: it has no {schema.LATEST}.")
    return found


def read_published(output: str, folder: str, columns: Sequence[str] | None, options: Mapping[str, Any] | None) -> pa.Table:
    """One table of an output, `predictions`, `errors` or `features`, with the requested columns."""
    table = read_table(require_published(resolve(output, options)), folder, _with_names(columns))
    return table if columns is None else table.select(list(columns))


def _with_names(columns: Sequence[str] | None) -> list[str] | None:
    """The requested columns plus `key` and `uri`, which identify an image."""
    return None if columns is None else list(dict.fromkeys([*columns, "key", "uri"]))


def read_table(runs: Sequence[Run], folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The current rows of one table of an output.

    Args:
        runs: the runs that make up the output, the oldest first.
        folder: `predictions`, `errors` or `features`.
        columns: must include `uri`; None reads all columns.
    """
    current = [one.current_rows(read_run_table(one.run.location, folder, columns)) for one in snapshot(runs)]
    return pa.concat_tables(reversed(current), promote_options="default")


def read_run_table(run: Location, folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One table of one published run: its files concatenated in order."""
    return pa.concat_tables([_read_rows(part.read(), columns) for part in _parts(run, folder)])


def _read_rows(data: bytes, columns: Sequence[str] | None) -> pa.Table:
    """The rows of a published file; `index` is null in a file that is older than this column."""
    lacks_index = schema.INDEX not in pq.read_schema(pa.BufferReader(data)).names
    wanted = None if columns is None else [name for name in columns if not (lacks_index and name == schema.INDEX)]
    table = from_parquet(data, wanted)
    if lacks_index and (columns is None or schema.INDEX in columns):
        table = table.append_column(schema.INDEX, pa.nulls(table.num_rows, pa.int32()))
    return table


def current_parts(runs: Sequence[Run], folder: str) -> list[tuple[Location, UriSet]]:
    """The published files of a table, the oldest first, each with the uris that newer runs have superseded."""
    found = [(part, one.superseded) for one in snapshot(runs) for part in reversed(_parts(one.run.location, folder))]
    return found[::-1]


def read_part(part: Location, superseded: UriSet, columns: Sequence[str] | None) -> pa.Table:
    """The current rows of a file from `current_parts`."""
    table = _read_rows(part.read(), _with_names(columns))
    table = table.filter(pa.array(~superseded.holds(table["uri"])))
    return table if columns is None else table.select(list(columns))


def read_groups(runs: Sequence[Run], folder: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The current rows of one table of an output, in batches of at most 65,536 rows, the oldest run first.

    Memory use does not depend on the size of the table: one batch and the uris of newer runs are in memory at a time. `columns`
    must include `uri`.
    """
    return (rows for rows, _ in read_groups_beside(runs, (), folder, columns))


def read_groups_beside(
    runs: Sequence[Run], earlier: Sequence[Run], folder: str, columns: Sequence[str]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The current rows of two tables, each as `read_groups` gives them, a batch of each at a time.

    If the second table is what the first one was before its newest runs, every file is read once.

    Args:
        runs: the runs that make up the first table, the oldest first.
        earlier: the runs that make up the second one.
        folder: `predictions`, `errors` or `features`.
        columns: must include `uri`.
    """
    if [run.run_id for run in earlier] != [run.run_id for run in runs[: len(earlier)]]:
        yield from ((rows, rows.slice(0, 0)) for rows in read_groups(runs, folder, columns))
        yield from ((rows.slice(0, 0), rows) for rows in read_groups(earlier, folder, columns))
        return
    for now, before in itertools.zip_longest(*(reversed(list(snapshot(table))) for table in (runs, earlier))):
        for part in _parts(now.run.location, folder):
            for rows in _row_groups(part, columns):
                yield now.current_rows(rows), before.current_rows(rows) if before else rows.slice(0, 0)


def sources_of_table(runs: Sequence[Run], folder: str, columns: Sequence[str]) -> list[Iterator[pa.Table]]:
    """The rows of one table of an output, for `read_in_ranges`; `current_of` makes the rows of a range out of what comes.

    Args:
        runs: the runs that make up the output, the oldest first.
        folder: `predictions`, `errors` or `features`.
        columns: must include `uri`.
    """
    found: list[Iterator[pa.Table]] = []
    for run in reversed(runs):
        hides = run is not runs[0]  # the oldest run hides nothing
        listed = manifest_pieces(run, ["uri"]) if hides else pieces_of(schema.REMOVED_SCHEMA.empty_table())
        found += [_pieces_of_parts(run, folder, columns), listed, pieces_of(run.removed)]
    return found


def current_of(rows: Sequence[pa.Table]) -> pa.Table:
    """The current rows of a range of uris, of what `read_in_ranges` gives for `sources_of_table`."""
    return pa.concat_tables(current_in_range(rows[::SOURCES], rows[1::SOURCES], rows[2::SOURCES]))


def _pieces_of_parts(run: Run, folder: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    for part in _parts(run.location, folder):
        yield from (rows.select(list(columns)) for rows in _row_groups(part, columns))


def read_manifest_rows(runs: Sequence[Run], uris: pa.Array) -> pa.Table:
    """The manifest rows with the given uris. If several runs list a uri, the rows of the newest run are returned."""
    found = [
        one.current_rows(rows.filter(pc.is_in(rows["uri"], uris)))
        for one in snapshot(runs)
        for rows in _row_groups(one.run.location.join(schema.MANIFEST), schema.MANIFEST_SCHEMA.names)
    ]
    return pa.concat_tables([schema.MANIFEST_SCHEMA.empty_table(), *found])


def _parts(run: Location, folder: str) -> list[Location]:
    names = [name for name in run.join(folder).names() if name.endswith(schema.PART_SUFFIX)]
    if not names:
        raise OutputError(f"The run {run.url} has no {folder}.")
    return [run.join(folder, name) for name in names]


def _row_groups(part: Location, columns: Sequence[str]) -> Iterator[pa.Table]:
    file = _open(part)
    if not file.num_row_groups:
        yield file.schema_arrow.empty_table().select(list(columns))
    for number in range(file.num_row_groups):
        yield file.read_row_group(number, columns=list(columns), use_threads=False)


def _open(part: Location) -> pq.ParquetFile:
    info = part.info()
    if info is None:
        raise OutputError(f"{part.url} is missing. Run `tlbatch verify` for details.")
    return pq.ParquetFile(open_range_file(part, info.size))


def count_rows(run: Run, folder: str) -> int:
    """How many rows the files of one table of a run have, superseded ones included."""
    return sum(_open(part).metadata.num_rows for part in _parts(run.location, folder))


def read_rows(runs: Sequence[Run], folder: str, columns: Sequence[str], rows: np.ndarray) -> pa.Table:
    """Some rows of one table of an output; row groups without one of them are not read.

    Args:
        runs: the runs that make up the output, the oldest first.
        folder: `predictions`, `errors` or `features`.
        columns: the columns to read.
        rows: (n,) int, sorted: the place of each wanted row among all rows of the runs, superseded ones included.
    """
    found, start = list[pa.Table](), 0
    for file in (_open(part) for run in runs for part in _parts(run.location, folder)):
        found.append(file.schema_arrow.empty_table().select(list(columns)))
        for number in range(file.num_row_groups):
            end = start + file.metadata.row_group(number).num_rows
            own = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
            if len(own):
                found.append(file.read_row_group(number, columns=list(columns), use_threads=False).take(own))
            start = end
    return pa.concat_tables(found)
