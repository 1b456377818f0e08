"""A configuration of `classify` -> the counts, bytes, time and machine hours of its next run. Nothing is written.

The estimated time is a start-up time plus the number of images divided by a rate. Both come from the newest published run if it
was large enough. Otherwise the rate is measured on a sample of the store, and the start-up time is a constant.
"""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.commands.classify import OutputTable, diff_with_store, match_features, without_matches
from tlbatch.commands.list_images import list_images, run_input
from tlbatch.config import RunConfig
from tlbatch.errors import ConfigError
from tlbatch.execution.actors import Classifier
from tlbatch.execution.classify_rows import job_of
from tlbatch.execution.resources import ClusterResources, read_cluster
from tlbatch.execution.session import ray_session
from tlbatch.execution.sizing import ExecutionPlan, plan_for, work_of
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import choose
from tlbatch.output.bottleneck import gain_in_int8
from tlbatch.output.diff import too_many_deleted
from tlbatch.output.progress import Watcher
from tlbatch.output.receipts import numbered
from tlbatch.output.run import OutputState, Run, read_output, read_report
from tlbatch.schema import ARCHIVED, IMAGE, is_loose

#: Fields of the spec of a run that did not read images.
_NOT_READ = {"rescored", "compacted"}
#: Fewest images of a run whose rates are used for the estimate.
_ENOUGH = 1_000
#: Images that are classified to measure the rate, and before that for warm-up.
_SAMPLE, _WARM_UP = 384, 64
#: Seconds that a command takes without images: start of Python, Ray, its workers and the engine, and publishing (measured on
#: 2 cores).
_START_SECONDS = 6.5
#: Images per second and CPU that are rescored from stored features (half of the measured rate, docs/benchmarks.md).
_RESCORED_PER_SECOND = 5_000
#: What is said where a base in int8 would be faster.
_IN_INT8 = "The model limited the newest run; with a base in int8 (train --quantize int8) it is about {:.1f} times as fast."


class Rates(NamedTuple):
    """The speed of a run: images per byte of shards, seconds of start-up, images per second; and the source of these rates."""

    images_per_byte: float
    start_seconds: float
    images_per_second: float
    known_from: str


def plan(config: RunConfig, watch: Watcher | None = None) -> dict[str, Any]:
    """Estimate what `classify` with this configuration would do.

    Args:
        config: the configuration of `classify`.
        watch: called now and then with the number of listed objects.

    Returns:
        `counts` of new, changed, retry, stale, deleted and unchanged objects; `objects` to process, `rescored` of them from
        stored features; `bytes` to read, as far as the listing has sizes; `images`, an estimate if there are shards;
        `seconds`, `cpu_hours`, `gpu_hours` and `images_per_second`; `known_from`, the source of the estimate; `output` and
        `list_seconds`; `inventory`, what is known of the inventory that was read in place of a listing, if one was; `advice`, a
        sentence, if a base in int8 would be faster.

    Raises:
        UsageError: the command could not run.
    """
    if config.other_bundles:
        raise ConfigError("plan: each bundle has a table of its own; give one bundle at a time.")
    bundle = load_bundle(config.bundle, config.storage_options)
    bundle.require_whole()
    table = OutputTable.of(config, bundle)
    state = read_output(table.output)
    listing = list_images(config, table.output, watch)
    whole = run_input(listing)
    # Without --incremental, everything is processed; the counts still show what an incremental run would process.
    increment = diff_with_store(table, whole, state)
    given = increment if config.incremental else whole
    cluster = _cluster(config)
    rows = numbered(given.manifest)
    matches = match_features(table, state, rows) if config.incremental and config.stale == "rescore" else []
    left = without_matches(rows, matches)
    rescored = rows.num_rows - left.num_rows
    result = {
        "output": table.output.url,
        "counts": increment.counts,
        "objects": rows.num_rows,
        "rescored": rescored,
        "bytes": pc.sum(left["size"].filter(pc.not_equal(left["format"], ARCHIVED))).as_py() or 0,
        "list_seconds": round(listing.seconds, 1),
    }
    if whole.inventory:
        result["inventory"] = whole.inventory
    if state.newest is not None and table.quantizable and (advice := _advice_on(state.newest)):
        result["advice"] = advice
    refused = None if config.allow_deletes or not config.incremental else too_many_deleted(increment, config.max_deleted_ratio)
    if refused is not None:
        result["refused"] = refused
    return {**result, **_costs(table, state, left, rescored, cluster)}


def _advice_on(run: Run) -> str | None:
    """How much faster int8 would be than a run that read images and waited for the model most; None for other runs."""
    report = read_report(run)
    found = report.get("bottleneck")
    if run.facts["spec"].keys() & _NOT_READ or found is None or found["stage"] != "predict":
        return None
    return _IN_INT8.format(gain_in_int8(report["stage_seconds"]))


def _costs(table: OutputTable, state: OutputState, left: pa.Table, rescored: int, cluster: ClusterResources) -> dict[str, Any]:
    """Time and machine hours of reading the objects in `left` and rescoring the others."""
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
    cpus, gpus = (sum(node.get(name, 0.0) for node in cluster.machines) for name in ("CPU", "GPU"))
    seconds = rescored / (_RESCORED_PER_SECOND * max(1.0, cpus))
    rates, images = Rates(0.0, _START_SECONDS, 0.0, "rates in docs/benchmarks.md"), 0
    if left.num_rows:
        work = int(work_of(left, config.rows_per_task).sum())
        plan = plan_for(config.model_copy(update={"num_gpus": config.num_gpus or 0.0}), work, cluster)
        rates = _from_last_run(table, state) or _calibrated(table, plan, left)
        images = _images(left, rates.images_per_byte)
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
    """The resources of each machine of the cluster. Without a cluster, Ray is not started."""
    if not (config.address or os.environ.get("RAY_ADDRESS")):
        return ClusterResources([{"CPU": float(os.cpu_count() or 1)}])
    with ray_session(config.address) as start:
        start()
        return read_cluster()


def _from_last_run(table: OutputTable, state: OutputState) -> Rates | None:
    """The rates of the newest published run, if it processed enough images with the same base and engine."""
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
        images_per_byte=report["listed"] / size if size else 0.0,
        start_seconds=report["seconds"] * (1 - busy),
        images_per_second=images / (report["seconds"] * busy),
        known_from=f"run {newest.run_id}",
    )


def _calibrated(table: OutputTable, plan: ExecutionPlan, left: pa.Table) -> Rates:
    """The rates of this machine on a sample of the images, times the number of actors on the cluster."""
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
    """Loose images at equal distances in the listing, or the smallest shard."""
    loose = left.filter(pc.equal(left["format"], IMAGE))
    if loose.num_rows:
        return loose.take(np.unique(np.linspace(0, loose.num_rows - 1, _SAMPLE + _WARM_UP).astype(np.int64)))
    return left.take(pc.sort_indices(pc.fill_null(left["size"], 0))[:1])


def _images(left: pa.Table, images_per_byte: float) -> int:
    """The estimated number of images."""
    shards = left.filter(pc.invert(is_loose(left)))
    size = pc.sum(shards["size"]).as_py() or 0
    return int(left.num_rows - shards.num_rows + max(shards.num_rows, round(size * images_per_byte)))
