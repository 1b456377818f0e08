"""A configuration -> a published run: `tlbatch classify`, and the run that `extract` and `train` build on.

listing -> manifest -> actors (reader -> decode -> model) -> parts and receipts -> publish

`output/commit.py` has the order of every write; `execution/executor.py` brings blocks to actors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.commands.list_images import ListedStore, run_input, store_of
from tlbatch.config import RunConfig, Spec
from tlbatch.errors import BundleError, ConfigError, ManyDeletedError, OutputError
from tlbatch.execution.classify_rows import classify_rows
from tlbatch.execution.executor import map_file_tasks
from tlbatch.execution.ray_errors import errors_say_how_to_continue
from tlbatch.execution.rescorer import RescoreJob, rescore_matches, sources_of
from tlbatch.execution.resources import find_engine_on_gpus, unseen_gpus
from tlbatch.execution.session import ray_session
from tlbatch.images.inventory import Inventory
from tlbatch.images.listing import Listing
from tlbatch.images.reader import choose_probes
from tlbatch.model.bundle import ONNX, Bundle, installed_versions, load_bundle
from tlbatch.model.engines import choose, engine_on_gpu
from tlbatch.output.commit import Promotion, RunInput, RunSpec, Target, WorkStats, run_to_continue, run_to_publication
from tlbatch.output.diff import StalenessRule, diff_with_table, too_many_deleted, with_left
from tlbatch.output.documents import ReportDocument
from tlbatch.output.features import FeatureMatch, match_stored_features, runs_with_features
from tlbatch.output.lease import require_free
from tlbatch.output.progress import Staged, Watcher, heartbeat
from tlbatch.output.run import OutputState, Run, new_run_id, read_output, require_output
from tlbatch.report.promotion import check_promotion, parse_conditions
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import require_folder, resolve
from tlbatch.storage.room import require_room_to_do

#: Packages whose versions decide which images can be read.
_READERS = ("tlbatch", "pillow-heif")


@dataclass(frozen=True)
class OutputTable:
    """One table that a pass over the store fills.

    Attributes:
        config: its configuration.
        bundle: the bundle that predicts.
        output: where it is published.
        engine: the engine that `auto` stands for; another engine would give other last digits.
        spec: what the command wants in the output.
    """

    config: RunConfig
    bundle: Bundle
    output: Location
    engine: str
    spec: RunSpec

    @property
    def quantizable(self) -> bool:
        """Whether the model runs on CPUs in float32, and could run in int8."""
        return self.engine == "openvino" and self.bundle.quantizable

    @classmethod
    def of(cls, config: RunConfig, bundle: Bundle) -> Self:
        """The table of a configuration. Its spec has the store's full address; the bundle's digest stands for its location."""
        engine = choose(bundle, config.engine, gpu=bool(config.num_gpus))
        spec = config.spec.model_dump(mode="json", exclude={"bundle"})
        if spec["max_side"] == Spec.model_fields["max_side"].default:
            del spec["max_side"]  # runs that began before this limit existed can be continued
        wanted = RunSpec(
            spec={**spec, "images": store_of(config).url, "engine": engine, "gpu": bool(config.num_gpus)},
            bundle=bundle.digest,
            base=bundle.base_digest,
            predictions=config.predictions,
            features=schema.features_schema(bundle.features_length, config.features_dtype) if config.features else None,
            facts={
                "resources": config.resources.model_dump(mode="json"),
                **bundle.for_run,
                "versions": installed_versions("jax", "keras", "openvino", "ray", "tensorflow", *_READERS),
            },
            incremental=config.incremental,
        )
        return cls(config, bundle, resolve(config.output, config.storage_options), engine, wanted)


@dataclass(frozen=True)
class ClassifyWork:
    """The work for one table of a pass; `tables` are all tables that share the pass, this one among them."""

    table: OutputTable
    tables: Sequence[OutputTable]
    store: ListedStore
    start_ray: Callable[[], None]
    watch: Watcher | None

    def plan(self, state: OutputState) -> RunInput:
        """The whole store, or what the table lacks of it."""
        given = self._input(state)
        require_room_to_do(given.manifest.num_rows)
        return given

    def _input(self, state: OutputState) -> RunInput:
        listing = self.store.listing(state)
        whole = run_input(listing)
        config = self.table.config
        if not config.incremental:
            return whole if config.max_images else with_left(whole, state)
        given = diff_with_store(self.table, whole, state)
        refused = None if config.allow_deletes else too_many_deleted(given, config.max_deleted_ratio)
        if refused is not None:
            raise ManyDeletedError(refused)
        return given

    def process(self, runs: Sequence[Run], rows: pa.Table) -> WorkStats:
        """Rescore what has stored features, if that is wanted, and classify the rest; `runs` are of tables that lack rows."""
        config = self.table.config
        self.start_ray()
        pinned = {table.output.url: table.bundle.pinned for table in self.tables}
        bundles = [pinned[run.location.url.removesuffix(f"/{schema.RUNS}/{run.run_id}")] for run in runs]
        with heartbeat(runs, self.watch) as staged:
            if config.incremental and config.stale == "rescore":
                rows = self._rescore(runs, rows, staged)
            if not rows.num_rows:
                return WorkStats()
            # Of the whole store, as far as it was listed: tonight's few objects may all be closed.
            known = self.store.manifest if self.store.manifest is not None else runs[0].manifest
            stats = classify_rows(config, self.table.engine, bundles, runs, rows, choose_probes(known), staged)
        return stats._replace(list_seconds=self.store.seconds, quantizable=self.table.quantizable)

    def promotion_check(self, run: Run, report: ReportDocument, state: OutputState) -> Promotion:
        """Compare a complete run with the table, as `promote_if` says."""
        if self.table.config.promote_if is None:
            return Promotion()
        return check_promotion(state, run, report, parse_conditions(self.table.config.promote_if))

    def _rescore(self, runs: Sequence[Run], rows: pa.Table, staged: Staged) -> pa.Table:
        """Predict from stored features what has some; returns the rows that have none."""
        config, table = self.table.config, self.table
        matches = match_features(table, read_output(table.output), rows)
        if matches:
            job = RescoreJob(
                bundle_url=table.bundle.pinned,
                storage_options=config.storage_options,
                sources=sources_of(matches),
                engine=choose(table.bundle, "auto", gpu=False) if config.num_gpus else table.engine,  # it runs on CPUs
                threads=int(config.num_cpus or 1),
                top_k=config.top_k,
                features_dtype=config.features_dtype if config.features else None,
            )
            rescore_matches(runs, matches, rows["row"].to_numpy(), job, config.concurrency, staged)
        return without_matches(rows, matches)


def classify(config: RunConfig, watch: Watcher | None = None, listing: Listing | None = None) -> ReportDocument:
    """Classify every image of a store, or only extract its features, and publish the result.

    An unfinished run of the same spec in the output is continued; a finished run over the same images is left as it is. Several
    bundles of one base share the pass over the images; each table is published by itself, in a folder of the bundle's name.

    Args:
        config: what to do.
        watch: called every few seconds with the numbers of `progress.json`.
        listing: the images, if not all of the store are wanted.

    Returns:
        The run's report, as in `report.json`. With several bundles it is the first one's, and `tables` has each report by the
        bundle's name.

    Raises:
        UsageError: the configuration cannot be carried out; nothing was written.
        UnfinishedError: the run stopped and can be continued.
        CountsError: the counts do not reconcile; nothing was published.
    """
    if config.promote_if is not None:
        parse_conditions(config.promote_if)  # before any work
    bundles = [load_bundle(one.bundle, config.storage_options) for one in config.tables.values()]
    _require_usable(config, bundles)
    with ray_session(config.address) as start_ray:
        config = _with_gpus(config, bundles, start_ray)
        tables = [OutputTable.of(one, bundle) for one, bundle in zip(config.tables.values(), bundles, strict=True)]
        root = resolve(config.output, config.storage_options)
        reports, continued = _publish(tables, root, start_ray, watch, listing=listing)
        if config.incremental and continued:
            # Its manifest was listed by the command that began it, and the store may have changed since then.
            more, _ = _publish(tables, root, start_ray, watch, run_id=new_run_id())
            reports = [_merge_reports(*pair) for pair in zip(reports, more, strict=True)]
    if len(reports) == 1:
        return reports[0]
    return {**reports[0], "output": root.url, "tables": dict(zip(config.tables, reports, strict=True))}


def _with_gpus(config: RunConfig, bundles: Sequence[Bundle], start_ray: Callable[[], None]) -> RunConfig:
    """The configuration with `num_gpus` and, on GPUs, the engine that sees them.

    If GPUs are configured and no machine has them now, an autoscaler may start one. The engine is then the one of `choose`, and
    the actors check it. Bundles from ONNX, or in int8, run on CPUs.
    """
    if config.num_gpus is None and any(bundle.has(ONNX) or bundle.quantized for bundle in bundles):
        return config.model_copy(update={"num_gpus": 0.0})
    if config.num_gpus == 0 or config.engine == "openvino" or (config.num_gpus and config.engine != "auto"):
        return config if config.num_gpus is not None else config.model_copy(update={"num_gpus": 0.0})
    found = find_engine_on_gpus(start_ray, config.address, config.engine, config.num_gpus, engine_on_gpu)
    if config.num_gpus and found == "":
        raise ConfigError(f"num_gpus: GPUs are reserved, but {unseen_gpus(config.engine)} Or set num_gpus=0.")
    gpus = config.num_gpus or float(bool(found))
    return config.model_copy(update={"num_gpus": gpus, "engine": found or config.engine})


def _require_usable(config: RunConfig, bundles: Sequence[Bundle]) -> None:
    """Raises BundleError if a bundle is damaged, has no head, or has another base than the first one."""
    for bundle in bundles:
        if config.predictions and not bundle.labels:
            raise BundleError(f"The bundle {bundle.location.url} has no head; use `tlbatch extract` with it, or train a head.")
        if bundle.base_digest != bundles[0].base_digest:
            raise BundleError(
                f"The bundles {bundles[0].location.url} and {bundle.location.url} have different bases "
                f"({bundles[0].base_digest} and {bundle.base_digest}), so they cannot share a pass."
            )
        bundle.require_whole()


def _publish(
    tables: Sequence[OutputTable],
    root: Location,
    start_ray: Callable[[], None],
    watch: Watcher | None,
    *,
    listing: Listing | None = None,
    run_id: str | None = None,
) -> tuple[list[ReportDocument], bool]:
    """Publish the tables of one pass. Returns their reports, and whether a run was continued that an earlier command began."""
    began = time.monotonic()
    config = tables[0].config
    states = [read_output(table.output) for table in tables]
    store = ListedStore(config, states, root, watch, listing)
    targets = [Target(table.output, table.spec, ClassifyWork(table, tables, store, start_ray, watch)) for table in tables]
    begun: list[Run] = []
    for target, state in zip(targets, states, strict=True):
        require_output(state, target.spec.spec["images"])
        require_free(target.output)
        found = run_to_continue(state, target.spec)
        begun += [] if found is None else [found]
    all_begun = len(begun) == len(targets)
    # A run that is begun beside a continued one gets a name of its own: its output may have a run of the other's name.
    name = begun[0].run_id if all_begun else (run_id or config.run_id or new_run_id())
    with errors_say_how_to_continue(name):
        if not all_begun:
            _list_store(config, store, states[0], start_ray)
        spread = partial(map_file_tasks, start_ray, name, watch)
        return run_to_publication(targets, name, began=began, map_tasks=spread), bool(begun)


def _list_store(config: RunConfig, store: ListedStore, state: OutputState, start_ray: Callable[[], None]) -> None:
    """List the store before anything is written: a store that cannot be listed leaves nothing behind.

    Ray starts at the same time, in this thread, as Ray requires. If a table is published there may be nothing to do, and Ray
    starts later.
    """
    if state.pointer:
        store.listing(state)
        return
    images = store_of(config)
    if not isinstance(images, Inventory):
        require_folder(images)
    with ThreadPoolExecutor(1, thread_name_prefix="tlbatch-listing") as beside:
        listing = beside.submit(store.listing, state)
        try:
            start_ray()
            listing.result()
        except BaseException:
            store.stop()  # Ctrl-C does not wait for a long listing
            raise


def _merge_reports(first: ReportDocument, second: ReportDocument) -> ReportDocument:
    """The report of a command that finished one run and did another: counts and seconds are sums."""
    if second.get("already_done"):
        return first
    one, other, merged = (cast("dict[str, Any]", report) for report in (first, second, second.copy()))
    for name in ("failed_by_kind", "labels", "white_levels", "skipped_in_shards", "stage_seconds"):
        if name in one or name in other:
            before, after = one.get(name) or {}, other.get(name) or {}
            merged[name] = {key: before.get(key, 0) + after.get(key, 0) for key in {**before, **after}}
    seconds = first["seconds"] + second["seconds"]
    table = second.get("table") or first.get("table")
    if table:
        merged["table"] = table
        merged["failed_new"] = first.get("failed_new", first["failed"]) + second.get("failed_new", second["failed"])
    if one.get("left") or other.get("left"):
        merged["left"] = {**one.get("left", {}), **other.get("left", {})}
    sums = {
        "seconds": round(seconds, 3),
        "images_per_second": round((first["listed"] + second["listed"]) / seconds, 1) if seconds else 0.0,
        "objects": first["objects"] + second["objects"],
        "listed": first["listed"] + second["listed"],
        "predicted": first["predicted"] + second["predicted"],
        "failed": first["failed"] + second["failed"],
        "failed_transient": first["failed_transient"] + second["failed_transient"],
        "continued": first["run_id"],
    }
    return cast("ReportDocument", {**merged, **sums})


def diff_with_store(table: OutputTable, whole: RunInput, state: OutputState) -> RunInput:
    """The input of an incremental run. Features are stale if their base is another one, whatever head the bundle has."""
    config, bundle = table.config, table.bundle
    name, digest = ("bundle", bundle.digest) if config.predictions else ("base", bundle.base_digest)
    dtype = config.features_dtype if config.features else None
    limits = {name: getattr(config, name) for name in ("max_pixels", "max_side", "max_bytes")}
    rule = StalenessRule(name, digest, config.predictions, dtype, limits, installed_versions(*_READERS))
    if not config.predictions and any(run.facts["spec"].get("predictions") for run in state.table):
        raise OutputError(f"The table at {table.output.url} has predictions; extract features into an output of their own.")
    return diff_with_table(whole, state, rule, config.stale)


def match_features(table: OutputTable, state: OutputState, rows: pa.Table) -> list[FeatureMatch]:
    """The stored features of the table's base for manifest rows, each in exactly the listed version."""
    wanted = table.config.features_dtype if table.config.features else None
    sources = [
        one
        for one in runs_with_features(state)
        if one.base == table.bundle.base_digest and (wanted is None or one.run.facts["spec"].get("features_dtype") == wanted)
    ]
    return match_stored_features(sources, rows)


def without_matches(rows: pa.Table, matches: Sequence[FeatureMatch]) -> pa.Table:
    """The manifest rows that have no stored features."""
    done = np.concatenate([np.array([-1]), *(one.target for one in matches)])
    return rows.filter(pa.array(~np.isin(rows["row"].to_numpy(), done)))
