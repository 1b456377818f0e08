"""An output folder -> its published runs, its lease and the state of each run, from what its documents say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tlbatch import schema
from tlbatch.output.lease import read_lease
from tlbatch.output.receipts import count_staged
from tlbatch.output.run import Run, read_output, require_runs
from tlbatch.storage.location import Location


def status(output: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state of an output, from its folder alone.

    Returns:
        `output`; `published`, the runs that make up the table; `lease`, the active run or None; and `runs`, each run with its
        state and counts.

    Raises:
        OutputError: there is no output.
    """
    location = require_runs(output, storage_options)
    state = read_output(location)
    published = [entry["run_id"] for entry in state.pointer]
    described = [_describe(run, published) for run in state.runs]
    return {"output": location.url, "published": published, "lease": read_lease(location), "runs": described}


def _describe(run: Run, published: list[str]) -> dict[str, Any]:
    facts = {"run_id": run.run_id, "began": run.facts["began"]}
    report = _read_json(run.location.join(schema.REPORT))
    if report is not None and (run.run_id in published or run.finished()):
        unpublished = "kept back" if "kept_back" in report else "superseded"
        counts = {name: report[name] for name in ("listed", "predicted", "failed")}
        return {**facts, "state": "published" if run.run_id in published else unpublished, **counts, "left": 0}
    counts = count_staged(run.staged.names()).counts(run.facts["objects"])
    return {**facts, "state": "unfinished", **counts, "progress": _read_json(run.location.join(schema.PROGRESS))}


def _read_json(location: Location) -> Any:
    try:
        return json.loads(location.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
