"""Joins the stages on Ray Data, the only place where they meet: a configuration -> a published run.

listing -> manifest -> worker (reader -> decode -> model) -> writer -> ledger -> publish

What is written in which order is `commit.py`'s; here is who does the work.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from tlbatch import commit, errors, ledger, schema
from tlbatch.commit import Order
from tlbatch.config import RunConfig, TrainConfig
from tlbatch.errors import (
    BundleError,
    InterruptedRunError,
    StoreUnavailableError,
    TlbatchError,
    trouble_is_the_stores,
)
from tlbatch.lease import require_free
from tlbatch.ledger import Published, Run
from tlbatch.listing import Listing, Selection, list_store
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import choose, gpus_of_this_process
from tlbatch.plan import BLOCKS_AT_ONCE, WRITE_CPUS, Plan, blocks_of, lanes_of, plan_for, weights_of
from tlbatch.publish import Window, Written
from tlbatch.report.bottleneck import bottleneck
from tlbatch.session import gpus_that_work, ray_session
from tlbatch.storage import Place, hurrying, require_folder, resolve
from tlbatch.worker import Job, Worker
from tlbatch.writer import PartsSink

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 2.0
_LISTING_SECONDS = 10.0
#: Published files that are written at the same time, each by one CPU and in about a GB of memory.
_FILES_AT_ONCE = 32

#: Called every few seconds with the numbers of `progress.json`.
Watcher = Callable[[Mapping[str, Any]], None]


@dataclass
class _Context:
    """What the steps of one command share; `listing` is what is to be classified where the caller chose it."""

    config: RunConfig
    bundle: Bundle
    output: Place
    watch: Watcher | None
    listing: Listing | None
    published: Published
    run_id: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    start_ray: Callable[[], None] = lambda: None
    #: How much of each stage can be under way at once; None until something is.
    lanes: Mapping[str, int] | None = None

    @property
    def engine(self) -> str:
        """The engine that `auto` stands for; another one would give other last digits."""
        return choose(self.bundle, self.config.engine, gpu=bool(self.config.num_gpus))

    def list(self, published: Published) -> Listing:
        """What the store holds: listed once a command, and once more if another run published something meanwhile."""
        if self.listing is None or self.published != published:
            self.listing = list_images(self.config, self.output, self.stop)
            self.published = published
        return self.listing

    def bottleneck(self, stage_seconds: Mapping[str, float], seconds: float) -> dict[str, Any] | None:
        """What the command waited for, if it classified anything."""
        if self.lanes is None:
            return None
        listed = self.listing.seconds if self.listing else 0.0
        return bottleneck({"list": listed, **stage_seconds}, self.lanes, seconds, gpu=bool(self.config.num_gpus))


def _order(context: _Context) -> Order:
    """What the command asks for: the store's full address; the bundle's digest, which stands for its place."""
    config, bundle = context.config, context.bundle
    spec = config.spec.model_dump(mode="json", exclude={"bundle"})
    return Order(
        spec={**spec, "images": resolve(config.images).url, "engine": context.engine, "gpu": bool(config.num_gpus)},
        bundle=bundle.digest,
        base=bundle.base_digest,
        predictions=config.predictions,
        features=schema.features_schema(bundle.features_length, config.features_dtype) if config.features else None,
        listing=context.list,
        work=partial(_execute, context),
        facts={
            "resources": config.resources.model_dump(mode="json"),
            "bundle_url": bundle.place.url,
            "versions": {name: version(name) for name in ("keras", "openvino", "ray", "tensorflow", "tlbatch")},
        },
        each=partial(_on_ray, context),
        bottleneck=context.bottleneck,
    )


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

    Args:
        config: what to do.
        watch: called every few seconds with the numbers of `progress.json`.
        listing: the images, where not all of the store are wanted.

    Returns:
        The run's report: what `report.json` holds.

    Raises:
        UsageError: something asked for cannot be; nothing was written.
        UnfinishedError: it stopped and can be continued.
        BooksError: the images do not add up; nothing was published.
    """
    bundle = load_bundle(config.bundle, config.storage_options)
    if config.predictions and not bundle.labels:
        raise BundleError(f"The bundle {bundle.place.url} has no head; use `tlbatch extract` with it, or train one.")
    bundle.require_whole()
    with ray_session(config.address) as start_ray:
        if config.num_gpus is None:
            auto = config.engine != "openvino" and gpus_that_work(start_ray, config.address, gpus_of_this_process)
            config = config.model_copy(update={"num_gpus": float(auto)})
        output = resolve(config.output, config.storage_options)
        return _run(_Context(config, bundle, output, watch, listing, ledger.read_latest(output), start_ray=start_ray))


def _run(context: _Context) -> dict[str, Any]:
    config, output = context.config, context.output
    order = _order(context)
    ledger.require_output(output, order.spec["images"])
    require_free(output)
    current = commit.to_continue(output, order)
    context.run_id = run_id = current.run_id if current else (config.run_id or ledger.new_run_id())
    try:
        if current is None:
            _list(context)
        return commit.carry_out(output, order, run_id)
    except KeyboardInterrupt:
        raise InterruptedRunError(f"Run {run_id} was interrupted; run the same command again to continue it.") from None
    except OSError as error:
        raise _stopped(run_id, errors.in_words(error)) from error


def _list(context: _Context) -> None:
    """List the store before anything is written: one that cannot be listed leaves nothing behind.

    Ray starts meanwhile, in this thread, which it needs; but not where a table is published and there may be nothing to do.
    """
    if context.published:
        context.list(context.published)
        return
    require_folder(resolve(context.config.images, context.config.storage_options))
    with ThreadPoolExecutor(1, thread_name_prefix="tlbatch-listing") as beside:
        listing = beside.submit(context.list, context.published)
        try:
            context.start_ray()
            listing.result()
        except BaseException:
            context.stop.set()  # Ctrl-C does not wait for a long listing
            raise


def _stopped(run_id: str, why: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"Run {run_id} stopped: {why}. The table is as it was; once this is mended, run the same command again."
    )


def _execute(context: _Context, run: Run, left: pa.Table) -> None:
    """Everything between manifest and receipts, on Ray Data."""
    import ray.data

    config = context.config
    context.start_ray()
    with _heartbeat(run, context.watch):
        weights = weights_of(left, config.rows_per_task)
        plan = plan_for(config, int(weights.sum()), [node["Resources"] for node in ray.nodes() if node["Alive"]])
        job = _job(context, run, plan, left["uri"][0].as_py())
        context.lanes = lanes_of(job, plan, left)
        _suspects(run).delete()  # those of an earlier command died with it, whatever they were alone with
        dataset = ray.data.from_arrow(blocks_of(left, weights, plan.rows_per_task))
        for kind, pool in plan.pools:
            # What `map_batches` calls, which refuses whole blocks as batches where a GPU is asked for.
            dataset = dataset.map_batches_internal(
                _Actor,
                fn_constructor_args=(kind, job),
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ray.data.ActorPoolStrategy(
                    min_size=pool.least,
                    max_size=pool.actors,
                    max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
                    enable_true_multi_threading=True,
                ),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus or None,
            )
        with _said_in_one_sentence(run.run_id):
            dataset.write_datasink(PartsSink(run.staged), ray_remote_args={"num_cpus": WRITE_CPUS})


def _on_ray(context: _Context, function: Callable[[Window], Written], windows: Sequence[Window]) -> Iterator[Written]:
    """`map` for the files of a table: many are written all over the cluster, one is written here."""
    if len(windows) == 1:
        yield from map(function, windows)
        return
    import ray

    def write(window: Window) -> Written:
        with trouble_is_the_stores():
            return function(window)

    context.start_ray()
    task = ray.remote(num_cpus=1)(write)
    waiting: deque[Any] = deque()
    with _said_in_one_sentence(context.run_id):
        for window in windows:
            waiting.append(task.remote(window))
            if len(waiting) == _FILES_AT_ONCE:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())


@contextlib.contextmanager
def _said_in_one_sentence(run_id: str) -> Iterator[None]:
    """What Ray raises while the block runs, as an error of tlbatch's own."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise _in_one_sentence(error, run_id) from error


def _in_one_sentence(error: Exception, run_id: str) -> TlbatchError:
    """What a worker died of. Ray gives its last words as text; an error of tlbatch's own is found in it and raised again."""
    said = re.findall(r"tlbatch\.errors\.(\w+): (.+)", str(error))
    if said:
        kind, sentence = said[-1]
        if kind == StoreUnavailableError.__name__:
            return _stopped(run_id, sentence)
        found: TlbatchError = getattr(errors, kind)(sentence)
        return found
    last = str(error).strip().splitlines()[-1].strip()
    return TlbatchError(
        f"Ray ended run {run_id}: {last}. Nothing is published; run the same command again to continue, "
        "with --verbose to see more."
    )


def _job(context: _Context, run: Run, plan: Plan, left_uri: str) -> Job:
    config = context.config
    return Job(
        bundle_url=context.bundle.place.url,
        storage_options=config.storage_options,
        engine=context.engine,
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
        features_dtype=config.features_dtype if config.features else None,
        suspects_url=_suspects(run).url,
    )


def _suspects(run: Run) -> Place:
    return run.place.join(schema.STAGED, schema.SUSPECTS)


class _Actor:
    """One of `worker.py`'s as an actor of Ray, which starts it again when it died."""

    def __init__(self, kind: type[Worker], job: Job) -> None:
        import ray

        with trouble_is_the_stores():
            self._worker = kind(job, after_a_death=bool(ray.get_runtime_context().was_current_actor_reconstructed))

    def __call__(self, block: pa.Table) -> pa.Table:
        with trouble_is_the_stores():
            return self._worker(block)


@contextlib.contextmanager
def _heartbeat(run: Run, watch: Watcher | None) -> Iterator[None]:
    """Rewrite `progress.json` every few seconds while the block runs, and once after it."""
    stop = threading.Event()
    began = time.monotonic()
    objects = int(run.facts["objects"])
    before = ledger.count_staged(run.staged.names())

    def beat() -> None:
        now = ledger.count_staged(run.staged.names())
        seconds = time.monotonic() - began
        rate = (now.predicted + now.failed - before.predicted - before.failed) / seconds if seconds else 0.0
        books = now.books(objects)
        left = books["left"] * (now.predicted + now.failed) / now.objects if now.objects else 0
        numbers = {
            "run_id": run.run_id,
            **books,
            "images_per_second": round(rate, 1),
            "seconds_left": round(left / rate) if rate else None,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        run.place.join(schema.PROGRESS).write(json.dumps(numbers).encode())
        if watch is not None:
            watch(numbers)

    def loop() -> None:
        while not stop.wait(_HEARTBEAT_SECONDS):
            try:
                beat()
            except OSError as error:
                log.warning("progress could not be written: %s", error)

    thread = threading.Thread(target=loop, name="tlbatch-heartbeat", daemon=True)
    thread.start()
    try:
        yield
        beat()
    except BaseException:
        with hurrying():
            stop.set()
            thread.join()
        raise
    finally:
        stop.set()
        thread.join()
