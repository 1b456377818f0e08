"""The published runs of an output -> SQL views of its table, for DuckDB."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tlbatch import schema
from tlbatch.output.run import Run
from tlbatch.output.table import parts_of
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.location import Location

#: The tables of an output that become views, as far as it has them.
FOLDERS = ("predictions", "errors", "features")


def views_of(runs: Sequence[Run]) -> str:
    """Statements that create a view for each table of an output, with its current rows.

    A view names the files of the runs that make up the table now: after the next run, make it anew.

    Args:
        runs: the runs that make up the output, the oldest first.
    """
    views = {folder: _selects(folder, runs) for folder in FOLDERS}
    joined = {folder: "\nunion all by name\n".join(selects) for folder, selects in views.items() if selects}
    return "\n".join(f"create or replace view {folder} as\n{body};\n" for folder, body in joined.items())


def _selects(folder: str, runs: Sequence[Run]) -> list[str]:
    """For each run that has a table, the oldest first, the query of its current rows."""
    found, newer = list[str](), list[Location]()
    for run in reversed(runs):
        own = parts_of(run.location, folder)
        if own:
            # A row is hidden if a newer run lists its object, or removes it.
            hidden = f"\n    anti join (select uri from {_files(newer)}) using (uri)" if newer else ""  # noqa: S608  # quoted
            found.append(f"select * from {_files(own)}{hidden}")  # noqa: S608  # quoted
        newer.append(run.location.join(schema.MANIFEST))
        newer += [run.location.join(schema.REMOVED)] if "removed_sha256" in run.facts else []
    return found[::-1]


def _files(files: Sequence[Location]) -> str:
    """A table function that reads some Parquet files; what they do not all have is null."""
    return f"read_parquet([{', '.join(map(_quoted, files))}], union_by_name = true)"


def _quoted(file: Location) -> str:
    """A file's name as a text of SQL, in which no letter stands for others."""
    name = str(file.path) if isinstance(file, LocalLocation) else file.url
    return "'" + re.sub(r"([*?\[])", r"[\1]", name).replace("'", "''") + "'"
