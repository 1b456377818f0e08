"""Joins the stages on Ray Data, the only place where they meet: a configuration -> a published run.

listing -> manifest -> worker (reader -> decode -> model) -> writer -> ledger -> publish

What is written in which order is `commit.py`'s, how blocks get to workers `execution.py`'s; here is who does what.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from tlbatch import commit, ledger, schema
from tlbatch.commit import Gate, Order
from tlbatch.config import RunConfig, TrainConfig
from tlbatch.errors import BundleError, InterruptedRunError
from tlbatch.execution import Watcher, continued_later, heartbeat, nodes, stage, write_windows
from tlbatch.lease import require_free
from tlbatch.ledger import Published, Run
from tlbatch.listing import Listing, Selection, list_store
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import choose, gpus_of_this_process
from tlbatch.plan import Plan, blocks_of, lanes_of, plan_for, weights_of
from tlbatch.report.bottleneck import bottleneck
from tlbatch.report.compare import judge, parse_conditions
from tlbatch.session import gpus_that_work, ray_session
from tlbatch.storage import Place, require_folder, resolve
from tlbatch.worker import Job

log = logging.getLogger(__name__)

_LISTING_SECONDS = 10.0


@dataclass(frozen=True)
class _Table:
    """One table that a pass fills: its bundle's predictions, in its output."""

    config: RunConfig
    bundle: Bundle
    output: Place


@dataclass
class _Pass:
    """One pass over a store, and what the tables that it fills share. `listing` is given where the caller chose the images."""

    tables: list[_Table]
    #: The folder that is written to.
    root: Place
    watch: Watcher | None
    listing: Listing | None
    run_id: str = ""
    #: What each output had published when the store was listed.
    published: dict[str, Published] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    start_ray: Callable[[], None] = lambda: None
    #: How much of each stage can be under way at once; None until something is.
    lanes: Mapping[str, int] | None = None

    @property
    def config(self) -> RunConfig:
        """Of the first table; the others differ in bundle and output alone."""
        return self.tables[0].config

    @property
    def engine(self) -> str:
        """The engine that `auto` stands for; another one would give other last digits."""
        return choose(self.tables[0].bundle, self.config.engine, gpu=bool(self.config.num_gpus))

    def list(self, output: Place, published: Published) -> Listing:
        """What the store holds: listed once a command, and once more if another run published something meanwhile."""
        if self.listing is None or self.published[output.url] != published:
            self.listing = list_images(self.config, self.root, self.stop)
            self.published[output.url] = published
        return self.listing

    def bottleneck(self, stage_seconds: Mapping[str, float], seconds: float) -> dict[str, Any] | None:
        """What the command waited for, if it classified anything."""
        if self.lanes is None:
            return None
        listed = self.listing.seconds if self.listing else 0.0
        return bottleneck({"list": listed, **stage_seconds}, self.lanes, seconds, gpu=bool(self.config.num_gpus))


def _order(work: _Pass, table: _Table) -> Order:
    """What the command asks for: the store's full address; the bundle's digest, which stands for its place."""
    config, bundle = table.config, table.bundle
    spec = config.spec.model_dump(mode="json", exclude={"bundle"})
    return Order(
        spec={**spec, "images": resolve(config.images).url, "engine": work.engine, "gpu": bool(config.num_gpus)},
        bundle=bundle.digest,
        base=bundle.base_digest,
        predictions=config.predictions,
        features=schema.features_schema(bundle.features_length, config.features_dtype) if config.features else None,
        listing=partial(work.list, table.output),
        work=partial(_execute, work),
        facts=_facts(config, bundle),
        each=lambda function, windows: write_windows(work.start_ray, work.run_id, function, windows),
        bottleneck=work.bottleneck,
        gate=_gate(table),
    )


def _gate(table: _Table) -> Gate | None:
    """What `promote_if` says, as a question to a complete run."""
    if table.config.promote_if is None:
        return None
    conditions = parse_conditions(table.config.promote_if)
    return lambda run: judge(table.output, run, conditions)


def _facts(config: RunConfig, bundle: Bundle) -> dict[str, Any]:
    """What `run.json` says beyond the spec."""
    return {
        "resources": config.resources.model_dump(mode="json"),
        **bundle.for_run,
        "versions": {name: version(name) for name in ("keras", "openvino", "ray", "tensorflow", "tlbatch")},
    }


def list_images(config: RunConfig | TrainConfig, avoid: Place, stop: threading.Event | None = None) -> Listing:
    """What the store of a configuration holds, without what lies in `avoid`, the folder that is written to.

    A listing in another thread ends when `stop` is set.
    """
    store = resolve(config.images, config.storage_options)
    selection = Selection(config.include, config.exclude, config.format)
    watch = _ListingWatch(store.url, stop or threading.Event())
    return list_store(store, selection, avoid=avoid, max_images=config.max_images, progress=watch)


class _ListingWatch:
    """Says every few seconds how far a long listing is, and ends it when it is to stop."""

    def __init__(self, url: str, stop: threading.Event) -> None:
        self._url = url
        self._stop = stop
        self._began = self._said = time.monotonic()

    def __call__(self, objects: int) -> None:
        if self._stop.is_set():
            raise InterruptedRunError("The listing was stopped.")
        now = time.monotonic()
        if now - self._said >= _LISTING_SECONDS:
            self._said = now
            log.warning("listing %s: %s objects, %.0f a second", self._url, f"{objects:,}", objects / (now - self._began))


def run(config: RunConfig, watch: Watcher | None = None, listing: Listing | None = None) -> dict[str, Any]:
    """Classify every image of a store, or only extract its features, and publish the result.

    An unfinished run of the same spec in the output is continued; a finished one over the same images is left as it is.
    Several bundles of one base share the pass; each table is published by itself, in a folder of the bundle's name.

    Args:
        config: what to do.
        watch: called every few seconds with the numbers of `progress.json`.
        listing: the images, where not all of the store are wanted.

    Returns:
        The run's report: what `report.json` holds. With several bundles it is the first one's, and `tables` has each by its
        name.

    Raises:
        UsageError: something asked for cannot be; nothing was written.
        UnfinishedError: it stopped and can be continued.
        BooksError: the images do not add up; nothing was published.
    """
    if config.promote_if is not None:
        parse_conditions(config.promote_if)  # before any work
    bundles = [load_bundle(one.bundle, config.storage_options) for one in config.tables.values()]
    _require_fit(config, bundles)
    with ray_session(config.address) as start_ray:
        if config.num_gpus is None:
            auto = config.engine != "openvino" and gpus_that_work(start_ray, config.address, gpus_of_this_process)
            config = config.model_copy(update={"num_gpus": float(auto)})
        tables = [
            _Table(one, bundle, resolve(one.output, config.storage_options))
            for one, bundle in zip(config.tables.values(), bundles, strict=True)
        ]
        published = {table.output.url: ledger.read_latest(table.output) for table in tables}
        root = resolve(config.output, config.storage_options)
        reports = _run(_Pass(tables, root, watch, listing, published=published, start_ray=start_ray))
    if len(reports) == 1:
        return reports[0]
    return {**reports[0], "output": root.url, "tables": dict(zip(config.tables, reports, strict=True))}


def _require_fit(config: RunConfig, bundles: Sequence[Bundle]) -> None:
    """Raises BundleError where a bundle is not whole, has no head, or has another base than the first."""
    for bundle in bundles:
        if config.predictions and not bundle.labels:
            raise BundleError(f"The bundle {bundle.place.url} has no head; use `tlbatch extract` with it, or train one.")
        if bundle.base_digest != bundles[0].base_digest:
            raise BundleError(
                f"The bundles {bundles[0].place.url} and {bundle.place.url} have different bases "
                f"({bundles[0].base_digest} and {bundle.base_digest}), so they cannot share a pass."
            )
        bundle.require_whole()


def _run(work: _Pass) -> list[dict[str, Any]]:
    orders = [_order(work, table) for table in work.tables]
    currents = []
    for table, order in zip(work.tables, orders, strict=True):
        ledger.require_output(table.output, order.spec["images"])
        require_free(table.output)
        currents.append(commit.to_continue(table.output, order))
    begun = [current.run_id for current in currents if current is not None]
    all_begun = len(begun) == len(currents)
    # A run that is begun beside one that is continued has a name of its own: its output may have a run of the other's name.
    work.run_id = begun[0] if all_begun else (work.config.run_id or ledger.new_run_id())
    with continued_later(work.run_id):
        if not all_begun:
            _list(work)
        asked = list(zip([table.output for table in work.tables], orders, strict=True))
        return commit.carry_out_together(asked, work.run_id)


def _list(work: _Pass) -> None:
    """List the store before anything is written: one that cannot be listed leaves nothing behind.

    Ray starts meanwhile, in this thread, which it needs; but not where a table is published and there may be nothing to do.
    """
    first = work.tables[0].output
    if work.published[first.url]:
        work.list(first, work.published[first.url])
        return
    require_folder(resolve(work.config.images, work.config.storage_options))
    with ThreadPoolExecutor(1, thread_name_prefix="tlbatch-listing") as beside:
        listing = beside.submit(work.list, first, work.published[first.url])
        try:
            work.start_ray()
            listing.result()
        except BaseException:
            work.stop.set()  # Ctrl-C does not wait for a long listing
            raise


def _execute(work: _Pass, runs: Sequence[Run], left: pa.Table) -> None:
    """Everything between manifest and receipts, on Ray Data; `runs` are those of the tables that lack something."""
    config = work.config
    work.start_ray()
    with heartbeat(runs[0], work.watch):
        weights = weights_of(left, config.rows_per_task)
        plan = plan_for(config, int(weights.sum()), nodes())
        job = _job(work, runs, plan, left["uri"][0].as_py())
        work.lanes = lanes_of(job, plan, left)
        _suspects(runs[0]).delete()  # those of an earlier command died with it, whatever they were alone with
        stage(runs, blocks_of(left, weights, plan.rows_per_task), plan.pools, job)


def _job(work: _Pass, runs: Sequence[Run], plan: Plan, left_uri: str) -> Job:
    config = work.config
    of_output = {table.output.url: table.bundle.place.url for table in work.tables}
    urls = [of_output[run.place.url.removesuffix(f"/{schema.RUNS}/{run.run_id}")] for run in runs]
    return Job(
        bundle_url=urls[0],
        head_urls=tuple(urls[1:]),
        storage_options=config.storage_options,
        engine=work.engine,
        decode_threads=plan.decode_threads,
        predict_threads=plan.predict_threads,
        gpu=bool(config.num_gpus),
        batch_size=config.batch_size,
        remote="://" in left_uri,
        image_field=config.image_field,
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
        top_k=config.top_k,
        predictions=config.predictions,
        features_dtype=config.features_dtype if runs[0].facts["spec"]["features"] else None,
        suspects_url=_suspects(runs[0]).url,
    )


def _suspects(run: Run) -> Place:
    return run.place.join(schema.STAGED, schema.SUSPECTS)
