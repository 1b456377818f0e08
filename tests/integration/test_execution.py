"""Blocks pass through actors: the load on this process, interruption, and what happens without Ray's private names."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
from support.tables import begin

from tlbatch.execution import resources
from tlbatch.execution.executor import run_actors
from tlbatch.execution.resources import (
    ActorPool,
    blocks_of_rows,
    configure_ray_data,
    finished_blocks,
    map_blocks,
    read_cluster,
)
from tlbatch.execution.sizing import cut_blocks
from tlbatch.output.receipts import numbered
from tlbatch.output.run import Run
from tlbatch.storage.local import LocalLocation

pytestmark = pytest.mark.usefixtures("ray_here")


def slow(seconds: float) -> type:
    """A worker that tells a folder of every block and takes its time; made here, since workers cannot import this module."""

    class Slow:
        def __init__(self, told, *, after_a_death: bool = False) -> None:
            self._told = told

        def __call__(self, block: pa.Table) -> pa.Table:
            (self._told / str(block["number"][0])).touch()
            time.sleep(seconds)
            return block.slice(0, 0)

    return Slow


def stage(blocks: list[pa.Table], kind: type, told: Path) -> None:
    run = Run(LocalLocation(told / "run"), {"run_id": "the-run"})
    run_actors([run], blocks, [(kind, ActorPool(1, 0, 1, 1))], told, lambda receipts: None)


def test_an_interrupted_loop_leaves_no_thread_that_would_end_the_process_with_ray(tmp_path):
    told, blocks = tmp_path / "told", [pa.table({"number": [number]}) for number in range(40)]
    told.mkdir()

    ended = threading.Event()

    def interrupt() -> None:
        while len(list(told.iterdir())) < 6:
            if ended.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGUSR1)

    def stop(*_):
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    kept = signal.signal(signal.SIGUSR1, stop)
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            stage(blocks, slow(0.3), told)
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, kept)
    end = time.monotonic() + 10  # Ray Data's own loop has a moment to end
    while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
        time.sleep(0.1)
    assert [thread.name for thread in left] == []


@pytest.mark.sampled(2)
def test_while_a_block_takes_its_time_ray_data_looks_seldom(tmp_path, monkeypatch):
    configure_ray_data()
    looks, wait = [], ray.wait
    monkeypatch.setattr(ray, "wait", lambda *given, **options: looks.append(time.monotonic()) or wait(*given, **options))
    stage([pa.table({"number": [0]})], slow(4.0), tmp_path)
    began = tmp_path.joinpath("0").stat().st_mtime - time.time() + time.monotonic()
    # Twice a second, and once a second for its autoscaler, come to eleven and a stray one; by default they are about forty.
    assert 2 <= sum(began < look < began + 3.5 for look in looks) <= 20


def test_a_cluster_is_asked_what_it_is_though_another_was_shut_down_in_this_process(ray_here):
    """Ray keeps one client for its key-value store in a process, and any shutdown of a test cluster takes it away."""
    from ray._private.worker import global_worker
    from ray.experimental.internal_kv import _initialize_internal_kv, _internal_kv_reset

    _internal_kv_reset()
    try:
        found = read_cluster()
    finally:
        _initialize_internal_kv(global_worker.gcs_client)
    assert found.machines[0]["CPU"] >= 1
    assert not found.grows, "nothing starts machines for this one"


def recording() -> type:
    """A worker that tells a folder of each whole block."""

    class Recording:
        def __init__(self, told: Path) -> None:
            self._told = told

        def __call__(self, block: pa.Table) -> pa.Table:
            (self._told / "-".join(map(str, block["number"].to_pylist()))).touch()
            return block.slice(0, 0)

    return Recording


NUMBERS = [pa.table({"number": [0, 1]}), pa.table({"number": [2, 3, 4]})]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("private", [True, False])
def test_blocks_pass_whole_with_and_without_the_private_names_of_ray_data(tmp_path, private):
    blocks = ray.data.from_arrow(NUMBERS)
    mapped = map_blocks(
        blocks if private else SimpleNamespace(map_batches=blocks.map_batches), recording(), (tmp_path,), ActorPool(1, 0, 1, 1)
    )
    list(finished_blocks(mapped if private else SimpleNamespace(iter_batches=mapped.iter_batches)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-1", "2-3-4"]


class NoPlan:
    """A dataset without Ray Data's private names."""

    def __init__(self, dataset) -> None:
        self._dataset = dataset

    def repartition(self, **options):
        self._dataset.repartition(**options)
        return object()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("private", [True, False])
def test_blocks_are_cut_beside_actors_that_have_all_processors(tmp_path, monkeypatch, private):
    if not private:
        whole = ray.data.from_blocks
        monkeypatch.setattr(
            ray.data, "from_blocks", lambda blocks: NoPlan(whole(blocks)) if len(blocks) == 1 else whole(blocks)
        )
    blocks = blocks_of_rows(pa.table({"number": range(600)}))
    list(finished_blocks(map_blocks(blocks, recording(), (tmp_path,), ActorPool(ray.cluster_resources()["CPU"], 0, 1, 1))))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(600))


def staging() -> type:
    """A worker that writes its rows into a folder, as JSON."""

    class Staging:
        def __init__(self, told: Path, *, after_a_death: bool = False) -> None:
            self._told = told

        def __call__(self, block: pa.Table) -> pa.Table:
            first = block["row"][0].as_py()
            (self._told / f"{first}.json").write_text(json.dumps(block.to_pylist()))
            return block.slice(0, 0)

    return Staging


def test_of_many_blocks_the_actors_read_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("tlbatch.schema.ROWS_OF_GROUP", 64)
    monkeypatch.setattr("tlbatch.execution.executor.MOST_BLOCKS", 3)
    run = begin(LocalLocation(tmp_path / "output"), 300)
    rows = numbered(run.manifest).filter(pa.array([number % 10 > 2 for number in range(300)]))
    (tmp_path / "told").mkdir()
    run_actors(
        [run],
        cut_blocks(rows, np.ones(rows.num_rows, np.int64), 50),
        [(staging(), ActorPool(1, 0, 1, 1))],
        tmp_path / "told",
        lambda receipts: None,
    )
    found = sorted((json.loads(path.read_text()) for path in (tmp_path / "told").iterdir()), key=lambda one: one[0]["row"])
    assert [len(one) for one in found] == [50, 50, 50, 50, 10]
    assert [row for one in found for row in one] == rows.to_pylist()


def test_without_the_private_names_a_cluster_counts_as_one_that_does_not_grow(monkeypatch):
    from ray._private import worker
    from ray.autoscaler.v2 import sdk

    for module, name in ((worker, "global_worker"), (sdk, "get_cluster_status")):
        with monkeypatch.context() as patch:
            patch.delattr(module, name)
            assert not read_cluster().grows


def test_without_its_private_module_ray_data_is_set_up_all_the_same(monkeypatch):
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "enable_progress_bars", True)
    monkeypatch.setitem(sys.modules, "ray.data._internal.execution", None)
    configure_ray_data()
    assert not context.enable_progress_bars


def test_without_the_private_module_only_a_running_ray_tells_of_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray._private.accelerators", None)
    assert resources._gpus_of_this_machine() == 1
