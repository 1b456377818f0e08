"""A copy of a table's predictions as a Delta table, through `deltalake`.

What a copy holds stands in its commits: each has the names of the runs that make up the table. A commit is one object that is
put where there is none, so a copy is changed as a whole or not at all, and of two that change it at once one fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from tlbatch.errors import OutputError, UnfinishedError, line_of
from tlbatch.output.changes import COPIED, RUNS_OF_COPY, Changes

if TYPE_CHECKING:
    from deltalake import CommitProperties

#: Bytes of a data file: some 70,000 rows. A change rewrites the files that it touches.
_FILE_BYTES = 4 << 20
#: The table's own name, by which it is known as one of ours.
_NAME = "tlbatch.predictions"


class DeltaCopy:
    """A Delta table with the predictions of an output.

    Args:
        url: its folder or URL.
        options: settings of delta-rs for the store.

    Raises:
        OutputError: there is a Delta table that is no copy of an output, or it cannot be read.
    """

    def __init__(self, url: str, options: dict[str, str]) -> None:
        from deltalake import DeltaTable

        self._url, self._options = url, options
        with self._errors_as_sentences():
            exists = DeltaTable.is_deltatable(url, options)
            self._table = DeltaTable(url, storage_options=options) if exists else None
        if self._table is not None and self._table.metadata().name != _NAME:
            raise OutputError(f"At {url} is a Delta table that `tlbatch sync` did not make. Choose another place.")

    @property
    def runs(self) -> list[str] | None:
        """The runs that made up the table when it was copied; None if there is no copy, or its log no longer says so."""
        history = self._table.history() if self._table is not None else []
        return next((list(commit[RUNS_OF_COPY]) for commit in history if RUNS_OF_COPY in commit), None)

    def replace(self, rows: pa.RecordBatchReader, runs: Sequence[str]) -> None:
        """Make all rows anew, in one commit."""
        from deltalake import write_deltalake

        with self._errors_as_sentences():
            write_deltalake(
                self._table if self._table is not None else self._url,
                rows,
                mode="overwrite",
                schema_mode="overwrite",
                name=_NAME,
                configuration={"delta.targetFileSize": str(_FILE_BYTES)},
                storage_options=self._options,
                commit_properties=self._commit_of(runs),
            )

    def change(self, changes: Changes, runs: Sequence[str]) -> None:
        """Remove and add rows, in one commit."""
        if self._table is None:
            raise ValueError("there is no copy that could be changed")
        # A row is added if it has no partner, which a row without `gone` never has.
        gone = pa.table({_GONE: changes.gone})
        source = pa.concat_tables([gone, changes.rows], promote_options="default")
        with self._errors_as_sentences():
            merger = self._table.merge(
                source,
                f"target.uri = source.{_GONE}",
                source_alias="source",
                target_alias="target",
                commit_properties=self._commit_of(runs),
            ).when_matched_delete()
            new = {name: f"source.{name}" for name in COPIED.names}
            merger.when_not_matched_insert(new, predicate=f"source.{_GONE} is null").execute()

    def _commit_of(self, runs: Sequence[str]) -> CommitProperties:
        from deltalake import CommitProperties, Transaction

        # Commits that both count one up do not pass beside each other, even if both only add rows.
        count = self._table.transaction_version(_NAME) if self._table is not None else None
        return CommitProperties(
            custom_metadata={RUNS_OF_COPY: list(runs)},
            max_commit_retries=0,
            app_transactions=[Transaction(_NAME, (count or 0) + 1)],
        )

    @contextlib.contextmanager
    def _errors_as_sentences(self) -> Iterator[None]:
        from deltalake.exceptions import CommitFailedError, DeltaError

        try:
            yield
        except CommitFailedError as error:
            raise UnfinishedError(f"Another command changed {self._url} meanwhile. Run `tlbatch sync` again.") from error
        except DeltaError as error:
            raise OutputError(f"The Delta table at {self._url}: {line_of(error)}.") from error


_GONE = "_gone"
