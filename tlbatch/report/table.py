"""An output folder -> the table: of each image the row of the newest published run that has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch import ledger, schema
from tlbatch.errors import OutputError
from tlbatch.ledger import Run
from tlbatch.overlay import layers
from tlbatch.schema import from_parquet
from tlbatch.storage import Place, open_patiently, resolve

if TYPE_CHECKING:
    import pandas as pd


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


def published(place: Place) -> list[Run]:
    """The runs that make up an output's table, the oldest first; raises OutputError where there are none."""
    found = ledger.published_runs(place)
    if not found:
        raise OutputError(f"Nothing is published at {place.url}: it has no {schema.LATEST}.")
    return found


def read_published(output: str, folder: str, columns: Sequence[str] | None, options: Mapping[str, Any] | None) -> pa.Table:
    """One of an output's tables, `predictions`, `errors` or `features`, in the columns asked for."""
    table = read_table(published(resolve(output, options)), folder, _with_names(columns))
    return table if columns is None else table.select(list(columns))


def _with_names(columns: Sequence[str] | None) -> list[str] | None:
    """Columns, and what tells one image from another."""
    return None if columns is None else list(dict.fromkeys([*columns, "key", "uri"]))


def read_table(runs: Sequence[Run], folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One table of the runs that make it up, the oldest first; `columns` must hold `uri`."""
    seen = [layer.visible(read_run_table(layer.run.place, folder, columns)) for layer in layers(runs)]
    return pa.concat_tables(reversed(seen))


def read_run_table(run: Place, folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One table of one published run, its parts joined in order."""
    wanted = list(columns) if columns is not None else None
    return pa.concat_tables([from_parquet(part.read(), wanted) for part in _parts(run, folder)])


def parts_of(runs: Sequence[Run], folder: str) -> list[tuple[Place, pa.ChunkedArray]]:
    """The published files of a table, the oldest first, each with the uris of which a newer run has something else to say."""
    found = [(part, layer.hidden) for layer in layers(runs) for part in reversed(_parts(layer.run.place, folder))]
    return found[::-1]


def read_part(part: Place, hidden: pa.ChunkedArray, columns: Sequence[str] | None) -> pa.Table:
    """One of them, as `parts_of` gives it, without the rows that are hidden."""
    table = from_parquet(part.read(), _with_names(columns))
    table = table.filter(pc.invert(pc.is_in(table["uri"], hidden)))
    return table if columns is None else table.select(list(columns))


def read_groups(runs: Sequence[Run], folder: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """One table of the runs that make it up in pieces of at most 65,536 rows, the oldest first; `columns` hold `uri`.

    However large the table is, one piece and the uris of newer runs are held at a time.
    """
    for layer in reversed(list(layers(runs))):
        for part in _parts(layer.run.place, folder):
            yield from (layer.visible(piece) for piece in _row_groups(part, columns))


def read_promised(runs: Sequence[Run], uris: pa.Array) -> pa.Table:
    """The rows of the runs' manifests that have some uris, of each uri the newest run's."""
    found = [
        layer.visible(piece.filter(pc.is_in(piece["uri"], uris)))
        for layer in layers(runs)
        for piece in _row_groups(layer.run.place.join(schema.MANIFEST), schema.MANIFEST_SCHEMA.names)
    ]
    return pa.concat_tables([schema.MANIFEST_SCHEMA.empty_table(), *found])


def _parts(run: Place, folder: str) -> list[Place]:
    names = [name for name in run.join(folder).names() if name.endswith(schema.PART_SUFFIX)]
    if not names:
        raise OutputError(f"The run {run.url} has no {folder}.")
    return [run.join(folder, name) for name in names]


def _row_groups(part: Place, columns: Sequence[str]) -> Iterator[pa.Table]:
    info = part.info()
    if info is None:
        raise OutputError(f"{part.url} is missing; `tlbatch verify` says what else is.")
    file = pq.ParquetFile(open_patiently(part, info.size))
    for number in range(file.num_row_groups):
        yield file.read_row_group(number, columns=list(columns))
