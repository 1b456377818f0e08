"""A run's folder, and the state of an output: every run, and the pointer that names the runs of the table."""

from __future__ import annotations

import json
import mmap
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tlbatch import schema
from tlbatch.errors import CountsError, LeaseHeldError, OutputError
from tlbatch.output.documents import PointerEntry, ReportDocument, RunDocument
from tlbatch.schema import from_parquet, seal, sha256, to_parquet, unseal
from tlbatch.storage.location import Location, is_leftover
from tlbatch.storage.resolve import resolve
from tlbatch.storage.temporary_rows import checked_copy, full_disk_is_said, mapped, stored_table, temporary_file

#: Small objects (run documents, receipts, parts) that are read at once: a remote store is waited for, not this machine.
READS_AT_ONCE = 32

#: Bytes of a manifest that is not in memory as a whole while it is written.
_LARGE = 128 << 20

#: The most keys of `bounds` in `run.json`.
_MOST_BOUNDS = 256

#: The runs that make up a table, as `latest.json` names them.
Pointer = Sequence[PointerEntry]


def new_run_id(clock: Callable[[], float] = time.time) -> str:
    """A name that sorts by time (UTC), with a random suffix so that two hosts do not choose the same one."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(clock())) + "-" + secrets.token_hex(3)


@dataclass(frozen=True)
class Run:
    """A run's folder and its `run.json`."""

    location: Location
    facts: RunDocument

    @property
    def run_id(self) -> str:
        """The run's name, which is also its folder's name."""
        return str(self.facts["run_id"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of spec, bundle and manifest. Equal fingerprints mean equal files."""
        return str(self.facts["fingerprint"])

    @property
    def staged(self) -> Location:
        """The folder of parts and receipts until they are published."""
        return self.location.join(schema.STAGED)

    @cached_property
    def manifest(self) -> pa.Table:
        """The objects that the run lists, checked against the digest in `run.json`."""
        return stored_table(self.manifest_pieces(), schema.MANIFEST_SCHEMA)

    def manifest_pieces(self, columns: Sequence[str] = schema.MANIFEST_SCHEMA.names) -> Iterator[pa.Table]:
        """The manifest in its order, a piece at a time; the first one has no rows.

        Raises:
            FileNotFoundError: it is missing.
            CountsError: it is not the one that `run.json` records.
        """
        copy = checked_copy(self.location.join(schema.MANIFEST), self.facts["manifest_sha256"])
        if copy is None:
            raise CountsError(f"The manifest of run {self.run_id} differs from its recorded sha256; do not trust this run.")
        with copy:
            yield schema.MANIFEST_SCHEMA.empty_table().select(columns)
            for batch in pq.ParquetFile(mapped(copy)).iter_batches(schema.ROWS_OF_GROUP, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])

    @cached_property
    def removed(self) -> pa.Table:
        """Uri and key of the objects that the run removes from the table, checked like the manifest; usually empty."""
        if "removed_sha256" not in self.facts:
            return schema.REMOVED_SCHEMA.empty_table()
        data = self.location.join(schema.REMOVED).read()
        if sha256(data) != self.facts["removed_sha256"]:
            raise CountsError(f"{schema.REMOVED} of run {self.run_id} differs from its recorded sha256; do not trust this run.")
        return from_parquet(data)

    @property
    def on(self) -> list[PointerEntry]:
        """The published runs that this run adds to; empty if its table is complete by itself."""
        return list(self.facts.get("on", []))

    def has_manifest(self) -> bool:
        """Whether the manifest exists. It is written first, but `gc` may have removed it before `run.json` was written."""
        return self.location.join(schema.MANIFEST).exists()

    def finished(self) -> bool:
        """Whether the run is complete: its last step is done."""
        return self.location.join(schema.SUCCESS).exists()

    def kept_back(self) -> bool:
        """Whether the run is complete but not published, because of `promote_if`."""
        return self.location.join(schema.KEPT_BACK).exists()


@dataclass(frozen=True)
class OutputState:
    """An output at one moment: its runs, the oldest first, and its pointer. Read once and passed round."""

    output: Location
    runs: tuple[Run, ...]
    pointer: tuple[PointerEntry, ...]

    @cached_property
    def by_id(self) -> dict[str, Run]:
        """The runs by their name."""
        return {run.run_id: run for run in self.runs}

    @property
    def table(self) -> list[Run]:
        """The runs that make up the table, the oldest first; empty if nothing is published.

        Raises:
            CountsError: a run of the table does not exist.
        """
        return self.named(self.pointer)

    @property
    def newest(self) -> Run | None:
        """The newest run of the table."""
        return self.by_id.get(self.pointer[-1]["run_id"]) if self.pointer else None

    @property
    def unfinished(self) -> Run | None:
        """The newest run of all, if it was begun and never completed. A run whose manifest is gone does not count."""
        if not self.runs or self.runs[-1].finished() or not self.runs[-1].has_manifest():
            return None
        return self.runs[-1]

    @property
    def bounds(self) -> list[str]:
        """Some keys of the table, sorted, that cut its largest run into pieces; empty if no run is large."""
        largest = max(self.table, key=lambda run: run.facts["objects"], default=None)
        return sorted(largest.facts.get("bounds", ())) if largest else []

    def without_manifests(self) -> OutputState:
        """The same state without the manifests that its runs hold in memory: a hundred bytes per object."""
        return OutputState(self.output, tuple(Run(run.location, run.facts) for run in self.runs), self.pointer)

    def named(self, pointer: Pointer) -> list[Run]:
        """The runs that a pointer names, in its order; raises CountsError if one does not exist."""
        found = [self.by_id.get(entry["run_id"]) for entry in pointer]
        return _require_found(self.output, pointer, found)

    def table_after(self, run: Run) -> list[Run]:
        """The table that a run made: the runs it adds to, then the run itself."""
        return [*self.named(run.on), run]

    def previous(self, run: Run) -> Run | None:
        """The newest published run with predictions before `run`: of the table it adds to, or else of all earlier runs."""
        earlier = [one for one in self.runs if (one.facts["began"], one.run_id) < (run.facts["began"], run.run_id)]
        candidates = self.named(run.on) if run.on else earlier
        published = (one for one in reversed(candidates) if one.facts["spec"]["predictions"])
        return next((one for one in published if one.finished() and not one.kept_back()), None)


def read_output(output: Location) -> OutputState:
    """Read the pointer, then every `run.json` of an output.

    Raises:
        CountsError: one of these documents is damaged.
    """
    pointer = read_pointer(output)
    return OutputState(output, tuple(read_runs(output)), tuple(pointer))


def read_runs(output: Location) -> list[Run]:
    """Every run of an output, the oldest first. A folder without `run.json` never began.

    Raises:
        CountsError: a `run.json` is damaged.
    """
    folder = output.join(schema.RUNS)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = [run for run in pool.map(lambda name: _read_run(folder.join(name)), folder.names()) if run is not None]
    return sorted(found, key=lambda run: (run.facts["began"], run.run_id))  # a user may have chosen a run's name


def _read_run(location: Location) -> Run | None:
    try:
        return Run(location, cast("RunDocument", read_sealed(location.join(schema.RUN))))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_sealed(location: Location) -> dict[str, Any]:
    """The body of a sealed document.

    Raises:
        CountsError: it is damaged.
        OutputError: a newer version wrote it, in a form that this one may read wrongly.
    """
    body = unseal(location.read())
    if body is None:
        raise CountsError(f"{location.url} is damaged: it does not match its own seal.")
    if body.get("schema_version", 0) > schema.SCHEMA_VERSION:
        raise OutputError(
            f"{location.url} was written by a newer tlbatch (schema version {body['schema_version']}, and this one knows up to "
            f"{schema.SCHEMA_VERSION}); update tlbatch."
        )
    return body


def read_report(run: Run) -> ReportDocument:
    """A run's `report.json`; raises CountsError if it is damaged."""
    return cast("ReportDocument", read_sealed(run.location.join(schema.REPORT)))


def read_pointer(output: Location) -> list[PointerEntry]:
    """The published runs that make up the table, the oldest first; empty if nothing was published yet.

    Raises:
        CountsError: the pointer is damaged.
    """
    try:
        return list(read_sealed(output.join(schema.LATEST))["runs"])
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_table_runs(output: Location) -> list[Run]:
    """The runs that make up the table, the oldest first; empty if nothing is published. Only these runs are read."""
    return read_named_runs(output, read_pointer(output))


def read_named_runs(output: Location, pointer: Pointer) -> list[Run]:
    """The runs that a pointer names, in its order; raises CountsError if one does not exist."""
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = list(pool.map(lambda entry: _read_run(output.join(schema.RUNS, entry["run_id"])), pointer))
    return _require_found(output, pointer, found)


def _require_found(output: Location, pointer: Pointer, found: Sequence[Run | None]) -> list[Run]:
    for entry, run in zip(pointer, found, strict=True):
        if run is None:
            raise CountsError(f"{output.url}/{schema.LATEST} names run {entry['run_id']}, which does not exist.")
    return [run for run in found if run is not None]


def require_unchanged(read: Pointer, now: Pointer) -> None:
    """Raises LeaseHeldError if the table is no longer the one that a command started from."""
    if list(read) != list(now):
        raise LeaseHeldError("Another run was published in the meantime; run the same command again.")


def run_at(url: str, options: Mapping[str, Any] | None) -> tuple[Location, Run] | None:
    """The output and the run of a run's folder; None if the address is not a run's folder."""
    location = resolve(url, options)
    run = _read_run(location)
    return None if run is None else (resolve(location.url.rsplit(f"/{schema.RUNS}/", 1)[0], options), run)


def require_runs(output: str, options: Mapping[str, Any] | None) -> Location:
    """The location of an output; raises OutputError if there is none."""
    location = resolve(output, options)
    if schema.RUNS not in location.names():
        raise OutputError(f"There is no tlbatch output at {location.url}: it has no folder {schema.RUNS}.")
    return location


def require_output(state: OutputState, images: str) -> None:
    """Raises OutputError if the folder holds something else, or the table of another store."""
    own = {schema.RUNS, schema.LEASE, schema.BASE, schema.LATEST}
    # A killed write leaves a hidden file.
    names = [name for name in state.output.names() if not (name.startswith(".") or is_leftover(name))]
    foreign = sorted(set(names) - own)
    if foreign and schema.RUNS not in names:
        raise OutputError(
            f"The output {state.output.url} is not empty and holds no tlbatch runs ({foreign[0]}, …); choose another folder."
        )
    if state.runs and state.runs[-1].facts["spec"]["images"] != images:
        raise OutputError(
            f"The output {state.output.url} belongs to another run: it holds the table of "
            f"{state.runs[-1].facts['spec']['images']}, not of {images}; choose another --output."
        )


def require_same(run: Run, spec: Mapping[str, Any], bundle: str, *, incremental: bool = False) -> None:
    """Raises OutputError with the fields that differ if an unfinished run was begun with another spec or bundle.

    An incremental command may finish a full run, but a full command may not finish an incremental run.
    """
    begun = {**run.facts["spec"], "bundle": run.facts["bundle"], "incremental": bool(run.on)}
    asked = {**spec, "bundle": bundle, "incremental": incremental and bool(run.on)}
    differ = sorted(name for name in begun.keys() | asked.keys() if begun.get(name) != asked.get(name))
    if differ:
        changes = ", ".join(f"{name} was {_short(begun.get(name))} and is {_short(asked.get(name))}" for name in differ)
        raise OutputError(
            f"The output belongs to another run: {run.run_id} is unfinished and {changes}. Finish it with its own command, "
            f"or delete {run.location.url} to give it up."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def begin_run(
    output: Location,
    run_id: str,
    manifest: pa.Table,
    facts: Mapping[str, Any],
    *,
    began: float | None = None,
    on: Pointer = (),
    removed: pa.Table | None = None,
    require_lease: Callable[[], None] = lambda: None,
) -> Run:
    """Write the manifest, then `run.json`, which makes the run exist.

    Args:
        output: the folder.
        run_id: the run's name.
        manifest: the objects it lists.
        facts: `spec`, `bundle` and whatever else `run.json` says.
        began: when the lease was taken, in seconds since the epoch. Not the current time: a run that slept past its lease and
            wakes up here must not look younger than the run of the process that took the lease over.
        on: the published runs that this one adds to; empty if its table is complete by itself.
        removed: uri and key of the objects it removes from their table.
        require_lease: raises if the lease was lost; called right before `run.json` is written.

    Raises:
        OutputError: a run of this name exists, which a user must have chosen.
    """
    location = output.join(schema.RUNS, run_id)
    if location.join(schema.RUN).exists():
        raise OutputError(f"run_id: {output.url} already has a run {run_id!r}; choose another name, or none.")
    location.join(schema.STAGED).delete()  # receipts of a run of this name whose `run.json` was removed
    manifest_sha256 = _write_manifest(location.join(schema.MANIFEST), manifest)
    increment = increment_facts(on, removed)
    if removed is not None and removed.num_rows:
        location.join(schema.REMOVED).write(to_parquet(removed))
    full = {
        "schema_version": schema.SCHEMA_VERSION,
        "run_id": run_id,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "manifest_sha256": manifest_sha256,
        "objects": manifest.num_rows,
        **_bounds(manifest),
        **facts,
        **increment,
        "fingerprint": fingerprint(facts["spec"], facts["bundle"], manifest_sha256, increment),
    }
    require_lease()
    location.join(schema.RUN).write(seal(full))
    return Run(location, cast("RunDocument", full))


def _write_manifest(location: Location, manifest: pa.Table) -> str:
    """Write a manifest, which as a file is in memory only piece by piece; returns its sha256."""
    with temporary_file() as file:
        with full_disk_is_said(f"a manifest of {manifest.num_rows:,} objects does not fit"):
            schema.write_parquet(manifest, file)
            file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            digest = sha256(data)
            location.write(data if len(data) > _LARGE else data[:])
    return digest


def _bounds(manifest: pa.Table) -> dict[str, list[str]]:
    """Some of the keys of a large manifest, which cut it into pieces of a similar size: a bucket is listed between them."""
    rows = manifest.num_rows
    step = max(schema.ROWS_OF_GROUP, -(-rows // _MOST_BOUNDS))
    return {"bounds": [manifest["key"][row].as_py() for row in range(step, rows, step)]} if rows > step else {}


def increment_facts(on: Pointer, removed: pa.Table | None) -> dict[str, Any]:
    """What `run.json` adds for a run that adds to others; empty for a run whose table is complete by itself."""
    facts: dict[str, Any] = {"on": list(on)} if on else {}
    if removed is not None and removed.num_rows:
        facts["removed_sha256"] = schema.parquet_sha256(removed)
    return facts


def fingerprint(spec: Mapping[str, Any], bundle: str, manifest_sha256: str, increment: Mapping[str, Any] | None = None) -> str:
    """SHA-256 over everything that a run's answer depends on; `increment` comes from `increment_facts`."""
    asked = {"spec": {**spec, "bundle": bundle}, "manifest": manifest_sha256, **(increment or {})}
    return sha256(json.dumps(asked, sort_keys=True).encode())
