"""A Delta or Iceberg table -> its rows, as engines read them that did not write it. Run by the Python of `.venv-lakes`.

DuckDB's reader of Iceberg needs an extension that is in no package.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path


def by_duckdb(table: str) -> list[dict]:
    """A Delta table by DuckDB's own reader."""
    import duckdb

    package = Path(find_spec("duckdb_extension_delta").origin).parent
    connection = duckdb.connect()
    connection.execute(f"LOAD '{package}/extensions/v{duckdb.__version__}/delta.duckdb_extension'")
    found = connection.execute(f"SELECT * FROM delta_scan('{table}') ORDER BY uri")
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def by_polars(table: str) -> list[dict]:
    """A Delta table, or an Iceberg table by its metadata, by Polars' own reader of its files."""
    import polars

    rows = polars.scan_iceberg(table, reader_override="native") if table.endswith(".json") else polars.scan_delta(table)
    return rows.sort("uri").collect().to_dicts()


if __name__ == "__main__":
    engines = [by_polars] if sys.argv[1].endswith(".json") else [by_duckdb, by_polars]
    print(json.dumps({engine.__name__: engine(sys.argv[1]) for engine in engines}))
