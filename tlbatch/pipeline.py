"""Joins the stages on Ray Data, the only place where they meet: a configuration -> a published run.

listing -> manifest -> worker (reader -> decode -> model) -> writer -> ledger -> publish

What is written in which order is `commit.py`'s, how blocks get to workers `execution.py`'s; here is who does what.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from tlbatch import commit, ledger, rescorer, schema
from tlbatch.commit import Gate, Order, Promise
from tlbatch.config import RunConfig, Spec, TrainConfig
from tlbatch.errors import BundleError, InterruptedRunError, OutputError
from tlbatch.execution import Watcher, cluster, continued_later, heartbeat, stage, write_windows
from tlbatch.features import Held, holding, runs_with_features
from tlbatch.incremental import Origin, increment
from tlbatch.lease import require_free
from tlbatch.ledger import Published, Run
from tlbatch.listing import Listing, Selection, list_store
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import choose, gpus_of_this_process
from tlbatch.report.bottleneck import bottleneck
from tlbatch.report.compare import judge, parse_conditions
from tlbatch.session import gpus_that_work, ray_session
from tlbatch.sizing import Plan, blocks_of, lanes_of, plan_for, weights_of
from tlbatch.storage import Place, require_folder, resolve
from tlbatch.worker import Job

_LISTING_SECONDS = 0.5


@dataclass(frozen=True)
class Table:
    """One table that a pass fills: its bundle's predictions, in its output."""

    config: RunConfig
    bundle: Bundle
    output: Place


@dataclass
class _Pass:
    """One pass over a store, and what the tables that it fills share. `listing` is given where the caller chose the images."""

    tables: list[Table]
    #: The folder that is written to.
    root: Place
    watch: Watcher | None
    listing: Listing | None
    run_id: str = ""
    #: What each output had published when the store was listed.
    published: dict[str, Published] = field(default_factory=dict)
    #: What is to be done for each output, once that is known.
    promises: dict[str, Promise] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    start_ray: Callable[[], None] = lambda: None
    #: Whether a run was found that an earlier command had begun.
    continued: bool = False
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

    def promise(self, table: Table, published: Published) -> Promise:
        """What of the store is to be done for a table: listed once a command, and again if somebody published meanwhile."""
        url = table.output.url
        if self.listing is None or self.published[url] != published:
            self.listing = list_images(self.config, self.root, self.watch, self.stop)
            self.published[url] = published
            self.promises.pop(url, None)
        if url not in self.promises:
            whole = Promise(self.listing.manifest, self.listing.skipped, self.listing.seconds)
            self.promises[url] = increment_of(table, whole, published) if self.config.incremental else whole
        return self.promises[url]

    def bottleneck(self, stage_seconds: Mapping[str, float], seconds: float) -> dict[str, Any] | None:
        """What the command waited for, if it classified anything."""
        if self.lanes is None:
            return None
        listed = self.listing.seconds if self.listing else 0.0
        return bottleneck({"list": listed, **stage_seconds}, self.lanes, seconds, gpu=bool(self.config.num_gpus))


def _order(work: _Pass, table: Table) -> Order:
    """What the command asks for: the store's full address; the bundle's digest, which stands for its place."""
    config, bundle = table.config, table.bundle
    spec = config.spec.model_dump(mode="json", exclude={"bundle"})
    if spec["max_side"] == Spec.model_fields["max_side"].default:
        del spec["max_side"]  # runs that began before there was this limit can be continued
    return Order(
        spec={**spec, "images": resolve(config.images).url, "engine": work.engine, "gpu": bool(config.num_gpus)},
        bundle=bundle.digest,
        base=bundle.base_digest,
        predictions=config.predictions,
        features=schema.features_schema(bundle.features_length, config.features_dtype) if config.features else None,
        listing=partial(work.promise, table),
        work=partial(_execute, work),
        facts=_facts(config, bundle),
        each=lambda function, windows: write_windows(work.start_ray, work.run_id, function, windows, work.watch),
        bottleneck=work.bottleneck,
        incremental=config.incremental,
        gate=_gate(table),
    )


def increment_of(table: Table, whole: Promise, published: Published) -> Promise:
    """What a night has to do. Features are stale with their base, whatever head the bundle has."""
    config, bundle = table.config, table.bundle
    name, digest = ("bundle", bundle.digest) if config.predictions else ("base", bundle.base_digest)
    origin = Origin(name, digest, config.predictions, config.features_dtype if config.features else None)
    runs = ledger.read_published(table.output, published)
    if not config.predictions and any(run.facts["spec"].get("predictions") for run in runs):
        raise OutputError(f"The table at {table.output.url} has predictions; extract features into an output of their own.")
    return increment(whole, published, runs, origin, table.config.stale)


def _gate(table: Table) -> Gate | None:
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


def list_images(
    config: RunConfig | TrainConfig, avoid: Place, watch: Watcher | None = None, stop: threading.Event | None = None
) -> Listing:
    """What the store of a configuration holds, without what lies in `avoid`, the folder that is written to.

    A listing in another thread ends when `stop` is set.
    """
    store = resolve(config.images, config.storage_options)
    selection = Selection(config.include, config.exclude, config.format)
    progress = _ListingWatch(watch, stop or threading.Event())
    return list_store(store, selection, avoid=avoid, max_images=config.max_images, progress=progress)


class _ListingWatch:
    """Says how far a long listing is, and ends it when it is to stop."""

    def __init__(self, watch: Watcher | None, stop: threading.Event) -> None:
        self._watch = watch
        self._stop = stop
        self._began = self._said = time.monotonic()

    def __call__(self, objects: int) -> None:
        if self._stop.is_set():
            raise InterruptedRunError("The listing was stopped.")
        now = time.monotonic()
        if self._watch is not None and now - self._said >= _LISTING_SECONDS:
            self._said = now
            self._watch({"stage": "list", "objects": objects, "seconds": now - self._began})


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
            Table(one, bundle, resolve(one.output, config.storage_options))
            for one, bundle in zip(config.tables.values(), bundles, strict=True)
        ]
        root = resolve(config.output, config.storage_options)
        work = _Pass(tables, root, watch, listing, start_ray=start_ray)
        reports = _run(work)
        if config.incremental and work.continued:
            # What it promised was listed by the command that began it, and the store has gone on since.
            more = _run(_Pass(tables, root, watch, None, ledger.new_run_id(), start_ray=start_ray))
            reports = [_together(*pair) for pair in zip(reports, more, strict=True)]
    if len(reports) == 1:
        return reports[0]
    return {**reports[0], "output": root.url, "tables": dict(zip(config.tables, reports, strict=True))}


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The report of a command that finished one run and did another: the counts are of both."""
    if second.get("already_done"):
        return first
    sums = {name: first[name] + second[name] for name in ("objects", "listed", "predicted", "failed", "failed_transient")}
    kinds = dict(Counter(first["failed_by_kind"]) + Counter(second["failed_by_kind"]))
    return {**second, **sums, "failed_by_kind": kinds, "continued": first["run_id"]}


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
    work.published = {table.output.url: ledger.read_latest(table.output) for table in work.tables}
    orders = [_order(work, table) for table in work.tables]
    currents = []
    for table, order in zip(work.tables, orders, strict=True):
        ledger.require_output(table.output, order.spec["images"])
        require_free(table.output)
        currents.append(commit.to_continue(table.output, order))
    begun = [current.run_id for current in currents if current is not None]
    work.continued = bool(begun)
    all_begun = len(begun) == len(currents)
    # A run that is begun beside one that is continued has a name of its own: its output may have a run of the other's name.
    work.run_id = begun[0] if all_begun else (work.run_id or work.config.run_id or ledger.new_run_id())
    with continued_later(work.run_id):
        if not all_begun:
            _list(work)
        asked = list(zip([table.output for table in work.tables], orders, strict=True))
        return commit.carry_out_together(asked, work.run_id)


def _list(work: _Pass) -> None:
    """List the store before anything is written: one that cannot be listed leaves nothing behind.

    Ray starts meanwhile, in this thread, which it needs; but not where a table is published and there may be nothing to do.
    """
    first = work.tables[0]
    published = work.published[first.output.url]
    if published:
        work.promise(first, published)
        return
    require_folder(resolve(work.config.images, work.config.storage_options))
    with ThreadPoolExecutor(1, thread_name_prefix="tlbatch-listing") as beside:
        listing = beside.submit(work.promise, first, published)
        try:
            work.start_ray()
            listing.result()
        except BaseException:
            work.stop.set()  # Ctrl-C does not wait for a long listing
            raise


def _execute(work: _Pass, runs: Sequence[Run], left: pa.Table) -> None:
    """Everything between manifest and receipts, on Ray Data; `runs` are those of the tables that lack something."""
    work.start_ray()
    with heartbeat(runs[0], work.watch):
        if work.config.incremental and work.config.stale == "rescore":
            left = _rescore(work, runs, left)
        if left.num_rows:
            _classify(work, runs, left)


def _classify(work: _Pass, runs: Sequence[Run], left: pa.Table) -> None:
    """Read and predict images."""
    config = work.config
    weights = weights_of(left, config.rows_per_task)
    plan = plan_for(config, int(weights.sum()), cluster())
    job = _job(work, runs, plan, left)
    work.lanes = lanes_of(job, plan, left)
    _suspects(runs[0]).delete()  # those of an earlier command died with it, whatever they were alone with
    stage(runs, blocks_of(left, weights, plan.rows_per_task), plan.pools, job)


def _rescore(work: _Pass, runs: Sequence[Run], left: pa.Table) -> pa.Table:
    """Predict from stored features what has some; returns what has none."""
    config, table = work.config, work.tables[0]
    held = held_features(table, left)
    if held:
        job = rescorer.Job(
            bundle_url=table.bundle.pinned,
            storage_options=config.storage_options,
            sources=rescorer.sources_of(held),
            engine=work.engine,
            threads=int(config.num_cpus or 1),
            top_k=config.top_k,
            features_dtype=config.features_dtype if config.features else None,
        )
        rescorer.stage_held(runs, held, left["row"].to_numpy(), job, config.concurrency)
    return without(left, held)


def held_features(table: Table, left: pa.Table) -> list[Held]:
    """Where features of the table's base are stored for rows of a manifest, in the very version that is promised."""
    config = table.config
    wanted = config.features_dtype if config.features else None
    sources = [
        one
        for one in runs_with_features(table.output)
        if one.base == table.bundle.base_digest and (wanted is None or one.run.facts["spec"].get("features_dtype") == wanted)
    ]
    return holding(sources, left)


def without(left: pa.Table, held: Sequence[Held]) -> pa.Table:
    """The rows of a manifest whose features nobody holds."""
    done = np.concatenate([np.array([-1]), *(one.target for one in held)])
    return left.filter(pa.array(~np.isin(left["row"].to_numpy(), done)))


def _job(work: _Pass, runs: Sequence[Run], plan: Plan, left: pa.Table) -> Job:
    of_output = {table.output.url: table.bundle.pinned for table in work.tables}
    urls = [of_output[run.place.url.removesuffix(f"/{schema.RUNS}/{run.run_id}")] for run in runs]
    job = job_of(work.config, urls[0], work.engine, plan, left)
    features_dtype = work.config.features_dtype if runs[0].facts["spec"]["features"] else None
    return replace(job, head_urls=tuple(urls[1:]), features_dtype=features_dtype, suspects_url=_suspects(runs[0]).url)


def job_of(config: RunConfig, bundle_url: str, engine: str, plan: Plan, left: pa.Table) -> Job:
    """What actors must know to classify the rows `left`; no image of theirs is suspected of anything."""
    return Job(
        bundle_url=bundle_url,
        head_urls=(),
        storage_options=config.storage_options,
        engine=engine,
        decode_threads=plan.decode_threads,
        predict_threads=plan.predict_threads,
        gpu=bool(config.num_gpus),
        batch_size=config.batch_size,
        remote="://" in left["uri"][0].as_py(),
        image_field=config.image_field,
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
        max_side=config.max_side,
        top_k=config.top_k,
        predictions=config.predictions,
        features_dtype=config.features_dtype if config.features else None,
        suspects_url="",
    )


def _suspects(run: Run) -> Place:
    return run.place.join(schema.STAGED, schema.SUSPECTS)
