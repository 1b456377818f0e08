"""An output folder -> the table: of each image the row of the newest published run that has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tlbatch import ledger, schema
from tlbatch.errors import OutputError
from tlbatch.ledger import Run, read_latest
from tlbatch.overlay import layers
from tlbatch.schema import from_parquet
from tlbatch.storage import Place, resolve

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
    return _read(output, "predictions", columns, storage_options)


def read_errors(
    output: str, columns: Sequence[str] | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The images of an output that could not be classified, and why; else as `read_predictions`."""
    return _read(output, "errors", columns, storage_options)


def _read(output: str, folder: str, columns: Sequence[str] | None, options: Mapping[str, Any] | None) -> pd.DataFrame:
    place = resolve(output, options)
    entries = read_latest(place)
    if not entries:
        raise OutputError(f"Nothing is published at {place.url}: it has no {schema.LATEST}.")
    wanted = list(columns) if columns is not None else None
    needed = None if wanted is None else list(dict.fromkeys([*wanted, "key", "uri"]))
    table = read_table(ledger.read_published(place, entries), folder, needed)
    frame: pd.DataFrame = table.to_pandas()
    return frame if wanted is None else frame[wanted]


def read_table(runs: Sequence[Run], folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One table of the runs that make it up, the oldest first; `columns` must hold `uri`."""
    seen = [layer.visible(read_run_table(layer.run.place, folder, columns)) for layer in layers(runs)]
    return pa.concat_tables(reversed(seen))


def read_run_table(run: Place, folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One table of one published run, its parts joined in order."""
    names = [name for name in run.join(folder).names() if name.endswith(schema.PART_SUFFIX)]
    if not names:
        raise OutputError(f"The run {run.url} has no {folder}.")
    wanted = list(columns) if columns is not None else None
    return pa.concat_tables([from_parquet(run.join(folder, name).read(), wanted) for name in names])
