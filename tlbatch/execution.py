"""Blocks of manifest rows -> staged parts, by actors of Ray Data, with a heartbeat beside them.

What the actors do, and what is published of it, is the affair of whoever calls.
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
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from tlbatch import errors, ledger, schema
from tlbatch.errors import InterruptedRunError, StoreUnavailableError, TlbatchError, trouble_is_the_stores
from tlbatch.ledger import Run
from tlbatch.publish import Window, Written
from tlbatch.storage import Place, hurrying
from tlbatch.writer import stage_parts

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 2.0
#: Points of a run's history; when there are as many, every other one goes.
_HISTORY = 240
#: Blocks that an actor has at a time: while the last images of one are predicted and written, the first of the next are on
#: their way.
_BLOCKS_AT_ONCE = 2
#: Published files that are written at the same time, each by one CPU and in about a GB of memory.
_FILES_AT_ONCE = 32

#: Seconds in which an autoscaler is to have looked at its cluster once.
_AUTOSCALER_SECONDS = 15.0

#: Called every few seconds with the numbers of `progress.json`.
Watcher = Callable[[Mapping[str, Any]], None]


class Worker(Protocol):
    """What Ray starts as an actor: a block in, a block out."""

    def __init__(self, job: Any, *, after_a_death: bool = False) -> None: ...

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block's work."""


class Pool(NamedTuple):
    """Actors of one kind: what each reserves, the fewest and the most of them."""

    cpus: float
    gpus: float
    least: int
    actors: int

    @property
    def blocks_at_once(self) -> int:
        """Blocks that each of them has at a time; one more beside a GPU, which predicts a block while a store takes another."""
        return _BLOCKS_AT_ONCE + (1 if self.gpus else 0)


def stage(runs: Sequence[Run], blocks: Sequence[pa.Table], pools: Sequence[tuple[type[Worker], Pool]], job: object) -> None:
    """Let blocks pass through pools of actors, in turn, and stage what comes out as parts of the runs.

    Args:
        runs: whose parts they are.
        blocks: rows of the manifest.
        pools: which actors, how many.
        job: what each actor is told.

    Raises:
        TlbatchError: what a worker died of, in one sentence.
    """
    import ray.data

    pa.default_memory_pool().release_unused()  # Arrow keeps what a listing took, and the actors are to have it
    dataset = ray.data.from_blocks(list(blocks))  # `from_arrow` first waits for a worker that tells what the blocks are
    for number, (kind, pool) in enumerate(pools, 1):
        staged = [run.staged for run in runs] if number == len(pools) else []
        # What `map_batches` calls, which refuses whole blocks as batches where a GPU is asked for.
        dataset = dataset.map_batches_internal(
            _Actor,
            fn_constructor_args=(kind, job, staged),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.least,
                max_size=pool.actors,
                max_concurrent_calls_per_actor=pool.blocks_at_once,
                enable_true_multi_threading=True,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
    with _said_in_one_sentence(runs[0].run_id):
        # Not `iter_batches`: its threads outlive an interrupted loop, and one that lets go of a block when Ray has ended takes
        # the process with it, without a word.
        for _ in dataset.iter_internal_ref_bundles():
            pass  # what comes back says only that a block is staged


class _Actor:
    """One of the workers as an actor of Ray, which starts it again when it died.

    The last in turn stages what it made: a write task would be a process more to start, and all outcomes would travel to it.
    """

    def __init__(self, kind: type[Worker], job: object, staged: Sequence[Place]) -> None:
        import ray

        self._staged = staged
        with trouble_is_the_stores():
            self._worker = kind(job, after_a_death=bool(ray.get_runtime_context().was_current_actor_reconstructed))

    def __call__(self, block: pa.Table) -> pa.Table:
        with trouble_is_the_stores():
            made = self._worker(block)
            if not self._staged:
                return made
            stage_parts(self._staged, made)
            return pa.table({"staged": [made.num_rows]})


class Cluster(NamedTuple):
    """For each machine what it has, as Ray names it ("CPU", "GPU"), and whether more are started for work that wants them."""

    machines: Sequence[Mapping[str, float]]
    grows: bool = False


def cluster() -> Cluster:
    """The cluster that this process is connected to."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    grows = _grows()
    # The autoscaler of a cluster that was started for this very job may need a moment to say what it is.
    end = time.monotonic() + (0 if any(machine.get("CPU") for machine in machines) else _AUTOSCALER_SECONDS)
    while not grows and time.monotonic() < end:
        time.sleep(0.5)
        grows = _grows()
    return Cluster(machines, grows)


def small_pool(blocks: int, cpus: int, concurrency: int | None) -> Pool:
    """Actors for work that is mostly reading: as many as fit or, on a cluster that starts machines, as there are blocks."""
    found = cluster()
    fit = sum(int(machine.get("CPU", 0)) // cpus for machine in found.machines)
    most = max(1, min(blocks, concurrency or blocks, blocks if found.grows else fit))
    return Pool(cpus, 0, max(1, min(fit, most)), most)


def _grows() -> bool:
    """Whether an autoscaler that can start machines looks after the cluster.

    Ray has no question for that. One that only watches names each node after itself, `node_<id>`; any other by its type.
    """
    import ray
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.sdk import get_cluster_status

    # Not by `ray.experimental.internal_kv`, which loses its client when anything in this process shuts another cluster down.
    said = global_worker.gcs_client.internal_kv_get(b"__autoscaling_status", None)
    legacy = json.loads(said or b"{}").get("autoscaler_report") or {}
    names = list((legacy.get("node_type_mapping") or {}).values())
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    names += [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    return any(name and not name.startswith("node_") for name in names)


def write_windows(
    start_ray: Callable[[], None],
    run_id: str,
    function: Callable[[Window], Written],
    windows: Sequence[Window],
    watch: Watcher | None = None,
) -> Iterator[Written]:
    """`map` for the files of a table: many are written all over the cluster, one is written here; `watch` counts them."""
    written = _write_all_over(start_ray, run_id, function, windows) if len(windows) > 1 else map(function, windows)
    for number, one in enumerate(written, 1):
        if watch is not None:
            watch({"stage": "publish", "files": number, "of": len(windows)})
        yield one


def _write_all_over(
    start_ray: Callable[[], None], run_id: str, function: Callable[[Window], Written], windows: Sequence[Window]
) -> Iterator[Written]:
    import ray

    def write(window: Window) -> Written:
        with trouble_is_the_stores():
            return function(window)

    start_ray()
    task = ray.remote(num_cpus=1)(write)
    waiting: deque[Any] = deque()
    with _said_in_one_sentence(run_id):
        for window in windows:
            waiting.append(task.remote(window))
            if len(waiting) == _FILES_AT_ONCE:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())


def dataset(items: Sequence[Any], read: Callable[[Any], pa.Table]) -> Any:
    """A Ray Dataset of tables that are read where their rows are used, one task each."""
    import ray.data

    def rows(block: pa.Table) -> pa.Table:
        return pa.concat_tables([read(items[number]) for number in block["item"].to_pylist()])

    numbers = ray.data.from_blocks([pa.table({"item": [number]}) for number in range(len(items))])
    return numbers.map_batches(rows, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


@contextlib.contextmanager
def continued_later(run_id: str) -> Iterator[None]:
    """Ctrl-C, and a store that fails while the block runs, as errors that say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"Run {run_id} was interrupted; run the same command again to continue it.") from None
    except OSError as error:
        raise _stopped(run_id, errors.in_words(error)) from error


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


def _stopped(run_id: str, why: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"Run {run_id} stopped: {why}. The table is as it was; once this is mended, run the same command again."
    )


@contextlib.contextmanager
def heartbeat(run: Run, watch: Watcher | None) -> Iterator[None]:
    """Rewrite `progress.json` every few seconds while the block runs, and once after it."""
    stop = threading.Event()
    began = time.monotonic()
    objects = int(run.facts["objects"])
    before = ledger.count_staged(run.staged.names())
    history = ledger.read_history(run)

    def beat() -> None:
        nonlocal history
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
        history = [*history[:: 2 if len(history) >= _HISTORY else 1], [round(time.time(), 1), now.predicted + now.failed]]
        run.place.join(schema.PROGRESS).write(json.dumps({**numbers, "history": history}).encode())
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
