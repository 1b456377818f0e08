"""What a reader wants of a table's rows -> an expression of Arrow, the row groups that may have such rows, and the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch.errors import ConfigError

#: As pyarrow takes them: tuples of column, operator and value that all must hold, a list of such lists of which one must, or
#: an expression.
Filters: TypeAlias = pc.Expression | Sequence[tuple[str, str, Any]] | Sequence[Sequence[tuple[str, str, Any]]]


def expression_of(filters: Filters | None, columns: pa.Schema) -> pc.Expression | None:
    """The filters as one expression; None without filters.

    Raises:
        ConfigError: they name no column of a table, or are none of the forms.
    """
    if filters is None:
        return None
    try:
        where = pq.filters_to_expression(filters)
        matching_rows(columns.empty_table(), where)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise ConfigError(f"filters: {str(error).splitlines()[0]}") from error
    return where


def columns_of(where: pc.Expression, columns: pa.Schema) -> list[str]:
    """Columns that an expression names, and perhaps some that it does not; all if it names one by its place."""
    text = str(where)
    return [name for name in columns.names if name in text or "FieldPath" in text]


def matching_rows(table: pa.Table, where: pc.Expression) -> pa.Table:
    """The rows of a table that an expression selects. `pa.Table.filter` would start threads, as `schema.from_parquet` says."""
    from pyarrow.acero import Declaration, FilterNodeOptions, TableSourceNodeOptions

    source = Declaration("table_source", TableSourceNodeOptions(table))
    return Declaration.from_sequence([source, Declaration("filter", FilterNodeOptions(where))]).to_table(use_threads=False)


def matching_groups(source: Any, where: pc.Expression, columns: pa.Schema) -> Iterator[int]:
    """The row groups of a file whose statistics do not exclude that they have rows that an expression selects."""
    from pyarrow.dataset import ParquetFileFormat

    fragment = ParquetFileFormat().make_fragment(source)
    return (group.id for group in fragment.subset(where, schema=columns).row_groups)
