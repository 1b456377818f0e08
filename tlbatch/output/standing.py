"""An incremental run and the table it adds to -> the failures of the whole table, and which of the run's failures are new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.output.run import Run, read_report
from tlbatch.output.table import read_groups, read_run_table

_FAILURE = ["uri", "key", "kind"]


def failures_after(runs: Sequence[Run], run: Run, listed: int, failed: int) -> dict[str, Any]:
    """What `report.json` says of the failures in the table after an incremental run; empty if the run has none.

    Args:
        runs: the runs of the table before it, the oldest first: it adds to them, or else replaces all they had.
        run: the run, whose files are written.
        listed: images of the run.
        failed: failed images of the run.

    Returns:
        `table`: `listed` and `failed` images of the whole table; `failed_new`: failures of the run that the table did not have,
        by image and kind; `unreadable_new`: closed folders that the run before did not name.
    """
    folders = set(run.facts.get("unreadable", ()))
    found: dict[str, Any] = {}
    if folders:
        found["unreadable_new"] = len(folders - set(runs[-1].facts.get("unreadable", ())))
    return found | _images_after(runs, run, listed, failed) if failed or folders else found


def _images_after(runs: Sequence[Run], run: Run, listed: int, failed: int) -> dict[str, Any]:
    redone = pa.chunked_array([*run.manifest["uri"].chunks, *run.removed["uri"].chunks], pa.string())
    kept, before = 0, set[tuple[str, ...]]()
    for rows in read_groups(runs, "errors", _FAILURE):
        again = pc.is_in(rows["uri"], redone)
        kept += rows.num_rows - int(again.to_numpy().sum())
        before.update(_failures(rows.filter(again)))
    now = list(_failures(read_run_table(run.location, "errors", _FAILURE)))
    table = {"listed": listed, "failed": failed}
    if run.on:
        table = {"listed": listed + kept + _predicted(runs, run, redone, kept), "failed": failed + kept}
    return {"table": table, "failed_new": sum(one not in before for one in now)}


def _failures(rows: pa.Table) -> Iterator[tuple[str, ...]]:
    return zip(*(rows[name].to_pylist() for name in _FAILURE), strict=True)


def _predicted(runs: Sequence[Run], run: Run, redone: pa.ChunkedArray, failed: int) -> int:
    """The predicted images of the earlier runs that stay in the table.

    If every object is one image, the run's counts say it. Images in shards are counted in the table.
    """
    counts: Mapping[str, int] = run.facts.get("counts") or {}
    loose = all(report["listed"] == report["objects"] for report in map(read_report, runs))
    if counts and loose:
        return max(0, sum(counts.values()) - counts["deleted"] - int(run.manifest.num_rows) - failed)
    parts = read_groups(runs, "predictions" if run.facts["spec"]["predictions"] else "features", ["uri"])
    stay: int = sum(rows.num_rows - int(pc.is_in(rows["uri"], redone).to_numpy().sum()) for rows in parts)
    return stay


def too_many_failed(report: Mapping[str, Any], most: float) -> str | None:
    """A sentence if a command published a table with too many failures and some of them are new; else None.

    A folder that could not be opened counts as one more failure. What failed before for the same reason has been reported.

    Args:
        report: what the command returned.
        most: `max_failed_ratio`.
    """
    folders = len(report.get("unreadable", ()))
    new = report.get("failed_new", report["failed"]) + report.get("unreadable_new", folders)
    table = report.get("table", report)
    if report.get("already_done") or not new or table["failed"] + folders <= most * (table["listed"] + folders):
        return None
    found = f"{report['failed']} of {report['listed']} images failed"
    if "failed_new" in report:
        found += f", {report['failed_new']} of them newly; of the whole table {table['failed']} of {table['listed']}"
    closed = f" and {folders} folder{'' if folders == 1 else 's'} could not be opened" if folders else ""
    return f"{found}{closed}, more than max_failed_ratio={most} allows; the table is published all the same."
