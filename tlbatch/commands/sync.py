"""`tlbatch sync`: the published predictions -> a Delta or Iceberg table that every query engine reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from tlbatch import schema
from tlbatch.config import RescoreConfig, RunConfig, SyncConfig
from tlbatch.errors import ConfigError, OutputError, TlbatchError, UnfinishedError
from tlbatch.output.changes import COPIED, Changes, changes_since
from tlbatch.output.run import read_output
from tlbatch.output.table import read_batches
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.resolve import REMOTE, resolve


class Copy(Protocol):
    """A table of some format with the predictions of an output."""

    @property
    def runs(self) -> list[str] | None:
        """The runs that made up the table when it was copied; None if there is no copy."""

    def replace(self, rows: pa.RecordBatchReader, runs: Sequence[str]) -> None:
        """Make all rows anew, in one commit."""

    def change(self, changes: Changes, runs: Sequence[str]) -> None:
        """Remove and add rows, in one commit."""


def sync(config: SyncConfig) -> dict[str, Any]:
    """Bring a Delta or Iceberg table to the predictions that an output has published.

    What has changed since the last time is written, in one commit: a reader sees the table before or after it. A command that
    dies on the way changes nothing, and one that has nothing to do commits nothing. A table that shares no run with the last
    one, as after `compact`, is written anew.

    Returns:
        `output`, `to`, `as`, `runs` (those that make up the table), `written` (all, changes or nothing), and `added`, the rows
        that were written.

    Raises:
        OutputError: nothing is published, or the table is none that `sync` made.
        ConfigError: a package is missing, or the table's name cannot be used.
        UnfinishedError: another command changed the table meanwhile.
    """
    output = resolve(config.output, config.storage_options)
    state = read_output(output)
    if not state.pointer:
        raise OutputError(f"Nothing is published at {output.url}: it has no {schema.LATEST}.")
    runs = [run.run_id for run in state.table]
    copy = _copy_of(config)
    before = copy.runs
    done = {"output": output.url, "to": config.to, "as": config.as_, "runs": runs}
    if before == runs:
        return {**done, "written": "nothing", "added": 0}
    changes = None if before is None else changes_since(state, before)
    if changes is not None:
        copy.change(changes, runs)
        return {**done, "written": "changes", "added": changes.rows.num_rows}
    counted = _Counted(read_batches(state.table, "predictions", None, None))
    copy.replace(pa.RecordBatchReader.from_batches(COPIED, counted), runs)
    return {**done, "written": "all", "added": counted.rows}


def sync_after(result: Mapping[str, Any], settings: RunConfig | RescoreConfig) -> dict[str, Any]:
    """Do what `sync` of a command says, after its run was published.

    Returns:
        The command's result with `synced`: `to`, `as`, `written` and `added`.

    Raises:
        UnfinishedError: the copy was not brought to the table; the same command does that alone.
    """
    form, _, to = str(settings.sync).partition(":")
    options = {"output": settings.output, "storage_options": settings.storage_options}
    try:
        done = sync(SyncConfig.model_validate({**options, "to": to, "as": form}))
    except (TlbatchError, OSError) as error:
        raise UnfinishedError(f"The run is published, and {to} is not up to date: {error}") from error
    return {**result, "synced": {name: done[name] for name in ("to", "as", "written", "added")}}


class _Counted:
    """Batches as they come, with the columns of a copy, and how many rows have come."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self.rows = batches, 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch.cast(COPIED)


def _copy_of(config: SyncConfig) -> Copy:
    try:
        if config.as_ == "iceberg":
            from tlbatch.output.iceberg import IcebergCopy

            return IcebergCopy(config.to)
        from tlbatch.output.delta import DeltaCopy

        return DeltaCopy(*_place(config))
    except ModuleNotFoundError as error:
        raise ConfigError(f"This needs the package {error.name}: install tlbatch[{config.as_}].") from None


def _place(config: SyncConfig) -> tuple[str, dict[str, str]]:
    """A place as delta-rs takes it: its URL, and the settings of the store."""
    output, table = (resolve(url, config.storage_options) for url in (config.output, config.to))
    if f"{table.url.rstrip('/')}/".startswith(f"{output.url.rstrip('/')}/"):
        raise ConfigError(f"to: {config.to} is in the output, whose files are all tlbatch's own. Choose another place.")
    if isinstance(table, LocalLocation):
        return str(table.path), {}
    return table.url, table.object_store_settings() if isinstance(table, REMOTE) else {}
