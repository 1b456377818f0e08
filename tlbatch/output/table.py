"""An output folder -> its table: for each image, the row of the newest published run that lists its object."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch import schema
from tlbatch.errors import OutputError
from tlbatch.output.documents import PublishedFile
from tlbatch.output.filters import Filters, columns_of, expression_of, matching_groups, matching_rows
from tlbatch.output.ranges import iterate_ranges, pieces_of
from tlbatch.output.run import Run, read_table_runs
from tlbatch.output.snapshot import SnapshotRun, UriSet, current_in_range, snapshot
from tlbatch.schema import from_parquet
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import RangeFile, open_range_file
from tlbatch.storage.resolve import resolve

#: Sources of one run in `sources_of_table`.
SOURCES = 3
_COLUMNS = {"predictions": schema.PREDICTIONS, "errors": schema.ERRORS}


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


def require_published(location: Location) -> list[Run]:
    """The runs that make up the table of an output, the oldest first; raises OutputError if nothing is published."""
    found = read_table_runs(location)
    if not found:
        raise OutputError(f"Nothing is published at {location.url}: it has no {schema.LATEST}.")
    return found


def read_published(
    output: str,
    folder: str,
    columns: Sequence[str] | None,
    options: Mapping[str, Any] | None,
    filters: Filters | None = None,
) -> pa.Table:
    """One table of an output, `predictions` or `errors`, with the requested columns and the rows that filters select."""
    runs, where = require_published(resolve(output, options)), where_of(filters, folder)
    if where is None:
        table = read_table(runs, folder, _with_names(columns))
    else:
        names = _with_names(columns) or _COLUMNS[folder].names
        table = pa.concat_tables([_COLUMNS[folder].empty_table().select(names), *read_groups(runs, folder, names, where)])
    return table if columns is None else table.select(list(columns))


def read_batches(
    runs: Sequence[Run], folder: str, columns: Sequence[str] | None, filters: Filters | None
) -> Iterator[pa.RecordBatch]:
    """The current rows of one table of an output in the order of their uris, at most 65,536 at a time.

    Args:
        runs: the runs that make up the output, the oldest first.
        folder: `predictions` or `errors`.
        columns: the columns to read; None reads all columns.
        filters: which of the current rows are wanted.
    """
    where = where_of(filters, folder)
    names = _COLUMNS[folder].names if columns is None else list(columns)

    def sources() -> list[Iterator[pa.Table]]:
        return sources_of_table(runs, folder, list(dict.fromkeys([*names, "uri"])), where)

    ranges = iterate_ranges(sources, lambda: sources_of_table(runs, folder, ["uri"]))
    tables = (schema.sort_rows(current_of(rows), "uri").select(names) for rows in ranges)
    return (batch for rows in tables for batch in rows.to_batches() if batch.num_rows)


def where_of(filters: Filters | None, folder: str) -> pc.Expression | None:
    """The filters of a reader of `predictions` or `errors`; raises ConfigError if they do not fit its columns."""
    return expression_of(filters, _COLUMNS[folder])


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
    return _with_index(from_parquet(data, wanted), columns)


def _with_index(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """A table with nulls in the column `index` if it is wanted and the table is older than it."""
    if schema.INDEX in table.column_names or not (columns is None or schema.INDEX in columns):
        return table
    return table.append_column(schema.INDEX, pa.nulls(table.num_rows, pa.int32()))


def current_parts(runs: Sequence[Run], folder: str) -> list[tuple[Location, UriSet]]:
    """The published files of a table, the oldest first, each with the uris that newer runs have superseded."""
    found = [(part, one.superseded) for one in snapshot(runs) for part in reversed(_parts(one.run.location, folder))]
    return found[::-1]


def read_part(
    part: Location, superseded: UriSet, columns: Sequence[str] | None, where: pc.Expression | None = None
) -> pa.Table:
    """The current rows of a file from `current_parts`, of which an expression selects some; without columns it selects all."""
    table = _read_rows(part.read(), _with_names(columns) if where is None else None)
    table = table.filter(pa.array(~superseded.holds(table["uri"])))
    table = table if where is None else matching_rows(table, where)
    return table if columns is None else table.select(list(columns))


def read_groups(
    runs: Sequence[Run], folder: str, columns: Sequence[str], where: pc.Expression | None = None
) -> Iterator[pa.Table]:
    """The current rows of one table of an output, in batches of at most 65,536 rows, the oldest run first.

    Memory use does not depend on the size of the table: one batch and the uris of newer runs are in memory at a time.

    Args:
        runs: the runs that make up the output, the oldest first.
        folder: `predictions`, `errors` or `features`.
        columns: must include `uri`.
        where: which of the current rows are wanted.
    """
    for one in reversed(list(snapshot(runs))):
        yield from map(one.current_rows, pieces_of_parts(one.run, folder, columns, where))


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


def sources_of_table(
    runs: Sequence[Run], folder: str, columns: Sequence[str], where: pc.Expression | None = None
) -> list[Iterator[pa.Table]]:
    """The rows of one table of an output, for `read_in_ranges`; `current_of` makes the rows of a range out of what comes.

    Args:
        runs: the runs that make up the output, the oldest first.
        folder: `predictions`, `errors` or `features`.
        columns: must include `uri`.
        where: which rows are wanted. What hides rows of older runs is taken from manifests, so a hidden row stays hidden if
            the row that hides it is not wanted.
    """
    found: list[Iterator[pa.Table]] = []
    for run in reversed(runs):
        hides = run is not runs[0]  # the oldest run hides nothing
        listed = run.manifest_pieces(["uri"]) if hides else pieces_of(schema.REMOVED_SCHEMA.empty_table())
        found += [pieces_of_parts(run, folder, columns, where), listed, pieces_of(run.removed)]
    return found


def current_of(rows: Sequence[pa.Table]) -> pa.Table:
    """The current rows of a range of uris, of what `read_in_ranges` gives for `sources_of_table`."""
    return pa.concat_tables(current_in_range(rows[::SOURCES], rows[1::SOURCES], rows[2::SOURCES]))


def pieces_of_parts(run: Run, folder: str, columns: Sequence[str], where: pc.Expression | None = None) -> Iterator[pa.Table]:
    """All rows of one table of a run, superseded ones included, a row group at a time.

    Args:
        run: a published run.
        folder: `predictions`, `errors` or `features`.
        columns: the columns to read.
        where: which rows are wanted.
    """
    for part in _parts(run.location, folder):
        groups = _row_groups(part, columns) if where is None else _wanted_rows(part, columns, where, _COLUMNS[folder])
        yield from (rows.select(list(columns)) for rows in groups)


def _wanted_rows(part: Location, columns: Sequence[str], where: pc.Expression, whole: pa.Schema) -> Iterator[pa.Table]:
    """The rows that an expression selects; row groups that cannot have any are not read."""
    file, source = _open(part)
    names = list(dict.fromkeys([*columns, *columns_of(where, whole)]))
    yield whole.empty_table()
    for number in matching_groups(source, where, whole):
        yield matching_rows(read_group(file, number, names), where)


def current_runs(runs: Sequence[Run]) -> list[SnapshotRun]:
    """The runs of a table that have any current rows, the newest first."""

    def has_any(one: SnapshotRun) -> bool:
        return any(one.is_current(rows).any() for rows in _row_groups(one.run.location.join(schema.MANIFEST), ["uri"]))

    return list(filter(has_any, snapshot(runs)))


def read_manifest_rows(runs: Sequence[Run], uris: pa.Array) -> pa.Table:
    """The manifest rows with the given uris. If several runs list a uri, the rows of the newest run are returned."""
    found = [
        one.current_rows(rows.filter(pc.is_in(rows["uri"], uris)))
        for one in snapshot(runs)
        for rows in _row_groups(one.run.location.join(schema.MANIFEST), schema.MANIFEST_SCHEMA.names)
    ]
    return pa.concat_tables([schema.MANIFEST_SCHEMA.empty_table(), *found])


def manifest_groups(run: Run, where: pc.Expression) -> Iterator[pa.Table]:
    """The objects of a run's manifest that an expression selects; row groups that cannot have any are not read."""
    whole = schema.MANIFEST_SCHEMA
    return _wanted_rows(run.location.join(schema.MANIFEST), whole.names, where, whole)


def parts_of(run: Location, folder: str) -> list[Location]:
    """The published files of one table of a run, in order; none if the run does not have the table."""
    return [run.join(folder, name) for name in run.join(folder).names() if name.endswith(schema.PART_SUFFIX)]


def _parts(run: Location, folder: str) -> list[Location]:
    found = parts_of(run, folder)
    if not found:
        raise OutputError(f"The run {run.url} has no {folder}.")
    return found


def _row_groups(part: Location, columns: Sequence[str]) -> Iterator[pa.Table]:
    file, _ = _open(part)
    if not file.num_row_groups:
        yield _with_index(file.schema_arrow.empty_table(), columns).select(list(columns))
    for number in range(file.num_row_groups):
        yield read_group(file, number, columns)


def read_group(file: pq.ParquetFile, number: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group of a published file; `index` is null in a file that is older than this column."""
    return _with_index(file.read_row_group(number, columns=list(columns), use_threads=False), columns)


def _open(part: Location) -> tuple[pq.ParquetFile, RangeFile]:
    source = open_range_file(part, part_size(part))
    return pq.ParquetFile(source), source


def part_size(part: Location) -> int:
    """Bytes of a published file; raises OutputError if it is missing."""
    info = part.info()
    if info is None:
        raise OutputError(f"{part.url} is missing. Run `tlbatch verify` for details.")
    return info.size


def count_rows(run: Run, folder: str) -> int:
    """How many rows the files of one table of a run have, superseded ones included."""
    return sum(_open(part)[0].metadata.num_rows for part in _parts(run.location, folder))
