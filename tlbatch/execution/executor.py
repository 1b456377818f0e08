"""Blocks of manifest rows -> staged parts, by actors on Ray Data; and published files, by tasks on the cluster."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from tlbatch.errors import store_errors_end_the_run
from tlbatch.execution.blocks import ManifestRows, RowBlocks
from tlbatch.execution.metrics import count_receipt
from tlbatch.execution.ray_errors import ray_errors_as_sentences
from tlbatch.execution.resources import ActorPool, blocks_of_rows, finished_blocks, map_blocks
from tlbatch.output.parts import stage_parts
from tlbatch.output.progress import Staged, Watcher
from tlbatch.output.publish import FileTask, WrittenFiles
from tlbatch.output.run import Run
from tlbatch.storage.location import Location

#: Published files that are written at the same time, each by one CPU and in about 1 GB of memory.
_FILES_AT_ONCE = 32
#: Blocks whose rows go through Ray's object store, where each takes a millisecond and stays until the run ends.
MOST_BLOCKS = 1_024
#: The column of the blocks that come back: the receipts of a part, as JSON.
_RECEIPTS = "receipts"


class Worker(Protocol):
    """What Ray starts as an actor: a block in, a block out."""

    def __init__(self, job: Any, *, after_a_death: bool = False) -> None: ...

    def __call__(self, block: pa.Table) -> pa.Table:
        """Process one block."""


def run_actors(
    runs: Sequence[Run],
    blocks: Sequence[pa.Table] | RowBlocks,
    pools: Sequence[tuple[type[Worker], ActorPool]],
    job: object,
    staged: Staged,
) -> None:
    """Pass blocks through one or two pools of actors, and stage the result as parts of the runs.

    Args:
        runs: the runs that get the parts.
        blocks: rows of the manifest. Of many `RowBlocks` Ray gets the places, and the first actors read the rows.
        pools: the kinds of actors in the order in which a block passes them, and how many of each.
        job: the argument of every actor.
        staged: called with the receipts of each block, as the blocks come back.

    Raises:
        TlbatchError: the reason a worker failed, in one sentence.
    """
    import ray.data

    pa.default_memory_pool().release_unused()  # Arrow keeps the memory of a listing, which the actors need
    places_in = None
    if isinstance(blocks, RowBlocks) and len(blocks) > MOST_BLOCKS:
        dataset, places_in = blocks_of_rows(blocks.places()), runs[0].location
    else:
        dataset = ray.data.from_blocks(list(blocks))  # `from_arrow` first waits for a worker that inspects the blocks
    for number, (kind, pool) in enumerate(pools, 1):
        folders = [run.staged for run in runs] if number == len(pools) else []
        dataset = map_blocks(dataset, _Actor, (kind, job, folders, places_in if number == 1 else None), pool)
    with ray_errors_as_sentences(runs[0].run_id):
        for block in finished_blocks(dataset):
            for receipts in block[_RECEIPTS].to_pylist() if block.num_rows else ():
                staged(json.loads(receipts))


class _Actor:
    """A worker as an actor of Ray, which restarts it when it dies.

    The last actor stages its own results: a write task would be one more process to start, and all outcomes would be copied
    to it.
    """

    def __init__(self, kind: type[Worker], job: object, staged: Sequence[Location], places_in: Location | None) -> None:
        import ray

        self._staged = staged
        self._manifest = None if places_in is None else ManifestRows(places_in)
        with store_errors_end_the_run():
            self._worker = kind(job, after_a_death=bool(ray.get_runtime_context().was_current_actor_reconstructed))

    def __call__(self, block: pa.Table) -> pa.Table:
        with store_errors_end_the_run():
            outcomes = self._worker(block if self._manifest is None else self._manifest.of_block(block))
            if not self._staged:
                return outcomes
            receipts = stage_parts(self._staged, outcomes)
            for receipt in receipts:
                count_receipt(receipt)
            return pa.table({_RECEIPTS: pa.array([json.dumps(receipts)] if receipts else [], pa.string())})


def map_file_tasks(
    start_ray: Callable[[], None],
    run_id: str,
    watch: Watcher | None,
    function: Callable[[FileTask], WrittenFiles],
    tasks: Sequence[FileTask],
) -> Iterator[WrittenFiles]:
    """`map` for the files of a table: one file is written here, several are written all over the cluster.

    Args:
        start_ray: starts Ray, if several files are written.
        run_id: for the sentence about a worker that failed.
        watch: called after each file.
        function: writes the files of one task.
        tasks: the files.
    """
    written = _map_on_cluster(start_ray, run_id, function, tasks) if len(tasks) > 1 else map(function, tasks)
    for number, one in enumerate(written, 1):
        if watch is not None:
            watch({"stage": "publish", "done": number, "of": len(tasks)})
        yield one


def _map_on_cluster(
    start_ray: Callable[[], None], run_id: str, function: Callable[[FileTask], WrittenFiles], tasks: Sequence[FileTask]
) -> Iterator[WrittenFiles]:
    import ray

    def write(task: FileTask) -> WrittenFiles:
        with store_errors_end_the_run():
            return function(task)

    start_ray()
    remote = ray.remote(num_cpus=1)(write)
    waiting: deque[Any] = deque()
    with ray_errors_as_sentences(run_id):
        for task in tasks:
            waiting.append(remote.remote(task))
            if len(waiting) == _FILES_AT_ONCE:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())


def lazy_dataset(items: Sequence[Any], read: Callable[[Any], pa.Table]) -> Any:
    """A Ray Dataset of tables that are read where their rows are used, one task each."""
    import ray.data

    def rows(block: pa.Table) -> pa.Table:
        return pa.concat_tables([read(items[number]) for number in block["item"].to_pylist()])

    numbers = ray.data.from_blocks([pa.table({"item": [number]}) for number in range(len(items))])
    return numbers.map_batches(rows, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
