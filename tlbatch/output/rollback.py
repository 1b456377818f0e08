"""A table -> the table that it was after an earlier run."""

from __future__ import annotations

from typing import Any

from tlbatch.errors import OutputError, closest
from tlbatch.output.lease import Lease
from tlbatch.output.publish import mark_complete, remove_staged, swap_pointer
from tlbatch.output.run import OutputState, Run, read_output, read_report
from tlbatch.storage.location import Location


def roll_back(output: Location, run_id: str) -> dict[str, Any]:
    """Make the table what it was after a run. Nothing is processed again, and later runs keep their files.

    Returns:
        `output`; `table`, the names of the runs that make it up; and `before`, of those that did.

    Raises:
        OutputError: there is no such run, or it was never published.
        CountsError: a run that it adds to does not exist any more.
        LeaseHeldError: another process is running there.
    """
    _published_run(read_output(output), run_id)  # before the lease, which would create the folder
    with Lease(output, "rollback") as lease:
        state = read_output(output)
        run = _published_run(state, run_id)
        before = [entry["run_id"] for entry in state.pointer]
        state.named(run.on)
        for one in state.runs:
            if one.run_id in before and not one.finished():
                remove_staged(one)  # or the next command would continue it
                mark_complete(one)
        swap_pointer(output, run, read_report(run), lease.require_held)
    return {"output": output.url, "table": [*(entry["run_id"] for entry in run.on), run_id], "before": before}


def _published_run(state: OutputState, run_id: str) -> Run:
    run = state.by_id.get(run_id)
    if run is None or not run.finished() or run.kept_back():
        known = [name for name, one in state.by_id.items() if one.finished()]
        raise OutputError(f"to: {state.output.url} has never published a run {run_id!r}{closest(run_id, known)}.")
    return run
