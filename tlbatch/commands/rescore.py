"""Stored features + a bundle's head -> predictions: no image is read and no base is run.

The run lists exactly the objects of the runs with the features; an image that failed there fails here, with the same reason.
Manifest, receipts, resume and publishing are those of `classify`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from tlbatch.config import RescoreConfig, Resources
from tlbatch.errors import BundleError
from tlbatch.execution.executor import map_file_tasks
from tlbatch.execution.ray_errors import errors_say_how_to_continue
from tlbatch.execution.rescorer import RescoreJob, rescore_matches, sources_of
from tlbatch.execution.session import ray_session
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import choose
from tlbatch.output.commit import Promotion, RunInput, RunSpec, Target, WorkStats, run_to_continue, run_to_publication
from tlbatch.output.documents import ReportDocument
from tlbatch.output.features import FeatureTable, find_features
from tlbatch.output.lease import require_free
from tlbatch.output.progress import Watcher, heartbeat
from tlbatch.output.run import OutputState, Pointer, Run, new_run_id, read_output, require_output, require_unchanged
from tlbatch.storage.resolve import resolve


def rescore(config: RescoreConfig, watch: Watcher | None = None) -> ReportDocument:
    """Give every image of a run with features the predictions of another head, and publish them.

    Args:
        config: the features, the bundle, and where the predictions go.
        watch: called every few seconds with the numbers of `progress.json`.

    Returns:
        The run's report, as `classify` returns it.

    Raises:
        UsageError: the features have another base than the bundle, or something else does not fit; nothing was written.
        UnfinishedError: the run stopped and can be continued.
    """
    output = resolve(config.output, config.storage_options)
    state = read_output(output)
    source = find_features(config.features, config.storage_options)
    bundle = load_bundle(config.bundle, config.storage_options)
    if not bundle.labels:
        raise BundleError(f"The bundle {bundle.location.url} has no head; `tlbatch train --features` makes one.")
    source.require_base(bundle.base_digest, f"the bundle {bundle.location.url}")
    bundle.require_whole()
    require_output(state, source.newest.facts["spec"]["images"])
    require_free(output)
    with ray_session(config.address) as start_ray:
        began = time.monotonic()
        work = RescoreWork(config, source, state.pointer, bundle, start_ray, watch)
        current = run_to_continue(state, work.spec)
        run_id = current.run_id if current else (config.run_id or new_run_id())
        with errors_say_how_to_continue(run_id):
            spread = partial(map_file_tasks, start_ray, run_id, watch)
            (report,) = run_to_publication([Target(output, work.spec, work)], run_id, began=began, map_tasks=spread)
            return report


@dataclass(frozen=True)
class RescoreWork:
    """The work of `rescore`; `published` is the table of the output when the features were read."""

    config: RescoreConfig
    source: FeatureTable
    published: Pointer
    bundle: Bundle
    start_ray: Callable[[], None]
    watch: Watcher | None

    @property
    def engine(self) -> str:
        """What executes the head."""
        return choose(self.bundle, self.config.engine, gpu=False)

    @property
    def spec(self) -> RunSpec:
        """What the command wants; the fingerprint of the run with the features stands for its images and base."""
        newest = self.source.newest
        tables = {"predictions": True, "features": False, "top_k": self.config.top_k}
        resources = self.config.model_dump(mode="json", include=set(Resources.model_fields))
        images, rescored = newest.facts["spec"]["images"], self.source.fingerprint
        return RunSpec(
            spec={"images": images, "rescored": rescored, "engine": self.engine, **tables},
            bundle=self.bundle.digest,
            base=self.bundle.base_digest,
            predictions=True,
            features=None,
            facts={"resources": resources, "features_url": newest.location.url, **self.bundle.for_run},
            final=True,
        )

    def plan(self, state: OutputState) -> RunInput:
        """The objects of the runs with the features; raises if the table would lose what was published since they were read."""
        require_unchanged(self.published, state.pointer)
        return RunInput(self.source.manifest, self.source.newest.facts["skipped"], 0.0)

    def process(self, runs: Sequence[Run], rows: pa.Table) -> WorkStats:
        """Predict from the stored features of the rows."""
        self.start_ray()
        matches = self.source.matches()
        job = RescoreJob(
            bundle_url=self.bundle.pinned,
            storage_options=self.config.storage_options,
            sources=sources_of(matches),
            engine=self.engine,
            threads=int(self.config.num_cpus or 1),
            top_k=self.config.top_k,
        )
        with heartbeat(runs, self.watch) as staged:
            pool = rescore_matches(runs, matches, rows["row"].to_numpy(), job, self.config.concurrency, staged)
        blocks = pool.actors * pool.blocks_at_once
        return WorkStats({"fetch": blocks, "decode": blocks, "write": blocks, "predict": pool.actors})

    def promotion_check(self, *_: object) -> Promotion:
        """A rescored run is always published."""
        return Promotion()
