"""Images that kill or hang their worker -> rows with kind `worker_lost`, while the rest of the run goes on.

Ray starts a dead worker again and gives it the same block, without end. So a worker that was started again takes its first
blocks image by image and leaves a mark while it is alone with one; an image that was alone with two workers when they died
is not tried a third time. A worker that hangs is made to die.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator

import pyarrow as pa

from tlbatch.errors import ErrorKind, Failure
from tlbatch.storage.location import Location

#: Deaths beside one image that condemn it: one may be the machine's.
MAX_DEATHS = 2


class Quarantine:
    """The marks of one run: a file for each image that some worker was, or is, alone with."""

    def __init__(self, location: Location) -> None:
        self._location = location

    def failure_of(self, row: int, index: int) -> Failure | None:
        """The failure of an image that was alone with too many workers when they died; None where it may be tried."""
        marks = [name for name in self._location.names() if name.startswith(_name(row, index))]
        if len(marks) < MAX_DEATHS:
            return None
        stage = Counter(self._location.join(name).read().decode() for name in marks).most_common(1)[0][0]
        return Failure(stage, ErrorKind.WORKER_LOST, f"{len(marks)} workers died or hung while alone with it", len(marks))

    @contextlib.contextmanager
    def isolated(self, row: int, index: int, stage: str) -> Iterator[None]:
        """Mark the image while the block runs. An exception is no death."""
        mark = self._location.join(_name(row, index) + uuid.uuid4().hex[:12])
        mark.write(stage.encode())
        try:
            yield
        finally:
            mark.delete()


def _name(row: int, index: int) -> str:
    """How the marks of one image begin: its row in the manifest and its place in its shard."""
    return f"{row:012d}-{index:08d}."


class Watchdog:
    """Ends the process when one piece of work takes too long, even if it never gives Python its lock back.

    A thread winds up a timer of `faulthandler`, which needs no lock, as long as nothing under way is older than `patience`
    seconds. Work that hangs in C with the lock stops the thread, work that hangs without it stops the winding: either way the
    timer runs out and the process dies with all its tracebacks in its log.
    """

    def __init__(self, patience: float, period: float = 5.0) -> None:
        self._patience = patience
        self._period = period
        self._under_way: dict[int, float] = {}
        self._numbers = itertools.count()
        threading.Thread(target=self._wind, name="tlbatch-switch", daemon=True).start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count the block as one piece of work."""
        number = next(self._numbers)
        self._under_way[number] = time.monotonic()
        try:
            yield
        finally:
            del self._under_way[number]

    def _wind(self) -> None:
        while True:
            oldest = min(self._under_way.copy().values(), default=time.monotonic())
            if time.monotonic() - oldest < self._patience:
                faulthandler.dump_traceback_later(3 * self._period, exit=True)
            time.sleep(self._period)


#: Blocks that a worker which was started again takes image by image: those it had been given when it died, and some.
_ISOLATED_BLOCKS = 8


class IsolationMode:
    """Whether a block is taken image by image: a worker died over one of the first, and nobody knows of which image."""

    def __init__(self, *, after_a_death: bool) -> None:
        self._calls = _ISOLATED_BLOCKS if after_a_death else 0
        self._lock = threading.Lock()

    def work(self, carefully: Callable[[], pa.Table], freely: Callable[[], pa.Table]) -> pa.Table:
        """Do one block's work in one of two ways; the careful one by one thread at a time."""
        with self._lock:
            if self._calls:
                self._calls -= 1
                return carefully()
        return freely()
