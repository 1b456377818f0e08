"""Stored features + a bundle's head -> predictions, on Ray Data: no image is read and no base is run.

The run promises what the run with the features promised, object for object; an image that failed there fails here, with its
reason. Manifest, receipts, resume and publishing are those of `classify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tlbatch import commit, ledger
from tlbatch.commit import Order, Promise
from tlbatch.config import RescoreConfig, Resources
from tlbatch.errors import BundleError
from tlbatch.execution import Pool, Watcher, continued_later, heartbeat, write_windows
from tlbatch.features import FeatureTable, find_features
from tlbatch.lease import require_free
from tlbatch.ledger import Published, Run
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import choose
from tlbatch.report.bottleneck import bottleneck
from tlbatch.rescorer import Job, sources_of, stage_held
from tlbatch.session import ray_session
from tlbatch.storage import resolve


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
    output = resolve(config.output, config.storage_options)
    published = ledger.read_latest(output)
    source = find_features(config.features, config.storage_options)
    bundle = load_bundle(config.bundle, config.storage_options)
    if not bundle.labels:
        raise BundleError(f"The bundle {bundle.place.url} has no head; `tlbatch train --features` makes one.")
    source.require_base(bundle.base_digest, f"the bundle {bundle.place.url}")
    bundle.require_whole()
    ledger.require_output(output, source.newest.facts["spec"]["images"])
    require_free(output)
    with ray_session(config.address) as start_ray:
        work = _Rescoring(config, source, published, bundle, watch, start_ray)
        order = work.order()
        current = commit.to_continue(output, order)
        work.run_id = current.run_id if current else (config.run_id or ledger.new_run_id())
        with continued_later(work.run_id):
            return commit.carry_out(output, order, work.run_id)


@dataclass
class _Rescoring:
    """What the steps of one command share."""

    config: RescoreConfig
    source: FeatureTable
    published: Published
    bundle: Bundle
    watch: Watcher | None
    start_ray: Callable[[], None]
    run_id: str = ""
    #: The actors at work; None until some are.
    pool: Pool | None = None

    @property
    def engine(self) -> str:
        """What computes the head."""
        return choose(self.bundle, self.config.engine, gpu=False)

    def promise(self, published: Published) -> Promise:
        """What the run with the features has promised; raises where a table would lose what was published since it was read."""
        ledger.require_unchanged(self.published, published)
        return Promise(self.source.manifest, self.source.newest.facts["skipped"], 0.0)

    def order(self) -> Order:
        """What the command asks for; the fingerprint of the run with the features stands for its images and base."""
        images, rescored = self.source.newest.facts["spec"]["images"], self.source.fingerprint
        tables = {"predictions": True, "features": False, "top_k": self.config.top_k}
        resources = self.config.model_dump(mode="json", include=set(Resources.model_fields))
        return Order(
            spec={"images": images, "rescored": rescored, "engine": self.engine, **tables},
            bundle=self.bundle.digest,
            base=self.bundle.base_digest,
            predictions=True,
            features=None,
            listing=self.promise,
            work=self.execute,
            facts={"resources": resources, "features_url": self.source.newest.place.url, **self.bundle.for_run},
            each=lambda function, windows: write_windows(self.start_ray, self.run_id, function, windows, self.watch),
            bottleneck=self.bottleneck,
            final=True,
        )

    def execute(self, runs: Sequence[Run], left: pa.Table) -> None:
        """Everything between manifest and receipts."""
        self.start_ray()
        held = self.source.held()
        with heartbeat(runs[0], self.watch):
            self.pool = stage_held(
                runs,
                held,
                left["row"].to_numpy(),
                Job(
                    bundle_url=self.bundle.pinned,
                    storage_options=self.config.storage_options,
                    sources=sources_of(held),
                    engine=self.engine,
                    threads=int(self.config.num_cpus or 1),
                    top_k=self.config.top_k,
                ),
                self.config.concurrency,
            )

    def bottleneck(self, stage_seconds: Mapping[str, float], seconds: float) -> dict[str, Any] | None:
        """What the command waited for, if it did anything."""
        if self.pool is None:
            return None
        blocks = self.pool.actors * self.pool.blocks_at_once
        lanes = {"fetch": blocks, "decode": blocks, "write": blocks, "predict": self.pool.actors}
        return bottleneck(stage_seconds, lanes, seconds, gpu=False)
