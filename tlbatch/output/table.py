"""An output folder -> its table: for each image the row of the newest published run that lists its object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch import schema
from tlbatch.errors import OutputError
from tlbatch.output.documents import PublishedFile
from tlbatch.output.run import Run, read_table_runs
from tlbatch.output.snapshot import snapshot
from tlbatch.schema import from_parquet
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import open_range_file
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    import pandas as pd


class FileRange(NamedTuple):
    """A half-open range of manifest rows, and the published files that hold its images: path below the run -> its facts."""

    start: int
    end: int
    files: Mapping[str, PublishedFile]


def file_ranges(files: Mapping[str, PublishedFile], *, predictions: bool = True) -> list[FileRange]:
    """The published files of a run by their range of manifest rows, in order; every row is in one range.

    Args:
        files: as `report.json` names them.
        predictions: whether the files of predictions are wanted.
    """
    found: dict[tuple[int, int], dict[str, PublishedFile]] = {}
    for name, facts in files.items():
        # A range without features and without a failed image has a file of predictions only.
        of_range = found.setdefault((facts["objects"][0], facts["objects"][1]), {})
        if predictions or not name.startswith("predictions/"):
            of_range[name] = facts
    return [FileRange(start, end, found[start, end]) for start, end in sorted(found)]


def read_predictions(
    output: str, columns: Sequence[str] | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The predictions of an output: one row an image, columns as in `docs/formats.md`.

    Args:
        output: the output folder or URL.
        columns: only these columns.
        storage_options: fsspec's options for it.

    Raises:
        OutputError: nothing is published there.
    """
    frame: pd.DataFrame = read_published(output, "predictions", columns, storage_options).to_pandas()
    return frame


def read_errors(
    output: str, columns: Sequence[str] | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The images of an output that could not be classified, and why; else as `read_predictions`."""
    frame: pd.DataFrame = read_published(output, "errors", columns, storage_options).to_pandas()
    return frame


def require_published(location: Location) -> list[Run]:
    """The runs that make up an output's table, the oldest first; raises OutputError where there are none."""
    found = read_table_runs(location)
    if not found:
        raise OutputError(f"Nothing is published at {location.url}: it has no {schema.LATEST}.")
    return found


def read_published(output: str, folder: str, columns: Sequence[str] | None, options: Mapping[str, Any] | None) -> pa.Table:
    """One of an output's tables, `predictions`, `errors` or `features`, in the columns asked for."""
    table = read_table(require_published(resolve(output, options)), folder, _with_names(columns))
    return table if columns is None else table.select(list(columns))


def _with_names(columns: Sequence[str] | None) -> list[str] | None:
    """Columns, and what tells one image from another."""
    return None if columns is None else list(dict.fromkeys([*columns, "key", "uri"]))


def read_table(runs: Sequence[Run], folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One table of the runs that make it up, the oldest first; `columns` must hold `uri`."""
    current = [one.current_rows(read_run_table(one.run.location, folder, columns)) for one in snapshot(runs)]
    return pa.concat_tables(reversed(current))


def read_run_table(run: Location, folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One table of one published run, its parts joined in order."""
    wanted = list(columns) if columns is not None else None
    return pa.concat_tables([from_parquet(part.read(), wanted) for part in _parts(run, folder)])


def current_parts(runs: Sequence[Run], folder: str) -> list[tuple[Location, pa.ChunkedArray]]:
    """The published files of a table, the oldest first, each with the uris of which a newer run has something else to say."""
    found = [(part, one.superseded) for one in snapshot(runs) for part in reversed(_parts(one.run.location, folder))]
    return found[::-1]


def read_part(part: Location, superseded: pa.ChunkedArray, columns: Sequence[str] | None) -> pa.Table:
    """One of them, as `parts_of` gives it, without the rows that are superseded."""
    table = from_parquet(part.read(), _with_names(columns))
    table = table.filter(pc.invert(pc.is_in(table["uri"], superseded)))
    return table if columns is None else table.select(list(columns))


def read_groups(runs: Sequence[Run], folder: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """One table of the runs that make it up in pieces of at most 65,536 rows, the oldest first; `columns` hold `uri`.

    However large the table is, one piece and the uris of newer runs are held at a time.
    """
    for one in reversed(list(snapshot(runs))):
        for part in _parts(one.run.location, folder):
            yield from (one.current_rows(piece) for piece in _row_groups(part, columns))


def read_manifest_rows(runs: Sequence[Run], uris: pa.Array) -> pa.Table:
    """The rows of the runs' manifests that have some uris, of each uri the newest run's."""
    found = [
        one.current_rows(piece.filter(pc.is_in(piece["uri"], uris)))
        for one in snapshot(runs)
        for piece in _row_groups(one.run.location.join(schema.MANIFEST), schema.MANIFEST_SCHEMA.names)
    ]
    return pa.concat_tables([schema.MANIFEST_SCHEMA.empty_table(), *found])


def _parts(run: Location, folder: str) -> list[Location]:
    names = [name for name in run.join(folder).names() if name.endswith(schema.PART_SUFFIX)]
    if not names:
        raise OutputError(f"The run {run.url} has no {folder}.")
    return [run.join(folder, name) for name in names]


def _row_groups(part: Location, columns: Sequence[str]) -> Iterator[pa.Table]:
    info = part.info()
    if info is None:
        raise OutputError(f"{part.url} is missing; `tlbatch verify` says what else is.")
    file = pq.ParquetFile(open_range_file(part, info.size))
    for number in range(file.num_row_groups):
        yield file.read_row_group(number, columns=list(columns))
