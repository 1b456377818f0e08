"""An output folder -> how it stands, by what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tlbatch import ledger, schema
from tlbatch.lease import read_lease
from tlbatch.ledger import Run, read_latest, require_runs
from tlbatch.storage import Place


def status(output: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How an output stands, from the folder alone: what is published, who is at work, and each run's counts.

    Raises:
        OutputError: there is no output.
    """
    place = require_runs(output, storage_options)
    published = [entry["run_id"] for entry in read_latest(place)]
    described = [_describe(run, published) for run in ledger.runs(place)]
    return {"output": place.url, "published": published, "lease": read_lease(place), "runs": described}


def _describe(run: Run, published: list[str]) -> dict[str, Any]:
    facts = {"run_id": run.run_id, "began": run.facts["began"]}
    report = _read_json(run.place.join(schema.REPORT))
    if report is not None and (run.run_id in published or run.finished()):
        other = "kept back" if "kept_back" in report else "superseded"
        books = {name: report[name] for name in ("listed", "predicted", "failed")}
        return {**facts, "state": "published" if run.run_id in published else other, **books, "left": 0}
    books = ledger.count_staged(run.staged.names()).books(run.facts["objects"])
    return {**facts, "state": "unfinished", **books, "progress": _read_json(run.place.join(schema.PROGRESS))}


def _read_json(place: Place) -> Any:
    try:
        return json.loads(place.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
