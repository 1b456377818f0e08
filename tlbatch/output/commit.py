"""From what a command wants to a published table: the order of every write of a run, which may be killed between any two.

`docs/protocol.md` says what a kill between any two steps leaves, and why the next run is right.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import NotPromotedError
from tlbatch.output.bottleneck import bottleneck
from tlbatch.output.documents import ReportDocument
from tlbatch.output.lease import Lease
from tlbatch.output.publish import (
    MapFileTasks,
    PublishedCounts,
    TableSpec,
    mark_complete,
    remove_staged,
    require_current_base,
    swap_pointer,
    write_files,
    write_report_document,
)
from tlbatch.output.receipts import Receipts, freeze_part_plan, missing_rows, numbered, read_receipts
from tlbatch.output.run import (
    OutputState,
    Pointer,
    Run,
    begin_run,
    fingerprint,
    increment_facts,
    read_output,
    read_report,
    require_same,
)
from tlbatch.output.standing import failures_after
from tlbatch.output.store_check import StoreCheck
from tlbatch.storage.location import Location
from tlbatch.storage.temporary_rows import selected

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInput:
    """What a run is to process.

    Attributes:
        manifest: its objects, as `schema.MANIFEST_SCHEMA`.
        skipped: how many objects of the store were skipped.
        seconds: how long the listing took.
        on: the published runs it adds to, as `latest.json` names them; empty if its table is complete by itself.
        removed: uri and key of the objects it removes from their table.
        counts: of an incremental run, how many objects are new, changed and so on; None for a full run.
        skipped_by_kind: the skipped objects by kind.
        unreadable: folders of the store that could not be opened, each with a slash at its end.
        left: how many objects of the table have left the store, by the folder they were in; only the largest folders.
        away: links of the store that lead nowhere: what the table has of them is not deleted.
        rows: of an incremental run, how many rows of the table leave with objects, and how many the table has.
        check: looks single objects up where the manifest may be older than the table; None: it is a listing.
        inventory: what documents say of the inventory that was read in place of a listing; empty if there is none.
    """

    manifest: pa.Table
    skipped: int
    seconds: float
    on: Pointer = ()
    removed: pa.Table = field(default_factory=schema.REMOVED_SCHEMA.empty_table)
    counts: Mapping[str, int] | None = None
    skipped_by_kind: Mapping[str, int] = field(default_factory=dict)
    unreadable: Sequence[str] = ()
    left: Mapping[str, int] = field(default_factory=dict)
    away: Sequence[str] = ()
    rows: tuple[int, int] = (0, 0)
    check: StoreCheck | None = None
    inventory: Mapping[str, Any] = field(default_factory=dict)

    @property
    def skipped_facts(self) -> dict[str, Any]:
        """What documents say of the listing: what was skipped, or has left, and the inventory; empty if there is nothing."""
        found = {
            "skipped_by_kind": dict(self.skipped_by_kind),
            "unreadable": list(self.unreadable),
            "left": dict(self.left),
            "inventory": dict(self.inventory),
        }
        return {name: value for name, value in found.items() if value}

    @property
    def nothing_to_do(self) -> bool:
        """Whether the table already is what an incremental run would make of it."""
        return self.counts is not None and not (self.manifest.num_rows or self.removed.num_rows)


@dataclass(frozen=True)
class RunSpec:
    """What a command wants in an output.

    Attributes:
        spec: what changes the answer, `engine` included. With `bundle` and the manifest it is the fingerprint.
        bundle: the bundle's digest.
        base: the digest of its base.
        predictions: whether a predictions table is published.
        features: schema of the features table; None if there is none.
        facts: what else `run.json` says.
        final: whether failures for transient reasons count as final, because another run could not do better.
        incremental: whether only what the table lacks is done.
    """

    spec: Mapping[str, Any]
    bundle: str
    base: str
    predictions: bool
    features: pa.Schema | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    final: bool = False
    incremental: bool = False

    def tables(self, run: Run) -> TableSpec:
        """The tables that a run of this spec publishes."""
        return TableSpec(run.run_id, self.bundle, self.base, self.predictions, self.features)

    def fingerprint(self, given: RunInput) -> str:
        """The fingerprint of the run with this input."""
        increment = increment_facts(given.on, given.removed)
        return fingerprint(self.spec, self.bundle, schema.parquet_sha256(given.manifest), increment)


class WorkStats(NamedTuple):
    """How work was spread: for each stage, how much of it could run at once; None if nothing was done.

    `quantizable` is whether the model ran on CPUs in float32 and could run in int8.
    """

    parallelism: Mapping[str, int] | None = None
    gpu: bool = False
    list_seconds: float | None = None
    quantizable: bool = False


class Promotion(NamedTuple):
    """What `promote_if` found: the comparison with the table (None without a condition), and the conditions that fail."""

    compared: Mapping[str, Any] | None = None
    broken: Sequence[str] = ()
    checked: bool = False


class Work(Protocol):
    """What a command does for one output. `run_to_publication` says when."""

    def plan(self, state: OutputState) -> RunInput:
        """The input of the next run, listed since `state` was published.

        An older listing would remove from the table what another run has added in the meantime.
        """

    def process(self, runs: Sequence[Run], rows: pa.Table) -> WorkStats:
        """Stage the outcome of manifest rows (each with its number in a column `row`) as parts of each run."""

    def promotion_check(self, run: Run, report: ReportDocument, state: OutputState) -> Promotion:
        """Whether a complete run may become the table; its report is not written yet."""


class Target(NamedTuple):
    """An output, what a command wants in it, and the command's work."""

    output: Location
    spec: RunSpec
    work: Work


class _OpenRun(NamedTuple):
    """A run to complete: what it lacks, and the receipts it had when this command opened it.

    `complete` is the report of a run that lacks only its publication, because `promote_if` had not let it through before.
    """

    target: Target
    lease: Lease
    state: OutputState
    run: Run
    before: Receipts
    complete: ReportDocument | None = None


def run_to_publication(
    targets: Sequence[Target], run_id: str, *, began: float, map_tasks: MapFileTasks = map
) -> list[ReportDocument]:
    """Bring outputs to where their specs are published: continue a run, begin one, or find that everything is done.

    The steps are those of `docs/protocol.md`. Work that several targets lack is done once, by the first target's `process`;
    each output is published by itself.

    Args:
        targets: the outputs.
        run_id: the name of the runs that are begun.
        began: when the command began, by `time.monotonic`.
        map_tasks: how published files are spread over machines.

    Returns:
        Each target's `report.json`, in order; with `already_done` if nothing had to be done.

    Raises:
        LeaseHeldError: another process is running there.
        OutputError: an unfinished run there has another spec.
        CountsError: the counts do not reconcile; nothing was published.
        NotPromotedError: some runs are complete but not published; the others are published.
    """
    reports: dict[int, ReportDocument] = {}
    opened: dict[int, _OpenRun] = {}
    refused: list[NotPromotedError] = []
    with contextlib.ExitStack() as leases:
        for number, target in enumerate(targets):
            lease = leases.enter_context(Lease(target.output, run_id))  # step 1: lease.json
            with _collected(refused):
                found = _open(target, run_id, lease, began)  # steps 2 and 3: manifest.parquet, run.json
                if isinstance(found, _OpenRun):
                    opened[number] = found
                else:
                    reports[number] = found
        stats = _process_missing(opened)  # step 4: parts and receipts
        for number, one in opened.items():
            run, lease, output = one.run, one.lease, one.target.output
            with _collected(refused):
                lease.require_held()
                report = one.complete
                if report is None:
                    receipts = freeze_part_plan(run, read_receipts(run))  # step 5: staged/plan
                    counts = write_files(run, receipts, one.target.spec.tables(run), map_tasks)  # step 6: published files
                    report = _promoted(one, _report(one, receipts, counts, stats[number], began))
                write_report_document(run, report)  # step 7: report.json
                require_current_base(output, run)
                swap_pointer(output, run, report, lease.require_held)  # step 8: latest.json
                with _failure_logged(run):
                    remove_staged(run)  # step 9: staged/ removed
                    mark_complete(run)  # step 10: _SUCCESS; the end of the block removes lease.json
                    if one.complete is not None:
                        run.location.join(schema.KEPT_BACK).unlink()
                reports[number] = report
    if refused:
        raise NotPromotedError(" ".join(map(str, refused)))
    return [reports[number] for number in range(len(targets))]


@contextlib.contextmanager
def _collected(refused: list[NotPromotedError]) -> Iterator[None]:
    """Collect the error of a table that is not promoted: the other tables are published all the same."""
    try:
        yield
    except NotPromotedError as error:
        refused.append(error)


@contextlib.contextmanager
def _failure_logged(run: Run) -> Iterator[None]:
    """The run's fate is decided whatever happens here; the next command tries again."""
    try:
        yield
    except OSError as error:
        log.warning("run %s could not be cleaned up; the next command tries again: %s", run.run_id, error)


def clean_up(run: Run) -> None:
    """Steps 9 and 10 for a run that died between its publication, or the decision not to promote it, and its last step."""
    with _failure_logged(run):
        remove_staged(run)
        mark_complete(run)


def _open(target: Target, run_id: str, lease: Lease, began: float) -> _OpenRun | ReportDocument:
    """Continue or begin a run. Returns the report if the output already is what the command wants."""
    state = read_output(target.output)
    if state.newest is not None:
        state.newest.location.join(schema.KEPT_BACK).unlink()  # left by a command that died after publishing the run
    run = run_to_continue(state, target.spec, clean=True)
    complete = None
    if run is None:
        given = target.work.plan(state)
        done = _already_done(state, target.spec, given, began)
        if done is not None:
            return done
        run, complete = _unpromoted(target, state, lease, given) or (None, None)
        if run is None:
            run = _begin(target, given, run_id, lease)
    return _OpenRun(target, lease, state.without_manifests(), run, read_receipts(run), complete)


def run_to_continue(state: OutputState, spec: RunSpec, *, clean: bool = False) -> Run | None:
    """The run to continue, if there is one.

    Args:
        state: the output.
        spec: what the command wants.
        clean: clean up a run that died after its fate was decided; only for the holder of the lease.

    Raises:
        OutputError: the unfinished run was begun with another spec or bundle.
    """
    run = state.unfinished
    if run is None:
        return None
    if run.run_id in [entry["run_id"] for entry in state.pointer] or run.kept_back():
        if clean:
            clean_up(run)
        return None
    if "compacted" in run.facts["spec"] and run.facts["spec"] != spec.spec:
        return None  # the table is complete without it
    if run.on and run.on != list(state.pointer):
        return None  # the table was rolled back: what this run adds to is no longer published
    require_same(run, spec.spec, spec.bundle, incremental=spec.incremental)
    return run


def _already_done(state: OutputState, spec: RunSpec, given: RunInput, began: float) -> ReportDocument | None:
    """The report of a published run that no other run could improve; None if there is something to do."""
    newest = state.newest
    if newest is None:
        return None
    if given.counts is not None:
        return _nothing_new(state, spec, given, began) if given.nothing_to_do else None
    # A table of several runs is not what its oldest run was, even if the store is.
    if len(state.pointer) > 1 or newest.fingerprint != spec.fingerprint(given):
        return None
    report = read_report(newest)
    if report["failed_transient"] and not spec.final:
        return None
    return {**report, "already_done": True}


def _nothing_new(state: OutputState, spec: RunSpec, given: RunInput, began: float) -> ReportDocument:
    """The report of an incremental command that found the store unchanged."""
    return {
        "run_id": state.newest.run_id if state.newest else "",
        "output": state.output.url,
        "objects": 0,
        "listed": 0,
        "predicted": 0,
        "failed": 0,
        "failed_transient": 0,
        "skipped": given.skipped,
        "seconds": round(time.monotonic() - began, 3),
        "images_per_second": 0.0,
        "bundle": spec.bundle,
        "engine": spec.spec["engine"],
        "failed_by_kind": {},
        "stage_seconds": {"list": round(given.seconds, 3)},
        "labels": {},
        "counts": given.counts or {},
        **given.skipped_facts,  # type: ignore[typeddict-item]
        "already_done": True,
    }


def _unpromoted(target: Target, state: OutputState, lease: Lease, given: RunInput) -> tuple[Run, ReportDocument] | None:
    """A complete run that was not promoted, if it is what the command wants and its conditions hold now; with its report.

    Raises:
        NotPromotedError: a condition still fails.
    """
    published = {entry["run_id"] for entry in state.pointer}
    others = [run for run in reversed(state.runs) if run.run_id not in published]
    wanted = target.spec.fingerprint(given) if others else ""
    run = next((run for run in others if run.fingerprint == wanted and run.kept_back()), None)
    if run is None:
        return None
    report = read_report(run)
    report.pop("compared", None)
    report.pop("kept_back", None)
    promotion = target.work.promotion_check(run, report, state)
    if promotion.broken and report["failed_transient"]:
        return None  # a store that failed for a while may be the reason: the run is done again
    return run, _require_promotion(run, lease, report, promotion)


def _begin(target: Target, given: RunInput, run_id: str, lease: Lease) -> Run:
    found: dict[str, Any] = {"skipped": given.skipped, "list_seconds": round(given.seconds, 3)}
    if given.counts is not None:
        found["counts"] = given.counts
    found |= given.skipped_facts
    spec = target.spec
    facts = {"spec": spec.spec, "bundle": spec.bundle, **found, **spec.facts}
    return begin_run(
        target.output,
        run_id,
        given.manifest,
        facts,
        began=lease.since,
        on=given.on,
        removed=given.removed,
        require_lease=lease.require_held,
    )


def _process_missing(opened: Mapping[int, _OpenRun]) -> dict[int, WorkStats]:
    """Stage the rows that the runs lack. Runs of the same manifest share one pass over the rows that any of them lacks."""
    stats = dict.fromkeys(opened, WorkStats())
    of_manifest: dict[str, list[int]] = {}
    for number, one in opened.items():
        if one.complete is None:
            of_manifest.setdefault(one.run.facts["manifest_sha256"], []).append(number)
    for numbers in of_manifest.values():
        same = [opened[number] for number in numbers]
        rows = _missing_in_any(same)
        if rows.num_rows:
            found = same[0].target.work.process([one.run for one in same], rows)
            stats.update(dict.fromkeys(numbers, found))
    return stats


def _missing_in_any(opened: Sequence[_OpenRun]) -> pa.Table:
    """The rows that any of the runs, all of one manifest, lacks."""
    missing = [missing_rows(one.run, one.before) for one in opened]
    if len(missing) == 1:
        return missing[0]
    manifest = opened[0].run.manifest
    lacking = np.zeros(manifest.num_rows, bool)
    for rows in missing:
        lacking[rows["row"].to_numpy()] = True
    return selected(numbered(manifest), lacking)


def _report(one: _OpenRun, receipts: Receipts, counts: PublishedCounts, stats: WorkStats, began: float) -> ReportDocument:
    """The report of a run whose files are written."""
    run, spec = one.run, one.target.spec
    seconds = time.monotonic() - began
    images_before = int(one.before.images(run.manifest.num_rows).sum())
    stages, stages_before = receipts.seconds(), one.before.seconds()
    spent = {stage: taken - stages_before.get(stage, 0.0) for stage, taken in stages.items()}
    if stats.list_seconds is not None:
        spent = {"list": stats.list_seconds, **spent}
    how = {"gpu": stats.gpu, "quantizable": stats.quantizable}
    limit = None if stats.parallelism is None else bottleneck(spent, stats.parallelism, seconds, **how)
    body = {
        "run_id": run.run_id,
        "output": one.target.output.url,
        "objects": run.facts["objects"],
        "listed": counts.listed,
        "predicted": counts.predicted,
        "failed": counts.failed,
        "skipped": run.facts["skipped"],
        "seconds": round(seconds, 3),
        "images_per_second": round((counts.listed - images_before) / seconds, 2),
        "bundle": spec.bundle,
        "engine": spec.spec["engine"],
        "failed_by_kind": dict(counts.failed_by_kind),
        "failed_transient": counts.transient,
        "stage_seconds": {"list": run.facts["list_seconds"], **stages},
        "bottleneck": limit,
        "labels": dict(counts.labels),
        "white_levels": dict(counts.white_levels),
        "manifest_sha256": run.facts["manifest_sha256"],
        "files": dict(counts.files),
    }
    facts = cast("Mapping[str, Any]", run.facts)
    body |= {
        name: facts[name]
        for name in ("counts", "on", "removed_sha256", "skipped_by_kind", "unreadable", "left", "inventory")
        if name in facts
    }
    passed = receipts.passed(run.manifest.num_rows)
    body |= {"skipped_in_shards": passed} if passed else {}
    before = one.state.named(run.on) if run.on else one.state.table if "counts" in facts else []
    if before:
        body |= failures_after(before, run, counts.listed, counts.failed)
    return cast("ReportDocument", body)


def _promoted(one: _OpenRun, report: ReportDocument) -> ReportDocument:
    """The report of a run that may be published; raises NotPromotedError if a condition fails."""
    return _require_promotion(one.run, one.lease, report, one.target.work.promotion_check(one.run, report, one.state))


def _require_promotion(run: Run, lease: Lease, report: ReportDocument, promotion: Promotion) -> ReportDocument:
    """The report with the comparison in it. If a condition fails, the run is marked, cleaned up, and not published."""
    if promotion.checked:
        report = {**report, "compared": promotion.compared}
    if not promotion.broken:
        return report
    lease.require_held()
    write_report_document(run, {**report, "kept_back": list(promotion.broken)})
    run.location.join(schema.KEPT_BACK).write(b"")
    clean_up(run)
    raise NotPromotedError(
        f"Run {run.run_id} is complete and not published: {'; '.join(promotion.broken)}. The table is unchanged. The same "
        "command publishes it without doing it again once the condition is changed or removed."
    )
