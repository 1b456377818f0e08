"""The published runs of an output -> SQL views of its table, for DuckDB."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tlbatch import schema
from tlbatch.output.run import Run
from tlbatch.schema import PART_SUFFIX
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
    return "\n".join(_view(folder, runs, names) for folder, names in _tables(runs))


def _tables(runs: Sequence[Run]) -> Iterator[tuple[str, list[list[str]]]]:
    """The name of each table, and for each run the names of its files."""
    for folder in FOLDERS:
        names = [[name for name in run.location.join(folder).names() if name.endswith(PART_SUFFIX)] for run in runs]
        if any(names):
            yield folder, names


def _view(folder: str, runs: Sequence[Run], names: Sequence[Sequence[str]]) -> str:
    selects, newer = list[str](), list[Location]()
    for run, own in zip(reversed(runs), reversed(names), strict=True):
        if own:
            files = _files([run.location.join(folder, name) for name in own])
            # A row is hidden if a newer run lists its object, or removes it.
            hidden = f"\n    anti join (select uri from {_files(newer)}) using (uri)" if newer else ""  # noqa: S608  # quoted
            selects.append(f"select * from {files}{hidden}")  # noqa: S608  # quoted
        newer += [run.location.join(name) for name in (schema.MANIFEST, *_removed(run))]
    body = "\nunion all by name\n".join(reversed(selects))
    return f"create or replace view {folder} as\n{body};\n"


def _removed(run: Run) -> tuple[str, ...]:
    return (schema.REMOVED,) if "removed_sha256" in run.facts else ()


def _files(files: Sequence[Location]) -> str:
    """A table function that reads some Parquet files; what they do not all have is null."""
    return f"read_parquet([{', '.join(map(_quoted, files))}], union_by_name = true)"


def _quoted(file: Location) -> str:
    """A file's name as a text of SQL, in which no letter stands for others."""
    name = str(file.path) if isinstance(file, LocalLocation) else file.url
    return "'" + re.sub(r"([*?\[])", r"[\1]", name).replace("'", "''") + "'"
