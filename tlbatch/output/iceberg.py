"""A copy of a table's predictions as an Iceberg table, through `pyiceberg` and a catalog of its configuration.

What a copy holds stands in its snapshots: each has the names of the runs that make up the table. A catalog swaps one pointer
from the state that was read to the next, so a copy is changed as a whole or not at all, and of two that change it one fails.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from tlbatch.errors import ConfigError, OutputError, UnfinishedError, line_of
from tlbatch.output.changes import COPIED, RUNS_OF_COPY, Changes

if TYPE_CHECKING:
    from pyiceberg.expressions import BooleanExpression
    from pyiceberg.table import Table, Transaction

#: Bytes of a data file, in memory: some 65,000 rows. A change rewrites the files that it touches.
_FILE_BYTES = 16 << 20
#: In the table's properties: that it is one of ours.
_MARK = "tlbatch.table"
_PROPERTIES = {
    _MARK: "predictions",
    "write.target-file-size-bytes": str(_FILE_BYTES),
    # By default the first 16 letters of a uri are kept, which are often the same in all.
    "write.metadata.metrics.column.uri": "full",
    # A retry would add what another command has added already.
    "commit.retry.num-retries": "0",
}
#: In an expression with at most so many values, each is compared with the range of a file.
_VALUES_AT_ONCE, _MOST_TERMS = 200, 200


class IcebergCopy:
    """An Iceberg table with the predictions of an output.

    Args:
        name: `CATALOG.NAMESPACE.TABLE`; the catalog is one of pyiceberg's configuration.

    Raises:
        ConfigError: the name has fewer parts, or the catalog is not configured.
        OutputError: there is a table that is no copy of an output, or it cannot be read.
    """

    def __init__(self, name: str) -> None:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

        catalog, _, self._identifier = name.partition(".")
        self._namespace, _, table = self._identifier.rpartition(".")
        if not (catalog and self._namespace and table):
            raise ConfigError(f"to: an Iceberg table is named CATALOG.NAMESPACE.TABLE; found {name!r}.")
        self._name = name
        with self._errors_as_sentences():
            self._catalog = load_catalog(catalog)
            self._table: Table | None = None
            with contextlib.suppress(NoSuchTableError, NoSuchNamespaceError):
                self._table = self._catalog.load_table(self._identifier)
        if self._table is not None and _MARK not in self._table.properties:
            raise OutputError(f"{name} is an Iceberg table that `tlbatch sync` did not make. Choose another name.")

    @property
    def runs(self) -> list[str] | None:
        """The runs that made up the table when it was copied; None if there is no copy."""
        snapshot = self._table.current_snapshot() if self._table is not None else None
        while snapshot is not None and self._table is not None:
            if snapshot.summary is not None and RUNS_OF_COPY in snapshot.summary.additional_properties:
                return list(json.loads(snapshot.summary.additional_properties[RUNS_OF_COPY]))
            parent = snapshot.parent_snapshot_id
            snapshot = self._table.snapshot_by_id(parent) if parent is not None else None
        return None

    def replace(self, rows: pa.RecordBatchReader, runs: Sequence[str]) -> None:
        """Make all rows anew, in one commit."""
        with self._errors_as_sentences():
            table = self._table or self._created()
            with self._transaction(table) as transaction:
                transaction.overwrite(rows, snapshot_properties=_named(runs))

    def change(self, changes: Changes, runs: Sequence[str]) -> None:
        """Remove and add rows, in one commit."""
        if self._table is None:
            raise ValueError("there is no copy that could be changed")
        with self._errors_as_sentences(), self._transaction(self._table) as transaction:
            if len(changes.gone):
                transaction.delete(_any_of(changes.gone), snapshot_properties=_named(runs))
            transaction.append(changes.rows, snapshot_properties=_named(runs))

    def _created(self) -> Table:
        self._catalog.create_namespace_if_not_exists(self._namespace)
        return self._catalog.create_table(self._identifier, COPIED, properties=_PROPERTIES)

    @contextlib.contextmanager
    def _transaction(self, table: Table) -> Iterator[Transaction]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Delete operation did not match any records")
            with table.transaction() as transaction:
                yield transaction

    @contextlib.contextmanager
    def _errors_as_sentences(self) -> Iterator[None]:
        from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException

        try:
            yield
        except (CommitFailedException, CommitStateUnknownException) as error:
            raise UnfinishedError(f"Another command changed {self._name} meanwhile. Run `tlbatch sync` again.") from error
        except _errors_of_catalogs() as error:
            raise OutputError(f"The Iceberg table {self._name}: {line_of(error)}.") from error


def _errors_of_catalogs() -> tuple[type[Exception], ...]:
    from pyiceberg.exceptions import NoSuchTableError, RESTError, ValidationError

    found: tuple[type[Exception], ...] = (NoSuchTableError, RESTError, ValidationError, ValueError, OSError)
    with contextlib.suppress(ImportError):
        from sqlalchemy.exc import SQLAlchemyError

        found += (SQLAlchemyError,)
    return found


def _named(runs: Sequence[str]) -> dict[str, str]:
    return {RUNS_OF_COPY: json.dumps(list(runs))}


def _any_of(uris: pa.Array) -> BooleanExpression:
    """Rows with one of some sorted uris, in terms whose ranges tell which files cannot have any."""
    from pyiceberg.expressions import And, GreaterThanOrEqual, In, LessThanOrEqual, Or

    size = max(_VALUES_AT_ONCE, -(-len(uris) // _MOST_TERMS))
    pieces = (uris.slice(start, size).to_pylist() for start in range(0, len(uris), size))
    terms = [
        And(
            GreaterThanOrEqual(term="uri", value=one[0]),
            LessThanOrEqual(term="uri", value=one[-1]),
            In(term="uri", literals=one),
        )
        for one in pieces
    ]
    return Or(*terms) if len(terms) > 1 else terms[0]
