"""Stored features + a bundle's head -> predictions, on Ray Data: no image is read and no base is run.

The run promises what the run with the features promised, object for object; an image that failed there fails here, with its
reason. Manifest, receipts, resume and publishing are those of `classify`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import commit, ledger, schema
from tlbatch.blocks import Answers
from tlbatch.commit import Order
from tlbatch.config import RescoreConfig, Resources
from tlbatch.errors import BundleError, ErrorKind, Failure
from tlbatch.execution import BLOCKS_AT_ONCE, WRITE_CPUS, Pool, Watcher, continued_later, heartbeat, nodes, stage, write_windows
from tlbatch.features import FeatureRun, Found, Window, find_features, matrix, read_window, window_of
from tlbatch.lease import require_free
from tlbatch.ledger import Run
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import choose, load_head
from tlbatch.report.bottleneck import bottleneck
from tlbatch.session import ray_session
from tlbatch.storage import resolve


@dataclass(frozen=True)
class _Promised:
    """What the run with the features has promised, as a listing; nothing is listed."""

    manifest: pa.Table
    skipped: int
    seconds: float = 0.0


def run(config: RescoreConfig, watch: Watcher | None = None) -> dict[str, Any]:
    """Give every image of a run with features the predictions of another head, and publish them.

    Args:
        config: the features, the bundle, and where the predictions go.
        watch: called every few seconds with the numbers of `progress.json`.

    Returns:
        The run's report, as `pipeline.run` gives it.

    Raises:
        UsageError: the features are of another base than the bundle's, or something else cannot be; nothing was written.
        UnfinishedError: it stopped and can be continued.
    """
    source = find_features(config.features, config.storage_options)
    bundle = load_bundle(config.bundle, config.storage_options)
    if not bundle.labels:
        raise BundleError(f"The bundle {bundle.place.url} has no head; `tlbatch train --features` makes one.")
    source.require_base(bundle.base_digest, f"the bundle {bundle.place.url}")
    bundle.require_whole()
    output = resolve(config.output, config.storage_options)
    ledger.require_output(output, source.run.facts["spec"]["images"])
    require_free(output)
    with ray_session(config.address) as start_ray:
        work = _Rescoring(config, source, bundle, watch, start_ray)
        order = work.order()
        current = commit.to_continue(output, order)
        work.run_id = current.run_id if current else (config.run_id or ledger.new_run_id())
        with continued_later(work.run_id):
            return commit.carry_out(output, order, work.run_id)


@dataclass
class _Rescoring:
    """What the steps of one command share."""

    config: RescoreConfig
    source: FeatureRun
    bundle: Bundle
    watch: Watcher | None
    start_ray: Callable[[], None]
    run_id: str = ""
    #: How many actors are at work; 0 until some are.
    actors: int = 0

    @property
    def engine(self) -> str:
        """What computes the head."""
        return choose(self.bundle, self.config.engine, gpu=False)

    def order(self) -> Order:
        """What the command asks for; the fingerprint of the run with the features stands for its images and base."""
        images, rescored = self.source.run.facts["spec"]["images"], self.source.run.fingerprint
        tables = {"predictions": True, "features": False, "top_k": self.config.top_k}
        resources = self.config.model_dump(mode="json", include=set(Resources.model_fields))
        return Order(
            spec={"images": images, "rescored": rescored, "engine": self.engine, **tables},
            bundle=self.bundle.digest,
            base=self.bundle.base_digest,
            predictions=True,
            features=None,
            listing=lambda _published: _Promised(self.source.run.manifest, self.source.run.facts["skipped"]),
            work=self.execute,
            facts={"resources": resources, "features_url": self.source.run.place.url, **self.bundle.for_run},
            each=lambda function, windows: write_windows(self.start_ray, self.run_id, function, windows),
            bottleneck=self.bottleneck,
            final=True,
        )

    def execute(self, runs: Sequence[Run], left: pa.Table) -> None:
        """Everything between manifest and receipts: one block for all rows that stand in the same files."""
        self.start_ray()
        rows = left["row"].to_numpy()
        windows = [w for w in self.source.windows() if np.searchsorted(rows, w.start) < np.searchsorted(rows, w.end)]
        promised = commit.numbered(runs[0])
        blocks = [promised.slice(window.start, window.end - window.start) for window in windows]
        cpus = int(self.config.num_cpus or 1)
        most = max(1, sum(int(node.get("CPU", 0)) // cpus for node in nodes()))
        self.actors = min(len(blocks), self.config.concurrency or most, most)
        job = Job(
            bundle_url=self.bundle.place.url,
            run_url=self.source.run.place.url,
            storage_options=self.config.storage_options,
            windows=tuple(windows),
            engine=self.engine,
            threads=cpus,
            top_k=self.config.top_k,
        )
        with heartbeat(runs[0], self.watch):
            stage(runs, blocks, [(Rescorer, Pool(cpus - WRITE_CPUS, 0, self.actors, self.actors))], job)

    def bottleneck(self, stage_seconds: Mapping[str, float], seconds: float) -> dict[str, Any] | None:
        """What the command waited for, if it did anything."""
        if not self.actors:
            return None
        lanes = dict.fromkeys(("fetch", "decode", "write"), self.actors * BLOCKS_AT_ONCE) | {"predict": self.actors}
        return bottleneck(stage_seconds, lanes, seconds, gpu=False)


@dataclass(frozen=True)
class Job:
    """What a `Rescorer` must know. It travels with every task, so there is no credential in it."""

    bundle_url: str
    run_url: str
    storage_options: Mapping[str, Any]
    windows: tuple[Window, ...]
    engine: str
    threads: int
    top_k: int


class Rescorer:
    """The actor: rows of the manifest -> outcome rows, out of the files that hold their features."""

    def __init__(self, job: Job, *, after_a_death: bool = False) -> None:  # noqa: ARG002 - Ray's signature
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._head = load_head(bundle, job.engine, threads=job.threads)
        self._answers = Answers(bundle.labels, job.top_k, bundle.abstain_threshold, bundle.label_thresholds)
        self._run = resolve(job.run_url, job.storage_options)
        self._windows = job.windows
        self._lock = threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """One window's predictions."""
        began = time.perf_counter()
        window = window_of(self._windows, block["row"][0].as_py())
        found = read_window(self._run, window, block)
        read = time.perf_counter() - began
        values = matrix(found.good["features"])
        with self._lock:  # Ray hands a second block to this actor while the first is at work
            began = time.perf_counter()
            scores = self._head.predict(values)
        seconds = {"fetch": read, "decode": 0.0, "predict": time.perf_counter() - began}
        return _outcomes(found, values, scores, self._answers, seconds)


def _outcomes(found: Found, values: np.ndarray, scores: np.ndarray, answers: Answers, seconds: Mapping[str, float]) -> pa.Table:
    """The rows that the writer stages: predictions of good images, and failures as they were."""
    wanted = schema.outcome_schema(classified=True, features_length=None, features_dtype="float32")
    finite = np.isfinite(values).all(axis=1) & np.isfinite(scores).all(axis=1)
    fine = pa.array(finite)
    good = found.good.drop_columns(["features"])
    known = {name: good[name].filter(fine) for name in good.column_names}
    failure = Failure("predict", ErrorKind.PREDICT_FAILED, "the features, or the scores made of them, are not finite")
    wrong = good.filter(pc.invert(fine))
    said = {"stage": failure.stage, "kind": str(failure.kind), "message": failure.message, "attempts": 1, "transient": False}
    tables = [
        {**known, **answers.columns(scores[finite])},
        {name: wrong[name] for name in wrong.column_names}
        | {name: pa.array([value] * len(wrong)) for name, value in said.items()},
        {name: found.bad[name] for name in found.bad.column_names},
    ]
    rows = len(found.good) + len(found.bad)
    each = {f"{stage_}_seconds": seconds[stage_] / max(1, rows) for stage_ in schema.TIMINGS}
    return pa.concat_tables([_shaped(columns, each, wanted) for columns in tables])


def _shaped(columns: Mapping[str, Any], each: Mapping[str, float], wanted: pa.Schema) -> pa.Table:
    """Columns as a table of a schema; `each` has the same value in every row, and what is missing is null."""
    rows = len(columns["row"])
    arrays = []
    for field in wanted:
        if field.name in each:
            arrays.append(pa.array(np.full(rows, each[field.name]), field.type))
        elif field.name in columns:
            arrays.append(columns[field.name].cast(field.type))
        else:
            arrays.append(pa.nulls(rows, field.type))
    return pa.Table.from_arrays(arrays, schema=wanted)
