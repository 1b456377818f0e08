"""What a command would do: the six counts, bytes, time and machine hours. Nothing is written and no run is begun.

The time is that of two straight lines: a start, and a rate. Both come from the newest published run where it was large enough,
or else from a few seconds of work on images of this very store.
"""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.commands.classify import OutputTable, diff_with_store, job_of, match_features, without_matches
from tlbatch.commands.list_images import list_images
from tlbatch.config import RunConfig
from tlbatch.errors import ConfigError
from tlbatch.execution.actors import Classifier
from tlbatch.execution.resources import ClusterResources, read_cluster
from tlbatch.execution.session import ray_session
from tlbatch.execution.sizing import ExecutionPlan, plan_for, work_of
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import choose
from tlbatch.output.commit import RunInput
from tlbatch.output.progress import Watcher
from tlbatch.output.receipts import numbered
from tlbatch.output.run import OutputState, read_output, read_report
from tlbatch.schema import IMAGE
from tlbatch.storage.resolve import resolve

#: What the spec of a run has that took its images from elsewhere.
_NOT_READ = {"rescored", "compacted"}
#: Images of the newest run from which on its rates are believed.
_ENOUGH = 1_000
#: Images that are classified to find the rate, and before that to warm up.
_SAMPLE, _WARM_UP = 384, 64
#: Seconds of a command beside its images: Python, Ray, its workers, the engine, and publishing (measured on 2 cores).
_START_SECONDS = 6.5
#: Images a second and CPU that are re-scored from stored features (half of what was measured, docs/benchmarks.md).
_RESCORED_A_SECOND = 5_000


class Rates(NamedTuple):
    """How fast a run is: the images that a byte of shards holds, seconds to start, images a second; and how one knows."""

    images_a_byte: float
    start_seconds: float
    images_per_second: float
    known_from: str


def plan(config: RunConfig, watch: Watcher | None = None) -> dict[str, Any]:
    """What `classify` with this configuration would do.

    Returns:
        `counts` of new, changed, retry, stale, deleted and unchanged objects; `objects` to be done, `rescored` of them from
        stored features; `bytes` to read, as far as the listing tells; `images`, an estimate where there are shards;
        `seconds`, `cpu_hours`, `gpu_hours`; and `known_from`, what the estimate rests on.

    Raises:
        UsageError: the command could not run.
    """
    if config.other_bundles:
        raise ConfigError("plan: bundles that share a pass have a table each; plan for one of them at a time.")
    bundle = load_bundle(config.bundle, config.storage_options)
    bundle.require_whole()
    table = OutputTable(config, bundle, resolve(config.output, config.storage_options))
    state = read_output(table.output)
    listing = list_images(config, table.output, watch)
    whole = RunInput(listing.manifest, listing.skipped, listing.seconds)
    # Without --incremental everything is done; the counts say what an incremental run would do.
    increment = diff_with_store(table, whole, state)
    given = increment if config.incremental else whole
    machines = _cluster(config)
    rows = numbered(given.manifest)
    matches = match_features(table, state, rows) if config.incremental and config.stale == "rescore" else []
    left = without_matches(rows, matches)
    rescored = rows.num_rows - left.num_rows
    result = {
        "output": table.output.url,
        "counts": increment.counts,
        "objects": rows.num_rows,
        "rescored": rescored,
        "bytes": pc.sum(left["size"]).as_py() or 0,
        "list_seconds": round(listing.seconds, 1),
    }
    return {**result, **_costs(table, state, left, rescored, machines)}


def _costs(table: OutputTable, state: OutputState, left: pa.Table, rescored: int, machines: ClusterResources) -> dict[str, Any]:
    """Time and machine hours of reading what is left and re-scoring the rest."""
    if not left.num_rows and not rescored:
        return {
            "images": 0,
            "images_per_second": 0.0,
            "seconds": 0.0,
            "cpu_hours": 0.0,
            "gpu_hours": 0.0,
            "known_from": "listing",
        }
    config = table.config
    cpus, gpus = (sum(node.get(name, 0.0) for node in machines.machines) for name in ("CPU", "GPU"))
    seconds = rescored / (_RESCORED_A_SECOND * max(1.0, cpus))
    rates, images = Rates(0.0, _START_SECONDS, 0.0, "what was measured"), 0
    if left.num_rows:
        work = int(work_of(left, config.rows_per_task).sum())
        plan = plan_for(config.model_copy(update={"num_gpus": config.num_gpus or 0.0}), work, machines)
        rates = _from_last_run(table, state) or _calibrated(table, plan, left)
        images = _images(left, rates.images_a_byte)
        seconds += images / rates.images_per_second
    seconds += rates.start_seconds
    return {
        "images": images + rescored,
        "images_per_second": round(rates.images_per_second, 1),
        "seconds": round(seconds, 1),
        "cpu_hours": round(seconds * cpus / 3600, 3),
        "gpu_hours": round(seconds * gpus / 3600, 3),
        "known_from": rates.known_from,
    }


def _cluster(config: RunConfig) -> ClusterResources:
    """What each machine of the cluster has; Ray is not started for that on this one."""
    if not (config.address or os.environ.get("RAY_ADDRESS")):
        return ClusterResources([{"CPU": float(os.cpu_count() or 1)}])
    with ray_session(config.address) as start:
        start()
        return read_cluster()


def _from_last_run(table: OutputTable, state: OutputState) -> Rates | None:
    """The rates of the newest published run, if it did enough with the same base and engine."""
    newest = state.newest
    if newest is None:
        return None
    report = read_report(newest)
    if (report.get("counts") or {}).get("stale") or newest.facts["spec"].keys() & _NOT_READ:
        return None
    found, images = report.get("bottleneck"), report["images_per_second"] * report["seconds"]
    same = newest.facts["base"] == table.bundle.base_digest and report["engine"] == table.engine
    if not found or images < _ENOUGH or not same:
        return None
    busy = min(1.0, max(0.05, found["busy"]))
    size = pc.sum(newest.manifest["size"]).as_py() or 0
    return Rates(
        images_a_byte=report["listed"] / size if size else 0.0,
        start_seconds=report["seconds"] * (1 - busy),
        images_per_second=images / (report["seconds"] * busy),
        known_from=f"run {newest.run_id}",
    )


def _calibrated(table: OutputTable, plan: ExecutionPlan, left: pa.Table) -> Rates:
    """The rates of this machine on a few of these very images, times the actors that the cluster holds."""
    rows = _sample(left)
    engine = choose(table.bundle, table.config.engine, gpu=False)
    worker = Classifier(job_of(table.config, table.bundle.pinned, engine, plan, rows))
    if rows["format"][0].as_py() == IMAGE:
        worker(rows.slice(0, _WARM_UP))
        rows = rows.slice(_WARM_UP) if rows.num_rows > 2 * _WARM_UP else rows
    began = time.perf_counter()
    images = worker(rows).num_rows
    rate = images / (time.perf_counter() - began)
    size = pc.sum(rows["size"]).as_py() or 0
    actors = max(pool.actors for _, pool in plan.pools)
    return Rates(images / size if size else 0.0, _START_SECONDS, rate * actors, f"{images} images classified here")


def _sample(left: pa.Table) -> pa.Table:
    """Loose images from all over the store, or its smallest shard."""
    loose = left.filter(pc.equal(left["format"], IMAGE))
    if loose.num_rows:
        return loose.take(np.unique(np.linspace(0, loose.num_rows - 1, _SAMPLE + _WARM_UP).astype(np.int64)))
    return left.take(pc.sort_indices(pc.fill_null(left["size"], 0))[:1])


def _images(left: pa.Table, images_a_byte: float) -> int:
    shards = left.filter(pc.not_equal(left["format"], IMAGE))
    size = pc.sum(shards["size"]).as_py() or 0
    return int(left.num_rows - shards.num_rows + max(shards.num_rows, round(size * images_a_byte)))
