"""Manifest rows -> staged parts: cut the rows into blocks, choose the actors, and run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.config import RunConfig
from tlbatch.execution.executor import run_actors
from tlbatch.execution.records import ClassifyJob
from tlbatch.execution.resources import read_cluster
from tlbatch.execution.sizing import ExecutionPlan, cut_blocks, parallelism_of, plan_for, work_of
from tlbatch.output.commit import WorkStats
from tlbatch.output.progress import Staged
from tlbatch.output.run import Run


def classify_rows(
    config: RunConfig,
    engine: str,
    bundle_urls: Sequence[str],
    runs: Sequence[Run],
    rows: pa.Table,
    probes: tuple[str, ...],
    staged: Staged,
) -> WorkStats:
    """Classify the objects of manifest rows, and stage the outcomes as parts of the runs.

    Args:
        config: limits, resources and what is wanted of each image.
        engine: what executes the model.
        bundle_urls: for each run the pinned address of its bundle; all have the same base.
        runs: the runs that get the parts.
        rows: of their manifest, each with its number in a column `row`.
        probes: uris of some objects of the whole store.
        staged: called with the receipts of each part.

    Returns:
        How much of each stage could run at once; the caller adds what it knows of the listing.
    """
    work = work_of(rows, config.rows_per_task)
    plan = plan_for(config, int(work.sum()), read_cluster())
    quarantine = runs[0].location.join(schema.STAGED, schema.SUSPECTS)
    quarantine.delete()  # the marks of an earlier command, whose workers are gone
    job = replace(
        job_of(config, bundle_urls[0], engine, plan, rows),
        head_urls=tuple(bundle_urls[1:]),
        features_dtype=config.features_dtype if runs[0].facts["spec"]["features"] else None,
        quarantine_url=quarantine.url,
        probes=probes,
    )
    run_actors(runs, cut_blocks(rows, work, plan.rows_per_task), plan.pools, job, staged)
    return WorkStats(parallelism_of(job, plan, rows), bool(config.num_gpus))


def job_of(config: RunConfig, bundle_url: str, engine: str, plan: ExecutionPlan, rows: pa.Table) -> ClassifyJob:
    """What actors must know to classify `rows` with one bundle, without a quarantine."""
    return ClassifyJob(
        bundle_url=bundle_url,
        head_urls=(),
        storage_options=config.storage_options,
        engine=engine,
        decode_threads=plan.decode_threads,
        predict_threads=plan.predict_threads,
        gpu=bool(config.num_gpus),
        batch_size=config.batch_size,
        remote=bool(pc.any(pc.match_substring(rows["uri"], "://")).as_py()),
        image_field=config.image_field,
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
        max_side=config.max_side,
        top_k=config.top_k,
        predictions=config.predictions,
        features_dtype=config.features_dtype if config.features else None,
        quarantine_url="",
        exclude=tuple(config.exclude),
    )
