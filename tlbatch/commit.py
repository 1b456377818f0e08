"""From what is asked for to a published table: the order of every write of a run, so that it can die between any two.

`docs/protocol.md` tells what a death between each two of them leaves, and why the next run is right.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from tlbatch import ledger, publish, schema
from tlbatch.errors import NotPromotedError, OutputError, closest
from tlbatch.lease import Lease
from tlbatch.ledger import Published, Receipts, Run
from tlbatch.publish import Each, Tables
from tlbatch.storage import Place

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Promise:
    """What a run would promise.

    Attributes:
        manifest: as `schema.MANIFEST_SCHEMA`.
        skipped: how many objects of the store were passed over.
        seconds: how long it took to list.
        on: the published runs it adds to, as `latest.json` has them; without them its table is whole by itself.
        removed: uri and key of what it takes from their table.
        counts: of an incremental run, how many objects are new, changed and so on; None of any other.
    """

    manifest: pa.Table
    skipped: int
    seconds: float
    on: Published = ()
    removed: pa.Table = field(default_factory=schema.REMOVED_SCHEMA.empty_table)
    counts: Mapping[str, int] | None = None

    @property
    def nothing_to_do(self) -> bool:
        """Whether the table is what an incremental run would make of it."""
        return self.counts is not None and not (self.manifest.num_rows or self.removed.num_rows)


#: A complete run -> what it was measured to be against the table, and why it may not follow it.
Gate = Callable[[Run], tuple[Mapping[str, Any] | None, Sequence[str]]]


@dataclass(frozen=True)
class Order:
    """What is to be in an output, and who does the work."""

    #: What changes the answer, `engine` included: with `bundle` and the manifest it is the fingerprint.
    spec: Mapping[str, Any]
    #: The bundle's digest.
    bundle: str
    #: The digest of its base.
    base: str
    predictions: bool
    #: Schema of the features table; None where there is none.
    features: pa.Schema | None
    #: Given what is published, what the store holds, listed since then. Asked for only when it is needed, under the lease: an
    #: older listing would take from the table what another run has added to it.
    listing: Callable[[Published], Promise]
    #: Stages the outcome of the given rows of the manifest, each with its number in a column `row`, in parts of each run.
    work: Callable[[Sequence[Run], pa.Table], None]
    #: What else `run.json` says.
    facts: Mapping[str, Any] = field(default_factory=dict)
    #: How published files are spread over machines.
    each: Each = map
    #: Given the seconds in each stage of what this command did, and its own: which one it waited for; None if nothing was done.
    bottleneck: Callable[[Mapping[str, float], float], Mapping[str, Any] | None] = lambda _stages, _seconds: None
    #: Whether what failed will fail again, however transient its reason was: another run could do no better.
    final: bool = False
    #: Whether only what the table lacks is done.
    incremental: bool = False
    #: Asked before a complete run is published; None lets every run through.
    gate: Gate | None = None
    #: When the command began, by `time.monotonic`.
    began: float = field(default_factory=time.monotonic)

    def tables(self, run: Run) -> Tables:
        """What a run of this order publishes."""
        return Tables(run.run_id, self.bundle, self.base, self.predictions, self.features)


def carry_out(output: Place, order: Order, run_id: str) -> dict[str, Any]:
    """Bring an output to where the order is published: continue, begin, or find that it is done.

    Args:
        output: the folder.
        order: what is to be in it.
        run_id: the name of the run, should one be begun.

    Returns:
        What the run's `report.json` says; with `already_done` if nothing had to be.

    Raises:
        LeaseHeldError: somebody else is at work there.
        OutputError: an unfinished run there is of another order.
        BooksError: the images do not add up; nothing was published.
    """
    return carry_out_together([(output, order)], run_id)[0]


def carry_out_together(asked: Sequence[tuple[Place, Order]], run_id: str) -> list[dict[str, Any]]:
    """`carry_out` for orders of one kind of work: what several of them lack is done once, by the first one's `work`.

    Args:
        asked: each output with its order; every output is published by itself.
        run_id: the name of the runs that are begun.

    Returns:
        The reports, in the order of `asked`.

    Raises:
        NotPromotedError: some are kept back; the others are published.
    """
    with contextlib.ExitStack() as leases:
        begun = [
            _or_kept_back(_start, output, order, run_id, leases.enter_context(Lease(output, run_id))) for output, order in asked
        ]
        open_ones = [one for one in begun if isinstance(one, _Begun)]
        for manifest in dict.fromkeys(one.run.facts["manifest_sha256"] for one in open_ones):
            same = [one for one in open_ones if one.run.facts["manifest_sha256"] == manifest]
            left = _in_any(same)
            if left.num_rows:
                same[0].order.work([one.run for one in same], left)
        ended = [_or_kept_back(_publish, one) if isinstance(one, _Begun) else one for one in begun]
    kept_back = [one for one in ended if isinstance(one, NotPromotedError)]
    if kept_back:
        raise NotPromotedError(" ".join(map(str, kept_back)))
    return [one for one in ended if isinstance(one, dict)]


def _or_kept_back(step: Callable[..., T], *arguments: Any) -> T | NotPromotedError:
    """What a step gives, or the error that keeps one table back: the others go on."""
    try:
        return step(*arguments)
    except NotPromotedError as error:
        return error


class _Begun(NamedTuple):
    """A run at work: what it still lacks, and the receipts it had when this command began."""

    output: Place
    order: Order
    run: Run
    lease: Lease
    left: pa.Table
    before: Receipts


def _start(output: Place, order: Order, run_id: str, lease: Lease) -> _Begun | dict[str, Any]:
    """Continue or begin a run; the report of one that is what was asked for already."""
    newest = ledger.newest_published(output)
    if newest is not None:
        newest.place.join(schema.KEPT_BACK).delete()  # it was let through, by a command that died before it could say so
    run = to_continue(output, order, tidy=True)
    if run is None:
        done = _already_done(output, order) or _let_through(output, order, lease)
        if done is not None:
            return done
        run = _begin(output, order, run_id, lease)
    return _Begun(output, order, run, lease, *what_is_left(run))


def _in_any(begun: Sequence[_Begun]) -> pa.Table:
    """The rows that any of the runs, all of one manifest, still lacks."""
    if len(begun) == 1:
        return begun[0].left
    lacking = np.zeros(begun[0].run.manifest.num_rows, bool)
    for one in begun:
        lacking[one.left["row"].to_numpy()] = True
    return numbered(begun[0].run.manifest).filter(pa.array(lacking))


def to_continue(output: Place, order: Order, *, tidy: bool = False) -> Run | None:
    """The run to continue, if there is one.

    One that died between the flip, or the decision to keep it back, and its last step only wants to be tidied, which takes the
    lease.

    Raises:
        OutputError: it was begun with another spec or bundle.
    """
    current = ledger.unfinished_run(output)
    if current is None:
        return None
    latest = ledger.read_latest(output)
    decided = current.run_id in [entry["run_id"] for entry in latest]
    if decided or current.place.join(schema.KEPT_BACK).exists():
        if tidy:
            _tidy(current)
        return None
    if "compacted" in current.facts["spec"] and current.facts["spec"] != order.spec:
        return None  # the table is whole without it
    if current.on and current.on != latest:
        return None  # the table went back to an earlier one: what this run adds to is no more
    ledger.require_same(current, order.spec, order.bundle, incremental=order.incremental)
    return current


def _already_done(output: Place, order: Order) -> dict[str, Any] | None:
    """The report of the published run that is what was asked for, if there is one and no other run could do better."""
    latest = ledger.read_latest(output)
    if not latest:
        return None
    promise = order.listing(latest)
    if promise.counts is not None:
        return _nothing_new(output, order, promise) if promise.nothing_to_do else None
    newest = ledger.newest_published(output)
    # A table of several nights is not what its oldest run was, even where the store is.
    if newest is None or len(latest) > 1 or newest.fingerprint != _fingerprint(order, promise):
        return None
    report = read_report(newest)
    return None if report["failed_transient"] and not order.final else {**report, "already_done": True}


def _fingerprint(order: Order, promise: Promise) -> str:
    """Of the run that would keep a promise."""
    increment = ledger.increment_facts(promise.on, promise.removed)
    return ledger.fingerprint(order.spec, order.bundle, schema.sha256(schema.to_parquet(promise.manifest)), increment)


def _nothing_new(output: Place, order: Order, promise: Promise) -> dict[str, Any]:
    """The report of a night on which the store is what it was: it lists."""
    newest = ledger.newest_published(output)
    seconds = time.monotonic() - order.began
    return {
        "run_id": newest.run_id if newest else "",
        "output": output.url,
        **dict.fromkeys(("objects", "listed", "predicted", "failed", "failed_transient"), 0),
        "skipped": promise.skipped,
        "seconds": round(seconds, 3),
        "images_per_second": 0.0,
        "bundle": order.bundle,
        "engine": order.spec["engine"],
        "failed_by_kind": {},
        "stage_seconds": {"list": round(promise.seconds, 3)},
        "labels": {},
        "counts": promise.counts,
        "already_done": True,
    }


def _let_through(output: Place, order: Order, lease: Lease) -> dict[str, Any] | None:
    """Publish a run that was kept back, if it is what is asked for and nothing is in its way any more; nothing is done again.

    Raises:
        NotPromotedError: a condition still does not hold.
    """
    kept = [run for run in ledger.runs(output) if run.place.join(schema.KEPT_BACK).exists()]
    if not kept:
        return None
    wanted = _fingerprint(order, order.listing(ledger.read_latest(output)))
    found = next((run for run in reversed(kept) if run.fingerprint == wanted), None)
    if found is None:
        return None
    report = {name: value for name, value in read_report(found).items() if name not in ("compared", "kept_back")}
    try:
        report = _promote(output, order, found, lease, report)
    except NotPromotedError:
        if report["failed_transient"]:
            return None  # a bad hour of the store may be why: it is done again
        raise
    found.place.join(schema.KEPT_BACK).delete()
    return report


def read_report(run: Run) -> dict[str, Any]:
    """What a run's `report.json` says.

    Raises:
        BooksError: it is damaged.
    """
    return ledger.read_sealed(run.place.join(schema.REPORT))


def _begin(output: Place, order: Order, run_id: str, lease: Lease) -> Run:
    promise = order.listing(ledger.read_latest(output))
    found: dict[str, Any] = {"skipped": promise.skipped, "list_seconds": round(promise.seconds, 3)}
    if promise.counts is not None:
        found["counts"] = promise.counts
    facts = {"spec": order.spec, "bundle": order.bundle, **found, **order.facts}
    added = {"on": promise.on, "removed": promise.removed}
    return ledger.begin(output, run_id, promise.manifest, facts, began=lease.since, still_mine=lease.require_held, **added)


def what_is_left(run: Run) -> tuple[pa.Table, Receipts]:
    """The rows of the manifest that no receipt holds yet, each with its number; and the receipts."""
    rows = numbered(run.manifest)
    receipts = ledger.read_receipts(run)
    images = receipts.images(rows.num_rows)
    return rows.filter(pa.array(images == 0)) if images.any() else rows, receipts


def numbered(manifest: pa.Table) -> pa.Table:
    """A manifest with a column `row`, each object's place in it."""
    return manifest.append_column("row", pa.array(np.arange(manifest.num_rows), pa.int64()))


def _publish(begun: _Begun) -> dict[str, Any]:
    output, order, run, lease, _, before = begun
    lease.require_held()
    receipts = ledger.settle(run, ledger.read_receipts(run))
    books = publish.write_tables(run, receipts, order.tables(run), order.each)
    seconds = time.monotonic() - order.began
    images_before = int(before.images(run.manifest.num_rows).sum())
    stages, stages_before = receipts.seconds(), before.seconds()
    spent = {stage: taken - stages_before.get(stage, 0.0) for stage, taken in stages.items()}
    report = {
        "run_id": run.run_id,
        "output": output.url,
        "objects": run.facts["objects"],
        "listed": books.listed,
        "predicted": books.predicted,
        "failed": books.failed,
        "skipped": run.facts["skipped"],
        "seconds": round(seconds, 3),
        "images_per_second": round((books.listed - images_before) / seconds, 2),
        "bundle": order.bundle,
        "engine": order.spec["engine"],
        "failed_by_kind": dict(books.failed_by_kind),
        "failed_transient": books.transient,
        "stage_seconds": {"list": run.facts["list_seconds"], **stages},
        "bottleneck": order.bottleneck(spent, seconds),
        "labels": dict(books.labels),
        "manifest_sha256": run.facts["manifest_sha256"],
        "files": dict(books.files),
        **{name: run.facts[name] for name in ("counts", "on", "removed_sha256") if name in run.facts},
    }
    return _promote(output, order, run, lease, report)


def _promote(output: Place, order: Order, run: Run, lease: Lease, report: dict[str, Any]) -> dict[str, Any]:
    """Make a complete run the table, unless the order has a gate that it does not pass: then it is kept and marked."""
    compared, broken = order.gate(run) if order.gate is not None else (None, ())
    if order.gate is not None:
        report = {**report, "compared": compared}
    if broken:
        lease.require_held()
        run.place.join(schema.REPORT).write(schema.seal({**report, "kept_back": list(broken)}))
        run.place.join(schema.KEPT_BACK).write(b"")
        _tidy(run)
        raise NotPromotedError(
            f"Run {run.run_id} is complete and not published: {'; '.join(broken)}. The table is as it was. The same command "
            "publishes it without doing it again once the condition is changed or left out."
        )
    publish.make_visible(output, run, report, lease.require_held)
    _tidy(run)
    return report


def roll_back(output: Place, run_id: str) -> dict[str, Any]:
    """Make the table what it was after a run; nothing is done again, and the runs since then stay where they are.

    Returns:
        `table`, the names of the runs that make it up, and `before`, of those that did.

    Raises:
        OutputError: there is no such run, or it was never published.
        BooksError: a run that it adds to is gone.
        LeaseHeldError: somebody is at work there.
    """
    found = {run.run_id: run for run in ledger.runs(output)}
    run = found.get(run_id)
    if run is None or not run.finished() or run.place.join(schema.KEPT_BACK).exists():
        known = [name for name, one in found.items() if one.finished()]
        raise OutputError(f"to: {output.url} has never published a run {run_id!r}{closest(run_id, known)}.")
    before = [entry["run_id"] for entry in ledger.read_latest(output)]
    with Lease(output, "rollback") as lease:
        ledger.read_published(output, run.on)
        for one in found.values():
            if one.run_id in before and not one.finished():
                publish.tidy(one)  # or the next command would take it for one to continue
        publish.flip(output, run, read_report(run), lease.require_held)
    return {"output": output.url, "table": [*(entry["run_id"] for entry in run.on), run_id], "before": before}


def _tidy(run: Run) -> None:
    """Whatever happens here, the table is published: the next run tries again."""
    try:
        publish.tidy(run)
    except OSError as error:
        log.warning("run %s is published, but what it staged could not be removed: %s", run.run_id, error)
