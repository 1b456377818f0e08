"""`tlbatch sql`: an output -> SQL views of its table; and a query of them, answered by DuckDB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from tlbatch.config import SqlConfig
from tlbatch.errors import ConfigError, line_of
from tlbatch.output.table import require_published
from tlbatch.output.views import views_of
from tlbatch.storage.resolve import REMOTE, resolve

if TYPE_CHECKING:
    import duckdb


def sql(config: SqlConfig) -> dict[str, Any]:
    """The views of an output, or the answer to a query of them.

    Returns:
        `views`: the statements that create them. With a query instead `columns`, its names, and `rows`, lists of values.

    Raises:
        OutputError: nothing is published there.
        ConfigError: DuckDB is not installed, or does not take the query.
    """
    output = resolve(config.output, config.storage_options)
    views = views_of(require_published(output))
    if config.query is None:
        return {"views": views}
    with _connection() as connection:
        if isinstance(output, REMOTE):
            connection.register_filesystem(output.filesystem)
        connection.execute(views)
        return _answer(connection, config.query)


def _connection() -> duckdb.DuckDBPyConnection:
    try:
        import duckdb
    except ImportError:
        raise ConfigError("A query needs the package duckdb: install tlbatch[sql].") from None
    return duckdb.connect()


def _answer(connection: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    import duckdb

    try:
        found = connection.execute(query)
        names = [column[0] for column in found.description or ()]
        rows = from_json(to_json(found.fetchall() if names else [], inf_nan_mode="strings"))
    except duckdb.Error as error:
        raise ConfigError(f"query: {line_of(error)}.") from None
    return {"columns": names, "rows": rows}
