"""An output folder -> what it says of itself: `status`, and `verify`, which believes nothing it can recompute."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import ledger, schema
from tlbatch.errors import BooksError, OutputError
from tlbatch.ledger import Run, read_latest
from tlbatch.schema import from_parquet, sha256
from tlbatch.shards import IMAGE
from tlbatch.storage import Place, resolve

#: Differences that `verify` names before it stops counting them.
MOST_DIFFERENCES = 20


def status(output: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How an output stands, from the folder alone: what is published, who is at work, and each run's counts.

    Raises:
        OutputError: there is no output.
    """
    place = _require_output(output, storage_options)
    published = [entry["run_id"] for entry in read_latest(place)]
    described = [_describe(run, published) for run in ledger.runs(place)]
    return {"output": place.url, "published": published, "lease": ledger.read_lease(place), "runs": described}


def _describe(run: Run, published: list[str]) -> dict[str, Any]:
    facts = {"run_id": run.run_id, "began": run.facts["began"]}
    report = _read_json(run.place.join(schema.REPORT))
    if report is not None and run.run_id in published:
        books = {name: report[name] for name in ("listed", "predicted", "failed")}
        return {**facts, "state": "published", **books, "left": 0}
    books = ledger.count_staged(run.staged.names()).books(run.facts["objects"])
    progress = _read_json(run.place.join(schema.PROGRESS))
    state = "superseded" if run.finished() else "unfinished"
    return {**facts, "state": state, **books, "progress": progress}


def _read_json(place: Place) -> Any:
    try:
        return json.loads(place.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _require_output(output: str, options: Mapping[str, Any] | None) -> Place:
    place = resolve(output, options)
    if schema.RUNS not in place.names():
        raise OutputError(f"There is no tlbatch output at {place.url}: it has no folder {schema.RUNS}.")
    return place


def verify(output: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Recompute counts, identities and digests of every run of an output.

    Returns:
        `ok`; `runs`, how many were checked; `listed`, `predicted` and `failed` of the published table; and
        `differences`, at most `MOST_DIFFERENCES` sentences.

    Raises:
        OutputError: there is no output.
    """
    place = _require_output(output, storage_options)
    differences: list[str] = []
    totals = {"listed": 0, "predicted": 0, "failed": 0}
    entries = {entry["run_id"]: entry for entry in read_latest(place)}
    found = ledger.runs(place)
    differences += [
        f"latest.json names run {name}, which is not there" for name in entries.keys() - {run.run_id for run in found}
    ]
    for run in found:
        entry = entries.get(run.run_id)
        if entry is None:
            differences += _check_unpublished(run)
            continue
        counts, wrong = _check_published(run, entry["report_sha256"])
        differences += wrong
        totals = {name: totals[name] + counts[name] for name in totals}
    return {
        "ok": not differences,
        "output": place.url,
        "runs": len(found),
        **totals,
        "differences": differences[:MOST_DIFFERENCES],
        "differences_in_all": len(differences),
    }


def _check_unpublished(run: Run) -> list[str]:
    """A run that is not in the table: its manifest, and its parts as far as they are there."""
    if run.finished():
        return []
    wrong = []
    try:
        _ = run.manifest
    except (BooksError, OSError, pa.ArrowInvalid) as error:
        wrong.append(f"{run.run_id}: {error}")
    receipts = ledger.read_receipts(run)
    wrong += [f"{run.run_id}/{schema.STAGED}/{name}: the receipt is damaged" for name in receipts.broken]
    for body in receipts.bodies:
        with contextlib.suppress(FileNotFoundError):  # the run is at work and has just published
            if sha256(run.staged.join(body["part"]).read()) != body["part_sha256"]:
                wrong.append(f"{run.run_id}/{schema.STAGED}/{body['part']}: differs from its receipt")
    return wrong


def _check_published(run: Run, report_sha256: str) -> tuple[dict[str, int], list[str]]:
    nothing = {"listed": 0, "predicted": 0, "failed": 0}
    try:
        data = run.place.join(schema.REPORT).read()
    except FileNotFoundError:
        return nothing, [f"{run.run_id}/{schema.REPORT}: missing"]
    if sha256(data) != report_sha256:
        return nothing, [f"{run.run_id}/{schema.REPORT}: differs from the sha256 in {schema.LATEST}"]
    report = json.loads(data)
    wrong = [f"{run.run_id}/{name}" for name in _damaged(run, report)]
    if wrong:
        return nothing, wrong
    manifest = from_parquet(run.place.join(schema.MANIFEST).read())
    counts: dict[str, int] = {}
    seen: list[pa.Table] = []
    wrong += [f"{run.run_id}/{name}: is not in the report" for name in _unexpected(run, report)]
    main = "predictions" if any(name.startswith("predictions/") for name in report["files"]) else "features"
    for table, count in ((main, "predicted"), ("errors", "failed")):
        parts = [name for name in report["files"] if name.startswith(f"{table}/")]
        rows = [from_parquet(run.place.join(*name.split("/")).read(), ["uri", "key"]) for name in parts]
        counts[count] = sum(part.num_rows for part in rows)
        seen += rows
    counts["listed"] = counts["predicted"] + counts["failed"]
    return counts, [*wrong, *_unbalanced(run, manifest, pa.concat_tables(seen), counts, report)]


def _unexpected(run: Run, report: Mapping[str, Any]) -> list[str]:
    """Files a reader of the run's folders would take for its tables."""
    folders = ("predictions", "errors", "features")
    found = [f"{folder}/{name}" for folder in folders for name in run.place.join(folder).names()]
    return [name for name in found if name.endswith(schema.PART_SUFFIX) and name not in report["files"]]


def _damaged(run: Run, report: Mapping[str, Any]) -> Iterator[str]:
    expected = {name: facts["sha256"] for name, facts in report["files"].items()} | {schema.MANIFEST: report["manifest_sha256"]}
    for name, digest in expected.items():
        try:
            if sha256(run.place.join(*name.split("/")).read()) != digest:
                yield f"{name}: differs from its recorded sha256"
        except FileNotFoundError:
            yield f"{name}: missing"


def _unbalanced(
    run: Run, manifest: pa.Table, seen: pa.Table, counts: Mapping[str, int], report: Mapping[str, Any]
) -> Iterator[str]:
    """Sentences about images that were promised and are in no table, or are there and were not promised, or twice."""
    for name, count in counts.items():
        if count != report[name]:
            yield f"{run.run_id}: {name} is {report[name]} in the report and {count} in the files"
    shards = manifest.filter(pc.not_equal(manifest["format"], IMAGE))["uri"]
    for uri in shards.filter(pc.invert(pc.is_in(shards, seen["uri"].combine_chunks()))).to_pylist():
        yield f"{run.run_id}: the shard {uri} was listed and nothing of it is in the tables"
    # Which images a shard holds is known from the shard alone; of loose ones each is promised by name.
    loose = manifest.filter(pc.equal(manifest["format"], IMAGE)).select(["uri", "key"])
    seen = seen.filter(pc.invert(pc.is_in(seen["uri"], shards.combine_chunks())))
    promised = loose.append_column("promised", pa.array([1] * loose.num_rows, pa.int64()))
    found = seen.select(["uri", "key"]).append_column("found", pa.array([1] * seen.num_rows, pa.int64()))
    left = promised.group_by(["uri", "key"]).aggregate([("promised", "sum")])
    right = found.group_by(["uri", "key"]).aggregate([("found", "sum")])
    joined = left.join(right, keys=["uri", "key"], join_type="full outer").sort_by("key")
    for row in joined.to_pylist():
        want, have = row["promised_sum"] or 0, row["found_sum"] or 0
        if want != have:
            yield f"{run.run_id}: {row['key']} was listed {want} times and is in the tables {have} times"
