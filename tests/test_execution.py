"""Blocks through actors: what is left of it in this process when it is interrupted."""

import os
import signal
import threading
import time

import pyarrow as pa
import pytest

from tlbatch import execution
from tlbatch.ledger import Run
from tlbatch.storage import LocalPlace

pytestmark = pytest.mark.usefixtures("ray_here")


def slow() -> type:
    """A worker that tells a folder of every block and takes its time; made here, since workers cannot import this module."""

    class Slow:
        def __init__(self, told, *, after_a_death: bool = False) -> None:
            self._told = told

        def __call__(self, block: pa.Table) -> pa.Table:
            (self._told / str(block["number"][0])).touch()
            time.sleep(0.3)
            return block.slice(0, 0)

    return Slow


def test_an_interrupted_loop_leaves_no_thread_that_would_end_the_process_with_ray(tmp_path):
    told, blocks = tmp_path / "told", [pa.table({"number": [number]}) for number in range(40)]
    told.mkdir()

    def interrupt() -> None:
        end = time.monotonic() + 60
        while len(list(told.iterdir())) < 6 and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    def stop(*_):
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    kept = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Thread(target=interrupt)
    timer.start()
    run = Run(LocalPlace(tmp_path / "run"), {"run_id": "the-run"})
    with pytest.raises(KeyboardInterrupt):
        execution.stage([run], blocks, [(slow(), execution.Pool(1, 0, 1, 1))], told)
    signal.signal(signal.SIGUSR1, kept)
    timer.join()
    assert [thread.name for thread in set(threading.enumerate()) - before] == []
