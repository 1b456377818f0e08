"""A published table -> its rows, in the form that the caller works with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import pyarrow as pa

from tlbatch.errors import ConfigError
from tlbatch.output import table
from tlbatch.output.filters import Filters
from tlbatch.schema import to_frame
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    import pandas as pd


@overload
def read_predictions(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["pandas"] = "pandas",
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> pd.DataFrame: ...


@overload
def read_predictions(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["arrow"],
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> pa.Table: ...


@overload
def read_predictions(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["batches"],
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[pa.RecordBatch]: ...


@overload
def read_predictions(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["ray"],
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Any: ...


def read_predictions(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["pandas", "arrow", "batches", "ray"] = "pandas",  # noqa: A002 - the word a reader looks for
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """The predictions of an output: one row per image, columns as in `docs/formats.md`.

    Args:
        output: the output folder or URL.
        columns: only these columns.
        format: pandas for a DataFrame, arrow for a `pyarrow.Table`, both with the rows of the oldest run first; batches for an
            iterator of `pyarrow.RecordBatch` of at most 65,536 rows in the order of their uris (as UTF-8 bytes), the images of
            a shard in the order of the shard; ray for a `ray.data.Dataset` that reads each published file where its rows are
            used. Batches are read as they are asked for, after the uris alone: a few pieces of each run are in memory. A
            table that is not in the order of its uris, as one of a list of addresses may be, is sorted first.
        filters: only these rows, as pyarrow takes them: `[("score", "<", 0.6)]`, a list of such lists of which one must hold,
            or a `pyarrow.compute.Expression`. Row groups that cannot have such rows are not read. A row that a newer run has
            replaced is not in the table, whatever the filters say of either.
        storage_options: fsspec's options for the output.

    Raises:
        OutputError: nothing is published there.
        ConfigError: the format is unknown, or the filters name a column that is not there.
    """
    return _read(output, "predictions", columns, format, filters, storage_options)


@overload
def read_errors(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["pandas"] = "pandas",
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> pd.DataFrame: ...


@overload
def read_errors(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["arrow"],
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> pa.Table: ...


@overload
def read_errors(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["batches"],
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[pa.RecordBatch]: ...


@overload
def read_errors(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["ray"],
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Any: ...


def read_errors(
    output: str,
    columns: Sequence[str] | None = None,
    *,
    format: Literal["pandas", "arrow", "batches", "ray"] = "pandas",  # noqa: A002 - as in `read_predictions`
    filters: Filters | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """The images of an output that could not be classified, with the reasons. Arguments and errors as in `read_predictions`."""
    return _read(output, "errors", columns, format, filters, storage_options)


def _read(
    output: str,
    folder: str,
    columns: Sequence[str] | None,
    form: str,
    filters: Filters | None,
    storage_options: Mapping[str, Any] | None,
) -> Any:
    if form not in ("pandas", "arrow", "batches", "ray"):
        raise ConfigError(f"format: write pandas, arrow, batches or ray; found {form!r}.")
    if form in ("pandas", "arrow"):
        found = table.read_published(output, folder, columns, storage_options, filters)
        return found if form == "arrow" else to_frame(found)
    runs = table.require_published(resolve(output, storage_options))
    if form == "batches":
        return table.read_batches(runs, folder, columns, filters)
    from tlbatch.execution.executor import lazy_dataset
    from tlbatch.execution.session import start_ray_for_process

    wanted = list(columns) if columns is not None else None
    where = table.where_of(filters, folder)
    start_ray_for_process()
    return lazy_dataset(table.current_parts(runs, folder), lambda part: table.read_part(part[0], part[1], wanted, where))
